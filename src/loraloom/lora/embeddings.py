"""The base's embeddings in an adapter's file: PEFT writes them there when the vocabulary was resized."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.config.lora import LoraConfig
from loraloom.errors import ConfigError
from loraloom.lora.adapters import LoraModel
from loraloom.lora.injection import base_modules, unwrap
from loraloom.lora.keys import file_key
from loraloom.lora.layer import LoraLayer
from loraloom.lora.matching import lies_in, matches_any


def in_file(model: nn.Module, tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """Key → live weight, for the base's embeddings among the ``tensors`` of a file.

    PEFT writes them when an adapter targets them or the vocabulary was resized.
    """
    if all(".lora_" in key for key in tensors):
        return {}
    saved = config.modules_to_save or ()
    tables = {name: weight for name, weight in _tables(model).items() if not matches_any(list(saved), name)}
    return {key: weight for name, weight in tables.items() for key in _keys(name) if key in tensors}


def _keys(name: str) -> tuple[str, str]:
    """The keys that a table may have in a file: adapted, and not."""
    return file_key(f"{name}.base_layer.weight"), file_key(f"{name}.weight")


def _tables(model: nn.Module) -> dict[str, Tensor]:
    """The frozen weights of the input and the output embeddings by the names of their modules before any adapter."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):  # not every model has token embeddings
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
    """The rows of the base's embeddings in ``tensors``, None if they hold none."""
    found = [tensors[key] for name in _tables(model) for key in _keys(name) if key in tensors]
    return next((table.shape[0] for table in found if table.dim() == 2), None)


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
    adapted = {name for name, layer in model.lora_layers.items() if adapter_name in layer.slots}
    tables = {name: weight for name, weight in _tables(model.model).items() if not lies_in(name, trained)}
    return {_keys(name)[name not in adapted]: weight for name, weight in tables.items()}


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


def overflows(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` turns finite numbers of ``tensor`` into infinite ones."""
    if tensor.dtype == dtype or not (tensor.is_floating_point() and dtype.is_floating_point):
        return False
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    return narrower and not bool(torch.isfinite(tensor.to(dtype)).all())


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
