"""Keys of an adapter's tensors as other tools and versions wrote them, read as PEFT writes them today."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.errors import AdapterError, ConfigError
from loraloom.lora.file_keys import PREFIX, file_key
from loraloom.lora.loadreport import LoadReport

#: A factor's key with the adapter's name inside, as it stands in a model's state dict.
_NAMED = re.compile(r"\.lora_[AB]\.([^.]+)\.weight$|\.lora_(?![AB]\.)\w+\.([^.]+)$")


def normalise(
    tensors: Mapping[str, Tensor], report: LoadReport, key_mapping: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Keys as PEFT writes them, whichever tool wrote these."""
    out: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    inside = _name_inside(tensors)
    for key, tensor in tensors.items():
        new = file_key(_without_name(key, inside).removeprefix(PREFIX))
        if not key.startswith(PREFIX):  # absent, or after what another tool put in front
            new = PREFIX + new.removeprefix(PREFIX).removeprefix(PREFIX)
        if key_mapping:
            new = PREFIX + _mapped(new.removeprefix(PREFIX), key_mapping)
        if ".original_module." in new:
            report.repeated.append(key)
            continue
        if new in out:
            raise AdapterError(f"{names[new]} and {key} are both read as {new}; leave one of them out")
        if new != key:
            report.renamed[key] = new
        out[new], names[new] = tensor, key
    for key in [key for key in out if ".modules_to_save." in key]:
        module, _, leaf = key.partition(".modules_to_save.")
        # The adapter's name may or may not stand between.
        for plain in (f"{module}.{leaf}", f"{module}.{leaf.partition('.')[2]}"):
            if plain in out and torch.equal(out[plain], out[key]):
                report.repeated.append(key)
                del out[key]
                break
    return out


def _mapped(name: str, key_mapping: Mapping[str, str]) -> str:
    for pattern, replacement in key_mapping.items():
        try:
            new, hits = re.subn(pattern, replacement, name)
        except re.error as error:
            raise ConfigError(f"key_mapping: {pattern!r} → {replacement!r} is no replacement ({error})") from None
        if hits:
            return new
    return name


def _name_inside(keys: Iterable[str]) -> str | None:
    """The adapter's name where every factor's key has it inside, and the same."""
    factors = [key for key in keys if ".lora_" in key]
    found = {(match[1] or match[2]) if (match := _NAMED.search(key)) else None for key in factors}
    return found.pop() if len(found) == 1 else None


def _without_name(key: str, name: str | None) -> str:
    if name is None:
        return key
    if ".lora_" in key:
        head, _, tail = key.rpartition(f".{name}")
        return head + tail
    return key.replace(f".modules_to_save.{name}.", ".")


def follow_renamings(model: nn.Module, tensors: dict[str, Tensor], modules: Iterable[str], report: LoadReport) -> None:
    """Rename what names no module of ``model`` as transformers renames it in older checkpoints of the base.

    Models in parts (Llava, Qwen2-VL, Gemma 3, ...) have changed the names of theirs, and adapters keep the older.
    """
    known = {file_key(name) for name in modules}
    lost = [key for key in tensors if not _places(key) & known]
    steps = _renamings(model) if lost else []
    for key in lost:
        name = key.removeprefix(PREFIX)
        for step in steps:
            name = step(name)
        new = PREFIX + name
        if new != key and new not in tensors and _places(new) & known:
            tensors[new] = tensors.pop(key)
            first = next((was for was, now in report.renamed.items() if now == key), key)
            report.renamed[first] = new


def _places(key: str) -> set[str]:
    """The modules that a tensor of this key may belong to."""
    module = key.partition(".lora_")[0] if ".lora_" in key else key.rpartition(".")[0]
    return {module, module.removesuffix(".base_layer")}


def _renamings(model: nn.Module) -> list[Callable[[str], str]]:
    """Name → name of today, in order: the model's own table (transformers 4), or that of transformers 5."""
    table = getattr(model, "_checkpoint_conversion_mapping", None)
    if isinstance(table, Mapping) and table:
        return [lambda name: _mapped(name, table)]
    if not hasattr(getattr(model, "config", None), "model_type"):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return []
    steps = get_model_conversion_mapping(model, add_legacy=False)
    return [_renaming(step) for step in steps if isinstance(step, WeightRenaming)]


def _renaming(step: Any) -> Callable[[str], str]:
    def rename(name: str) -> str:
        out: str = step.rename_source_key(name)[0]
        return out

    return rename
