"""How PEFT (0.21) reads a config on a model, computed from names alone; and a config that it reads as we do.

An adapter folder holds no list of the modules that it adapts: whoever reads it resolves ``target_modules`` and
``target_parameters`` for himself. Where PEFT would come to other modules, ranks or alphas, the names are written in
full.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from loraloom.config.lora import LoraConfig
from loraloom.errors import TargetError
from loraloom.lora.experts import TYPES, parameter_names, translate
from loraloom.lora.matching import in_layers, matches_any, matches_name, rank_and_alpha, suffixes

#: Module names that PEFT refuses on these model types, because fused kernels read the weight and call no module.
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_NAMES = ("out_proj", "conv1d")


@dataclass(frozen=True)
class Read:
    """One adapted thing as PEFT sees it: ``name`` is that of a module, or of a parameter with its module's before."""

    name: str
    parameter: bool
    r: int
    alpha: float


def refused(model_type: str | None, name: str) -> bool:
    """Whether PEFT raises on a module of this name."""
    return model_type in MAMBA_TYPES and name.rpartition(".")[2] in MAMBA_NAMES


def peft_reads(config: LoraConfig, model_type: str | None, modules: Mapping[str, nn.Module]) -> set[Read] | None:
    """What PEFT would adapt by ``config``, or None where it would raise."""
    try:
        config = translate(config, model_type, modules).config
    except TargetError:
        return None
    if model_type in TYPES and isinstance(config.target_modules, str):
        return None  # by last names in any layer: PEFT drops the rest of the expression
    table = TYPES.get(model_type or "", {})
    if any(matches_name(old, pattern) for pattern in config.target_modules or () for old in table):
        return None  # taken for experts
    names = [(name, False) for name in modules if _is_target(config, name)]
    wanted = config.target_parameters or ()
    names += [(name, True) for name in parameter_names(modules) if matches_any(wanted, name)]
    if any(refused(model_type, name) for name, _ in names) or (config.fan_in_fan_out and wanted):
        return None
    return {Read(name, parameter, *rank_and_alpha(config, name)) for name, parameter in names}


def misread(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of ``names`` whose tensors PEFT looks for elsewhere.

    It renames the keys of every adapter as transformers renames those of old checkpoints, and does not ask whether
    they are old. The renamings are transformers' own; without it loaded there are none.
    """
    conversions: Any = sys.modules.get("transformers.conversion_mapping")
    loading: Any = sys.modules.get("transformers.core_model_loading")
    if conversions is None or loading is None or not hasattr(model, "config"):
        return []
    try:
        if conversions.get_checkpoint_conversion_mapping(getattr(model.config, "model_type", None)) is None:
            return []
        steps = [s for s in conversions.get_model_conversion_mapping(model) if isinstance(s, loading.WeightRenaming)]
        new = {name: loading.rename_source_key(f"{name}.lora_A.weight", steps, [])[0] for name in names}
    except (AttributeError, TypeError, ValueError):  # another version's names for these
        return []
    return [name for name, key in new.items() if not f"{name}.lora_A.weight".endswith(key)]


def _is_target(config: LoraConfig, name: str) -> bool:
    saved = config.modules_to_save or ()
    if matches_any(config.exclude_modules, name) or any(re.match(rf"(^|.*\.){s}($|\..*)", name) for s in saved):
        return False
    wanted = config.target_modules or ()
    if isinstance(wanted, str) or name in wanted:
        return matches_any(wanted, name)
    return matches_any(wanted, name) and (not config.layers_to_transform or in_layers(name, config))


def as_peft_reads(
    config: LoraConfig, model_type: str | None, modules: Mapping[str, nn.Module], wanted: Sequence[Read]
) -> tuple[LoraConfig, tuple[str, ...]]:
    """A config by which PEFT adapts ``wanted`` and no more, and the names for which there is none.

    ``config`` itself if that does. ``wanted``: a Linear's weight may be wanted as a parameter or as a module.
    """
    if peft_reads(config, model_type, modules) == set(wanted):
        return config, ()
    table = TYPES.get(model_type or "", {})
    exact = [
        Read(f"{one.name}.weight", True, one.r, one.alpha)
        if not one.parameter and one.name.rpartition(".")[2] in table and isinstance(modules[one.name], nn.Linear)
        else one
        for one in wanted
    ]
    names = [one.name for one in exact if not one.parameter]
    parameters = [one.name for one in exact if one.parameter]
    changes: dict[str, object] = {}
    if isinstance(config.target_modules, str) or set(names) != {one.name for one in wanted if not one.parameter}:
        changes |= {"layers_to_transform": None, "layers_pattern": None}
    changed = config.copy(
        target_modules=names if table else suffixes(names, modules),
        target_parameters=parameters or None,
        exclude_modules=config.exclude_modules if matches_none(config, names) else None,
        rank_pattern={one.name: one.r for one in exact if one.r != config.r},
        alpha_pattern={one.name: one.alpha for one in exact if one.alpha != config.lora_alpha},
        **changes,
    )
    reads = peft_reads(changed, model_type, modules)
    if reads == set(exact):
        return changed, ()
    other = {one.name for one in exact} if reads is None else {one.name for one in set(exact) ^ reads}
    if reads is None:
        other = {name for name in other if refused(model_type, name)} or other
    return config, tuple(sorted(other))


def matches_none(config: LoraConfig, names: Sequence[str]) -> bool:
    """Whether ``exclude_modules`` leaves all of ``names``."""
    return not any(matches_any(config.exclude_modules, name) for name in names)
