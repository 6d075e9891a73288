"""The base's own embeddings beside an adapter: PEFT puts them into its file when the vocabulary was resized."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.config.lora import LoraConfig
from loraloom.errors import AdapterError, ConfigError
from loraloom.lora.adapters import LoraModel
from loraloom.lora.base import base_modules
from loraloom.lora.file_keys import file_key
from loraloom.lora.layer import LoraLayer
from loraloom.lora.modules_to_save import unwrap


def take(model: LoraModel, tensors: dict[str, Tensor], config: LoraConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Take out copies of the base's embeddings, which PEFT adds when it adapts them or the vocabulary was resized."""
    out: dict[str, tuple[Tensor, Tensor]] = {}
    if all(".lora_" in key for key in tensors):
        return out
    saved = config.modules_to_save or []
    for name, weight in _tables(model.model).items():
        if any(name == s or name.endswith("." + s) for s in saved):
            continue
        for middle in (".base_layer.", "."):
            key = file_key(f"{name}{middle}weight")
            if key in tensors:
                out[key] = (weight, tensors.pop(key))
    return out


def _tables(model: nn.Module) -> dict[str, Tensor]:
    """The frozen weights of the input and the output embeddings by the names of their modules before any adapter."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # not every model has a table of words
            found.append(getattr(model, getter)())
    tables = [unwrap(table) for table in found if isinstance(table, nn.Module)]
    layers = {id(unwrap(module)): module for module in model.modules() if isinstance(module, LoraLayer)}
    out = {}
    for name, module in base_modules(model):
        if any(module is table for table in tables):
            layer = layers.get(id(module))
            weight = getattr(module, "weight", None) if layer is None else getattr(layer, "frozen_weight", None)
            if isinstance(weight, Tensor):
                out[name] = weight
    return out


def rows_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    """The rows of the input embeddings that ``tensors`` carry for ``model``, if they carry them."""
    for name in _tables(model):
        for middle in (".base_layer.", "."):
            found = tensors.get(file_key(f"{name}{middle}weight"))
            if found is not None and found.dim() == 2:
                return found.shape[0]
    return None


def to_save(model: LoraModel, adapter_name: str, wanted: bool | str) -> dict[str, Tensor]:
    """What PEFT's ``save_embedding_layers`` adds to an adapter's file: the base's embeddings, live, by their keys.

    ``"auto"`` is True where the vocabulary was resized: the adapter is of no use without the new rows. A table that the
    adapter trains in full is in its file already.
    """
    if wanted not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers: must be True, False or 'auto', found {wanted!r}")
    if not wanted or (wanted == "auto" and not resized(model.model, model.peft_config[adapter_name])):
        return {}
    trained = {name for name, wrapper in model.lora_saved_modules.items() if adapter_name in wrapper.modules_to_save}
    layers = model.lora_layers
    return {
        file_key(
            f"{name}{'.base_layer' if name in layers and adapter_name in layers[name].slots else ''}.weight"
        ): weight
        for name, weight in _tables(model.model).items()
        if not any(name == one or name.startswith(one + ".") for one in trained)
    }


def resized(model: nn.Module, config: LoraConfig) -> bool:
    """Whether ``model`` has another vocabulary than the base on disk (its folder, or the hub's cache) of its name."""
    name = config.base_model_name_or_path
    mine: Any = getattr(model, "config", None)
    if not name or not hasattr(mine, "get_text_config"):
        return False
    try:
        there = type(mine).from_pretrained(name, revision=config.revision or "main", local_files_only=True)
    except Exception:  # no such folder, not in the cache, of another type: the base cannot be asked
        return False
    sizes = [getattr(one.get_text_config(), "vocab_size", None) for one in (mine, there)]
    return sizes[0] != sizes[1]


def check(model: LoraModel, base: Mapping[str, tuple[Tensor, Tensor]], source: str) -> None:
    for key, (live, tensor) in base.items():
        if live.shape != tensor.shape:
            raise AdapterError(
                f"{source}it carries the base's {key} with shape {tuple(tensor.shape)}, this base has "
                f"{tuple(live.shape)}; resize the base's embeddings first (resize_token_embeddings({tensor.shape[0]}))"
            )
        if not torch.isfinite(tensor).all() or overflows(tensor, live.dtype):
            raise AdapterError(
                f"{source}it carries the base's {key} with values that are not finite in {dtype_name(live)}"
            )


def overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` turns finite numbers of ``tensor`` into infinite ones."""
    if tensor.dtype == dtype or not (tensor.is_floating_point() and dtype.is_floating_point):
        return False
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    return narrower and not bool(torch.isfinite(tensor.to(dtype)).all())


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
