"""Which modules and parameters a config targets on a model. Strict: a pattern that matches nothing is an error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from loraloom.config.lora import LoraConfig
from loraloom.errors import TargetError
from loraloom.lora.base import Base, task_heads
from loraloom.lora.kinds import forward_of
from loraloom.lora.layer import LoraLayer
from loraloom.lora.layers import LoraLinear, is_never_called, layer_class
from loraloom.lora.matching import each, in_layers, layer_number, lies_in, matches_any, matches_name, suffixes
from loraloom.lora.parameters import LoraParameter, parameter_obstacle
from loraloom.lora.peft_targets import TYPES, Translation, old_names, parameter_names, refused_by_peft, translate
from loraloom.lora.presets import find_targets, weight_is_read

ALL_LINEAR = "all-linear"


class Chosen(NamedTuple):
    """A target: its name, its module's name, the name that patterns match, and the class that adapts it."""

    name: str
    module: str
    pattern_name: str
    cls: type[LoraLayer]


class Selection(NamedTuple):
    """``config`` with all names resolved, and its targets."""

    config: LoraConfig
    chosen: list[Chosen]
    #: named modules whose weight the model reads without calling them; not adapted
    idle: list[str]
    #: modules with the name of experts that are not experts; not adapted
    left_out: list[str]


def is_all_linear(wanted: object) -> bool:
    return isinstance(wanted, str) and wanted.lower() == ALL_LINEAR


def select(base: Base, config: LoraConfig, saved: list[str], strict: bool, literal: bool) -> Selection:
    """The modules and parameters that ``config`` adapts.

    Args:
        saved: names of modules that are trained in full.
        literal: take all names literally, as for an adapter that was written elsewhere.
    """
    modules, wanted = base.modules, config.target_modules
    inside_saved = {name for name in modules if lies_in(name, saved)}
    # A preset lists what models of a type may have, and "all-linear" what this one has: no match is no error.
    given = wanted is not None and not is_all_linear(wanted)
    literal, demanded = literal and given, config.target_parameters if strict else None
    config = config.copy(target_modules=_resolved(base, config, inside_saved))
    translation = Translation(config) if literal else translate(config, base.type, modules)
    config = translation.config
    excluded = _excluded(base, config, strict)
    names = _matches(base, config, strict and given, excluded, inside_saved)
    idle = [name for name in names if is_never_called(modules[name])]
    names = _adaptable(base, names, literal)
    spared = inside_saved if literal else inside_saved | excluded
    chosen = _chosen(modules, names, _parameters(base, config, demanded or (), literal, spared))
    left_out = translation.left_out
    if is_all_linear(wanted) and (table := TYPES.get(base.type or "", {})):
        adapted = {one.module for one in chosen} | inside_saved
        named = [n for n, m in modules.items() if n.rpartition(".")[2] in table and layer_class(m) is LoraLinear]
        left_out = [name for name in named if name not in adapted]
    return Selection(config, chosen, idle, left_out)


def _resolved(base: Base, config: LoraConfig, inside_saved: set[str]) -> list[str] | str:
    """``target_modules`` with "all-linear" and the model type's preset written out."""
    wanted, model, modules = config.target_modules, base.model, base.modules
    if is_all_linear(wanted):
        experts, table = old_names(base.type, modules), TYPES.get(base.type or "", {})
        left_out = base.output_heads(config) | inside_saved
        left_out |= {n for n in base.linear if refused_by_peft(base.type, n) or n.rpartition(".")[2] in table}
        left_out |= {name for name in base.linear if weight_is_read(model, modules, name)}
        chosen = suffixes([name for name in base.linear if name not in left_out], modules)
        return chosen if isinstance(chosen, str) else [*chosen, *experts]
    if wanted is not None:
        return wanted
    usual = base.usual
    if config.target_parameters and (base.type in TYPES or usual is None):
        return []
    if usual is not None:
        return usual
    heads = base.output_heads(config) | {name for name in modules if name in task_heads(config)}
    pointwise = [name for name, module in modules.items() if _is_pointwise(module)]
    names = find_targets(model, modules, base.linear, pointwise, heads | inside_saved)
    if not names:
        raise TargetError(
            f"target_modules: not given, {base.no_default}, and no attention or repeated linear layer was found in it; "
            f"{base.offer}"
        )
    return suffixes(names, modules)


def _is_pointwise(module: nn.Module) -> bool:
    # No subclasses: they may change the weight or the input first.
    return (
        type(module) in (nn.Conv1d, nn.Conv2d)
        and isinstance(module, nn.Conv1d | nn.Conv2d)
        and set(module.kernel_size) == {1}
        and module.groups == 1
    )


def _excluded(base: Base, config: LoraConfig, strict: bool) -> set[str]:
    names = [*base.modules, *(parameter_names(base.modules) if config.target_parameters else ())]
    for shown, pattern in each(config.exclude_modules) if strict else ():
        if not any(matches_any(pattern, name) for name in names):
            raise TargetError(f"exclude_modules: {shown!r} matches no module{base.closest(shown)}")
    return {name for name in base.modules if matches_any(config.exclude_modules, name)}


def _matches(base: Base, config: LoraConfig, strict: bool, excluded: set[str], inside_saved: set[str]) -> list[str]:
    modules, wanted = base.modules, config.target_modules or []
    matched = [name for name in modules if in_layers(name, config) and matches_any(wanted, name)]
    names = [name for name in matched if name not in excluded and name not in inside_saved]
    if strict:
        for shown, pattern in each(wanted):
            hits = {name for name in modules if matches_any(pattern, name)}
            if not hits:
                able = [name for name, module in modules.items() if layer_class(module)]
                raise TargetError(
                    f"target_modules: {shown!r} matches no module{base.closest(shown, able)}; {base.offer}"
                )
            if not hits & set(names):
                why = f"none is in layers_to_transform={config.layers_to_transform}"
                why = "modules_to_save trains all of them in full" if hits & inside_saved else why
                why = "exclude_modules takes all of them out" if hits & excluded else why
                raise TargetError(f"target_modules: {shown!r} matches {len(hits)} modules, but {why}")
        _check_layers(modules, config)
    elif wanted and not names and not config.target_parameters:
        elsewhere = sum(matches_any(wanted, name) for name in modules)
        if elsewhere and not matched:
            raise TargetError(
                f"layers_to_transform: none of the {elsewhere} modules that {wanted!r} matches is in the layers "
                f"{config.layers_to_transform}"
            )
        raise TargetError(f"target_modules: {wanted!r} matches no module; {base.offer}")
    return names


def _check_layers(modules: dict[str, nn.Module], config: LoraConfig) -> None:
    if not isinstance(config.layers_to_transform, list):
        return
    named = [name for name in modules if matches_any(config.target_modules, name)]
    named += [name for name in parameter_names(modules) if matches_any(config.target_parameters, name)]
    layers = sorted({number for name in named if (number := layer_number(name, config)) is not None})
    for index in config.layers_to_transform:
        if index not in layers:
            there = ", ".join(map(str, layers))
            raise TargetError(f"layers_to_transform: no targeted module is in layer {index}; their layers are {there}")


def _adaptable(base: Base, names: list[str], literal: bool) -> list[str]:
    """``names`` without modules on which an adapter would have no effect.

    Raises:
        TargetError: a module cannot be adapted, or none is left.
    """
    out = [name for name in names if not is_never_called(base.modules[name])]
    for name in out or names:
        module = base.modules[name]
        if not literal and refused_by_peft(base.type, name):
            raise TargetError(
                f"target_modules: {name} cannot be adapted, because the fused kernels of {base.type!r} read its "
                f"weight without calling it, and PEFT refuses it too; {base.offer}"
            )
        if layer_class(module) is not None:
            continue
        why = "; name layers of kind Linear, Conv1D, Embedding, Conv1d, Conv2d or Conv3d"
        if is_never_called(module):
            why = ", because the attention reads its weight without calling it"
        elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            why = f", because {forward_of(module).obstacle}"
            if isinstance(module, nn.Linear):
                why += f"; target_parameters=['{name}.weight'] adapts its weight"
        raise TargetError(
            f"target_modules: {name} is a {type(module).__name__}, which LoRA cannot wrap{why}; {base.offer}"
        )
    return out


def _parameters(base: Base, config: LoraConfig, demanded: Iterable[str], literal: bool, spared: set[str]) -> list[str]:
    """The parameters that ``target_parameters`` names, in the model's order.

    PEFT looks at ``exclude_modules`` and ``layers_to_transform`` for modules alone; here they hold for parameters too,
    unless ``literal``.
    """
    modules = base.modules
    there = parameter_names(modules)
    out: set[str] = set()
    for pattern in config.target_parameters or ():
        hits = [name for name in there if matches_name(pattern, name)]
        left = [name for name in hits if name.rpartition(".")[0] not in spared]
        if not literal:
            left = [n for n in left if in_layers(n, config) and not matches_any(config.exclude_modules, n)]
        if pattern in demanded and not left:
            why = f"matches {len(hits)} parameters, and all are left out" if hits else "matches no parameter"
            hint = " by exclude_modules, modules_to_save or layers_to_transform"
            if not hits:
                hint = base.closest(pattern, there, "parameter") or "; print(model) shows the modules that hold them"
            raise TargetError(f"target_parameters: {pattern!r} {why}{hint}")
        out.update(left)
    for name in out:
        module, _, key = name.rpartition(".")
        if (obstacle := parameter_obstacle(modules[module], key)) is not None:
            raise TargetError(f"target_parameters: {name} {obstacle}")
    return [name for name in there if name in out]


def _chosen(modules: dict[str, nn.Module], names: list[str], parameters: list[str]) -> list[Chosen]:
    """Modules and parameters as targets. The weight of a Linear is adapted as that Linear: the shapes are the same."""
    out = [Chosen(name, name, name, cls) for name in names if (cls := layer_class(modules[name])) is not None]
    for parameter in parameters:
        name, _, key = parameter.rpartition(".")
        if name in names:
            raise TargetError(
                f"target_parameters: {parameter} belongs to {name}, which target_modules adapts already; name one of "
                "them (target_modules=[] adapts parameters alone)"
            )
        if key == "weight" and layer_class(modules[name]) is LoraLinear and forward_of(modules[name]).is_map:
            out.append(Chosen(name, name, parameter, LoraLinear))
        else:
            out.append(Chosen(parameter, name, parameter, LoraParameter))
    return out
