"""Keys of an adapter's tensors in files and state dicts: PEFT's, and those that other tools and versions wrote.

Knows names and tensors, not files. ``LoadReport`` records which key was read as which.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from loraloom.errors import AdapterError, ConfigError
from loraloom.lora.parameters import LoraParameter

PREFIX = "base_model.model."
_BASE = ".base_layer"
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: A factor's key with the adapter's name inside, as it stands in a model's state dict.
_NAMED = re.compile(r"\.lora_[AB]\.([^.]+)\.weight$|\.lora_(?![AB]\.)\w+\.([^.]+)$")


@lru_cache(1 << 16)
def file_key(name: str) -> str:
    """PEFT's key for a tensor of the model: without the segments that torch.compile and FSDP put into names."""
    return PREFIX + _WRAPPERS.sub("", name)


def file_place(name: str) -> str:
    """PEFT's key for a module of the model."""
    return file_key(f"{name}.")[:-1]


def tensor_key(place: str, name: str) -> str:
    """PEFT's key for the tensor ``name`` (see ``LoraLayer.tensors``) of the target whose keys begin with ``place``."""
    return f"{place}.{name}.weight" if name in ("lora_A", "lora_B") else f"{place}.{name}"


def places(targets: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Names and kinds of an adapter's targets, in the model's order → the start of PEFT's keys for their tensors.

    PEFT puts one wrapper around a module for each adapted parameter of it, the first innermost; keys of inner wrappers
    have ``base_layer`` in them.
    """
    around = Counter(name.rpartition(".")[0] for name, kind in targets if kind == LoraParameter.kind)
    out, done = {}, Counter[str]()
    for name, kind in targets:
        owner = name.rpartition(".")[0] if kind == LoraParameter.kind else name
        done[owner] += kind == LoraParameter.kind
        place = (
            _inside(name, around) if owner == name else _inside(owner, around) + _BASE * (around[owner] - done[owner])
        )
        out[name] = file_place(place)
    return out


def _inside(name: str, around: Mapping[str, int]) -> str:
    """The name of a module below those that have wrappers around them."""
    if not around:
        return name
    out, path = "", ""
    for part in name.split("."):
        out += _BASE * around.get(path, 0) + ("." if path else "") + part
        path = f"{path}.{part}" if path else part
    return out


# -- what loading found and did ----------------------------------------------------------------------------------


@dataclass
class LoadReport:
    """What became of each tensor of a file. Keys are PEFT's."""

    used: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    #: key → (dtype in the file, dtype in the model)
    dtypes: dict[str, tuple[str, str]] = field(default_factory=dict)
    #: key in the file → key that it was read as
    renamed: dict[str, str] = field(default_factory=dict)
    #: repeats of other tensors and of the base's biases, which PEFT writes for bias="all"; left out
    repeated: list[str] = field(default_factory=list)
    #: embeddings of the base that the file carries along and that were put into the base, as PEFT does
    base_replaced: list[str] = field(default_factory=list)
    #: of modules that are never called, where an adapter does nothing; left out
    skipped: list[str] = field(default_factory=list)
    #: fields of ``adapter_config.json`` that were left out, and why
    notes: list[str] = field(default_factory=list)

    # PEFT's names for the two lists.
    @property
    def missing_keys(self) -> list[str]:
        return self.missing

    @property
    def unexpected_keys(self) -> list[str]:
        return self.unexpected

    def __str__(self) -> str:
        parts = [f"{len(self.used)} tensors used"]
        for words, entries in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("converted to another dtype", self.dtypes),
            ("renamed", self.renamed),
            ("repeated", self.repeated),
            ("put into the base", self.base_replaced),
            ("skipped, because the model never calls their modules", self.skipped),
        ):
            if entries:
                parts.append(f"{len(entries)} {words}")
        return ", ".join(parts)


# -- keys of other tools and versions ------------------------------------------------------------------------------


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
    """Rename keys that match no module of ``model`` as transformers renames them in older checkpoints of the base.

    Composite models (Llava, Qwen2-VL, Gemma 3, ...) have renamed their parts, and adapters may have the older names.
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
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    return [lambda name, step=step: step.rename_source_key(name)[0] for step in renamings]  # type: ignore[misc]
