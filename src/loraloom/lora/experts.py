"""Mixtures of experts whose experts are stacked in one parameter: what names mean there, and what stays unadapted.

Transformers 5 keeps the experts of a layer in two parameters, ``gate_up_proj`` and ``down_proj``, where version 4 had a
module for each expert's projection. PEFT (0.21) lets the old names mean the new parameters on the model types listed
here, and so does loraloom: on these, "gate_proj" is no longer the name of a module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvNd

from loraloom.config.lora import LoraConfig
from loraloom.errors import TargetError
from loraloom.lora.matching import matches_name, suffixes

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
class Experts:
    """Expert weights that an adapter leaves as they are: how many tensors, their numbers, the share of the model."""

    weights: int = 0
    parameters: int = 0
    share: float = 0.0
    #: the shortest names by which ``target_parameters`` means the stacked ones
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.weights:,} expert weights, {self.parameters:,} parameters, {100 * self.share:.1f} % of the model"


@dataclass
class Translation:
    """``target_modules`` where names mean parameters, and what came of it."""

    config: LoraConfig
    #: names of parameters that are adapted
    parameters: set[str] = field(default_factory=set)
    #: modules that have an expert's name, are none, and are left out
    left_out: list[str] = field(default_factory=list)


def parameter_names(modules: Mapping[str, nn.Module]) -> list[str]:
    """The names of all parameters, each with its module's name before it."""
    return [
        f"{name}.{key}" for name, module in modules.items() for key, p in module._parameters.items() if p is not None
    ]


def old_names(model_type: str | None, modules: Mapping[str, nn.Module]) -> list[str]:
    """The old names of projections that parameters of this model hold now."""
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
    patterns = [wanted] if isinstance(wanted, str) else wanted
    hits = {pattern: _hits(pattern, places, isinstance(wanted, str)) for pattern in patterns}
    named = {place for found in hits.values() for place in found}
    if not named:
        return Translation(config)
    _check_whole(table, places, named)
    of_pattern = {
        name: pattern for pattern in patterns for name in modules if _matches(pattern, name, isinstance(wanted, str))
    }
    left_out = [n for n, pattern in of_pattern.items() if hits[pattern] and n.rpartition(".")[2] in table]
    kept = [name for name in of_pattern if name not in left_out]
    parameters = {places[place] for place in named}
    rest: list[str] | str = [pattern for pattern in patterns if not hits[pattern]]
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
    """What each projection would be called as a module → the parameter that holds it."""
    return {
        f"{name[: -len(new) - 1]}.{old}": name
        for name in parameter_names(modules)
        for old, new in table.items()
        if matches_name(new, name)
    }


def _hits(pattern: str, places: Iterable[str], expression: bool) -> list[str]:
    if not expression:
        return [place for place in places if matches_name(pattern, place)]
    return [
        place
        for place in places
        if re.fullmatch(pattern, place) or re.fullmatch(pattern, re.sub(r"\.(\w+)$", r".0.\1", place))
    ]


def _matches(pattern: str, name: str, expression: bool) -> bool:
    return re.fullmatch(pattern, name) is not None if expression else matches_name(pattern, name)


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
