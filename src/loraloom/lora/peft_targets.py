"""How PEFT (0.21) reads the targets of a config, computed from names alone; and a config that it reads as we do.

An adapter folder holds no list of the modules that it adapts: every reader resolves ``target_modules`` and
``target_parameters`` again. Where PEFT would find other modules, ranks or alphas, the names are written in full.

Transformers 5 keeps the experts of a layer in two parameters, ``gate_up_proj`` and ``down_proj``, where version 4 had a
module for each expert's projection. On the model types listed here PEFT lets the old names mean the new parameters, and
so does loraloom: there "gate_proj" is no longer the name of a module.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from loraloom.config.lora import LoraConfig
from loraloom.errors import TargetError
from loraloom.lora.matching import each, in_layers, matches_any, matches_name, rank_and_alpha, suffixes

#: Module names that PEFT refuses on these model types, because fused kernels read the weight and call no module.
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_NAMES = ("out_proj", "conv1d")


#: Old name → the end of the parameter's name that it means now.
_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN = {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
#: The parameter that holds two of the old ones, and so gets their ranks together.
FUSED = "gate_up_proj"
#: Model types on which PEFT 0.21 reads the old names so, with transformers 5.23.
TYPES: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(
        (
            *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
            *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
            *("longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text"),
            *("qwen3_omni_moe_thinker", "solar_open"),
        ),
        _QWEN,
    ),
}


@dataclass(frozen=True)
class PeftTarget:
    """A target as PEFT resolves it. ``name``: of a module, or of a parameter below its module."""

    name: str
    parameter: bool
    r: int
    alpha: float


def refused_by_peft(model_type: str | None, name: str) -> bool:
    """Whether PEFT raises on a module of this name."""
    return model_type in MAMBA_TYPES and name.rpartition(".")[2] in MAMBA_NAMES


def targets_in_peft(
    config: LoraConfig, model_type: str | None, modules: Mapping[str, nn.Module]
) -> set[PeftTarget] | None:
    """What PEFT would adapt by ``config``, or None where it would raise."""
    try:
        config = translate(config, model_type, modules).config
    except TargetError:
        return None
    if model_type in TYPES and isinstance(config.target_modules, str):
        return None  # by last names in any layer: PEFT drops the rest of the expression
    table = TYPES.get(model_type or "", {})
    if any(matches_name(old, pattern) for pattern in config.target_modules or () for old in table):
        return None  # PEFT takes these for experts
    names = [(name, False) for name in modules if _is_target(config, name)]
    wanted = config.target_parameters or ()
    names += [(name, True) for name in parameter_names(modules) if matches_any(wanted, name)]
    if any(refused_by_peft(model_type, name) for name, _ in names) or (config.fan_in_fan_out and wanted):
        return None
    return {PeftTarget(name, parameter, *rank_and_alpha(config, name)) for name, parameter in names}


def renamed_by_peft(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of ``names`` whose tensors PEFT looks for under other keys.

    PEFT renames the keys of every adapter as transformers renames those of old checkpoints, old or not. The renamings
    are transformers'; none apply before it is imported.
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


def config_for_peft(
    config: LoraConfig, model_type: str | None, modules: Mapping[str, nn.Module], wanted: Sequence[PeftTarget]
) -> tuple[LoraConfig, tuple[str, ...]]:
    """A config by which PEFT adapts exactly ``wanted``, and the names for which no config does.

    ``config`` itself if PEFT reads it so. A Linear's weight may be wanted as a parameter or as a module.
    """
    if targets_in_peft(config, model_type, modules) == set(wanted):
        return config, ()
    table = TYPES.get(model_type or "", {})
    exact = [
        PeftTarget(f"{one.name}.weight", True, one.r, one.alpha)
        if not one.parameter and one.name.rpartition(".")[2] in table and isinstance(modules[one.name], nn.Linear)
        else one
        for one in wanted
    ]
    names = [one.name for one in exact if not one.parameter]
    parameters = [one.name for one in exact if one.parameter]
    changes: dict[str, object] = {}
    if isinstance(config.target_modules, str) or set(names) != {one.name for one in wanted if not one.parameter}:
        changes |= {"layers_to_transform": None, "layers_pattern": None}
    excluded = None if any(matches_any(config.exclude_modules, name) for name in names) else config.exclude_modules
    changed = config.copy(
        target_modules=names if table else suffixes(names, modules),
        target_parameters=parameters or None,
        exclude_modules=excluded,
        rank_pattern={one.name: one.r for one in exact if one.r != config.r},
        alpha_pattern={one.name: one.alpha for one in exact if one.alpha != config.lora_alpha},
        **changes,
    )
    reads = targets_in_peft(changed, model_type, modules)
    if reads == set(exact):
        return changed, ()
    other = {one.name for one in exact} if reads is None else {one.name for one in set(exact) ^ reads}
    if reads is None:
        other = {name for name in other if refused_by_peft(model_type, name)} or other
    return config, tuple(sorted(other))


# -- experts that are stacked in one parameter --------------------------------------------------------------------


@dataclass(frozen=True)
class Experts:
    """Expert weights that an adapter does not adapt: tensors, parameters in them, their share of the model."""

    weights: int = 0
    parameters: int = 0
    share: float = 0.0
    #: the shortest names by which ``target_parameters`` means the stacked ones
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.weights:,} expert weights, {self.parameters:,} parameters, {100 * self.share:.1f} % of the model"


@dataclass
class Translation:
    """A config in which the old names of experts are replaced by their parameters."""

    config: LoraConfig
    #: names of parameters that are adapted
    parameters: set[str] = field(default_factory=set)
    #: modules that have an expert's name without being one; not adapted
    left_out: list[str] = field(default_factory=list)


def parameter_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of all parameters, each with its module's name before it."""
    return [
        f"{name}.{key}" for name, module in modules.items() for key, p in module._parameters.items() if p is not None
    ]


def old_names(model_type: str | None, modules: Mapping[str, nn.Module]) -> list[str]:
    """The old names of the projections that stacked parameters of this model hold."""
    places = _places(TYPES.get(model_type or "", {}), modules)
    return sorted({place.rpartition(".")[2] for place in places})


def translate(config: LoraConfig, model_type: str | None, modules: Mapping[str, nn.Module]) -> Translation:
    """``config`` with the names of experts in ``target_modules`` moved to ``target_parameters``.

    A bare name ("gate_proj") means the experts and no module that is called so too, as in PEFT. A longer one, or an
    expression, means experts where it matches their place, and modules elsewhere.

    Raises:
        TargetError: one of two projections that are one parameter now is named alone.
    """
    table = TYPES.get(model_type or "")
    wanted = config.target_modules
    if table is None or not wanted:
        return Translation(config)
    places = _places(table, modules)
    hits = {shown: [place for place in places if _means(pattern, place)] for shown, pattern in each(wanted)}
    named = {place for found in hits.values() for place in found}
    if not named:
        return Translation(config)
    _check_whole(table, places, named)
    of_pattern = {name: shown for shown, pattern in each(wanted) for name in modules if matches_any(pattern, name)}
    left_out = [n for n, pattern in of_pattern.items() if hits[pattern] and n.rpartition(".")[2] in table]
    kept = [name for name in of_pattern if name not in left_out]
    parameters = {places[place] for place in named}
    rest: list[str] | str = [pattern for pattern, found in hits.items() if not found]
    if isinstance(wanted, str) and kept:
        rest = suffixes(kept, modules)
    changes: dict[str, object] = {}
    if any(matches_name(FUSED, name) for name in parameters):
        key, times = rf".*\.{FUSED}", sum(new == FUSED for new in table.values())
        changes["rank_pattern"] = {**config.rank_pattern, key: config.r * times}
        changes["alpha_pattern"] = {**config.alpha_pattern, key: config.lora_alpha * times}
    ours = suffixes(parameters, parameter_names(modules))
    given = [*(config.target_parameters or []), *(sorted(parameters) if isinstance(ours, str) else ours)]
    owners = {name.rpartition(".")[0] for name in parameters}  # a Linear's weight may be among them
    return Translation(
        config.copy(target_modules=rest, target_parameters=list(dict.fromkeys(given)), **changes),
        parameters,
        [name for name in left_out if name not in owners],
    )


def _places(table: Mapping[str, str], modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """The name that each projection had as a module → the parameter that holds it."""
    return {
        f"{name[: -len(new) - 1]}.{old}": name
        for name in parameter_names(modules)
        for old, new in table.items()
        if matches_name(new, name)
    }


def _means(pattern: list[str] | str, place: str) -> bool:
    """Whether a pattern of ``target_modules`` means the experts' projection ``place``. An expression may count them."""
    numbered = re.sub(r"\.(\w+)$", r".0.\1", place)
    return matches_any(pattern, place) or (isinstance(pattern, str) and matches_any(pattern, numbered))


def _check_whole(table: Mapping[str, str], places: Mapping[str, str], named: set[str]) -> None:
    both = [old for old, new in table.items() if new == FUSED]
    for place in sorted(named):
        name, old = place.rpartition(".")[0], place.rpartition(".")[2]
        missing = [other for other in both if f"{name}.{other}" not in named]
        if old in both and missing:
            raise TargetError(
                f"target_modules: {old!r} and {missing[0]!r} are one parameter of this model, {places[place]}; name "
                f"both, or target_parameters=[{FUSED!r}]"
            )


def stacked(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The weights of experts by name: stacks of matrices, and those of experts that are modules of their own."""
    found = {}
    for name, module in modules.items():
        parts = name.split(".")
        inside = "experts" in parts and "router" not in parts
        for key, p in module._parameters.items():
            if p is None or p.dim() < 2 or key.endswith("bias") or isinstance(module, _ConvNd):
                continue
            if inside or (p.dim() == 3 and "Expert" in type(module).__name__):
                found[f"{name}.{key}"] = p
    return found


def unadapted(modules: Mapping[str, nn.Module], adapted: Iterable[str], total: int) -> Experts:
    """The expert weights that are not among ``adapted`` (names of modules and parameters)."""
    there, done = stacked(modules), set(adapted)
    left = {name: p for name, p in there.items() if not {name, name.rpartition(".")[0]} & done}
    count = sum(p.numel() for p in {id(p): p for p in left.values()}.values())
    stacks = suffixes([name for name, p in left.items() if p.dim() == 3], parameter_names(modules))
    return Experts(len(left), count, count / max(total, 1), () if isinstance(stacks, str) else tuple(stacks))
