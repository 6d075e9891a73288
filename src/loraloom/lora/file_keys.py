"""PEFT's keys for what a model calls otherwise: the tensors of an adapter in files and state dicts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

from loraloom.lora.parameters import LoraParameter

PREFIX = "base_model.model."
_BASE = ".base_layer"
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@lru_cache(1 << 16)
def file_key(name: str) -> str:
    """PEFT's key for a tensor of the model: without the segments that torch.compile and FSDP put into names."""
    return PREFIX + _WRAPPERS.sub("", name)


def file_place(name: str) -> str:
    """PEFT's key for a module of the model."""
    return file_key(f"{name}.")[:-1]


def tensor_key(place: str, name: str) -> str:
    """PEFT's key for the tensor ``name`` (see ``LoraLayer.tensors``) of the target that lies in a file at ``place``."""
    return f"{place}.{name}.weight" if name in ("lora_A", "lora_B") else f"{place}.{name}"


def places(targets: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Names and kinds of an adapter's targets, in the model's order → where PEFT has their tensors in a file.

    PEFT puts a wrapper around a module for each of its parameters, the first innermost. What lies further in is under
    ``base_layer``.
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
