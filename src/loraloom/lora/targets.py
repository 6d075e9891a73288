"""From a config and a model to a ``Plan``: which modules get which rank, alpha and scale, and what that costs.

Nothing here touches the model. Strict: a pattern that matches nothing is an error that names the closest match.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from loraloom.config.lora import TASK_HEADS, LoraConfig
from loraloom.errors import TargetError, some
from loraloom.lora.experts import TYPES, Experts, Translation, old_names, parameter_names, translate, unadapted
from loraloom.lora.expressions import check_expressions
from loraloom.lora.frozen import adapter_dtype, frozen_linear
from loraloom.lora.kinds import forward_of, is_map
from loraloom.lora.layer import LoraLayer
from loraloom.lora.layers import LoraConv, LoraConv1D, LoraLinear, is_never_called, layer_class
from loraloom.lora.matching import (
    ends_as,
    in_layers,
    layer_number,
    matches_any,
    matches_name,
    pattern_key,
    rank_and_alpha,
    suffixes,
)
from loraloom.lora.modules_to_save import unwrap
from loraloom.lora.parameters import LoraParameter, parameter_obstacle
from loraloom.lora.peft_targets import Read, as_peft_reads, misread, refused
from loraloom.lora.presets import found, preset, weight_is_read
from loraloom.lora.variants import variant_of
from loraloom.lora.variants.base import Shapes

ALL_LINEAR = "all-linear"
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass(frozen=True)
class Target:
    """One module that would be adapted. ``parameters`` counts A and B; ``bytes`` is what they take in memory."""

    name: str
    kind: str
    r: int
    alpha: float
    scale: float
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Extra:
    """Something trained in full beside the factors: a module, or one bias."""

    name: str
    kind: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What an adapter would be on a model. ``str(plan)`` is the table that a person reads."""

    config: LoraConfig
    targets: tuple[Target, ...]
    saved: tuple[Extra, ...]
    biases: tuple[Extra, ...]
    base_parameters: int
    base_bytes: int
    #: what was decided for the user, who may want otherwise; "" where nothing was
    note: str = ""
    #: expert weights that stay as they are
    experts: Experts = field(default_factory=Experts)
    #: sentences on what is left out or does not apply
    notes: tuple[str, ...] = ()
    #: names that no config makes PEFT read as we do; a folder with them is not for PEFT
    unreadable: tuple[str, ...] = ()
    #: modules that were named and whose weight the model reads without calling them
    idle: tuple[str, ...] = ()

    @property
    def rows(self) -> list[Target | Extra]:
        return [*self.targets, *self.saved, *self.biases]

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def __str__(self) -> str:
        head = ("module", "kind", "r", "alpha", "scale", "parameters", "bytes")
        rows = [
            (t.name, t.kind, str(t.r), f"{t.alpha:g}", f"{t.scale:g}", f"{t.parameters:,}", f"{t.bytes:,}")
            for t in self.targets
        ]
        rows += [(e.name, e.kind, "", "", "", f"{e.parameters:,}", f"{e.bytes:,}") for e in (*self.saved, *self.biases)]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in [head, *rows]
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        share = 100 * self.parameters / max(self.base_parameters + self.parameters, 1)
        lines.append(
            f"total: {len(self.targets)} modules adapted, {len(self.saved)} trained in full, "
            f"{len(self.biases)} biases; "
            f"{self.parameters:,} of {self.base_parameters + self.parameters:,} parameters train ({share:.4f}%), "
            f"{self.bytes:,} bytes beside a base of {self.base_bytes:,}"
        )
        lines += [*([self.note] if self.note else []), *self.notes]
        if self.experts.weights:
            lines.append(f"not adapted: {self.experts}")
        return "\n".join(lines)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules as they were before any adapter: wrappers are looked through. Each module once."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        module = unwrap(module)
        if id(module) in seen:
            continue
        seen.add(id(module))
        if name:
            yield name, module
        children = [
            (f"{name}.{key}" if name else key, child) for key, child in module._modules.items() if child is not None
        ]
        stack.extend(reversed(children))


def plan(
    model: nn.Module,
    config: LoraConfig,
    *,
    strict: bool = True,
    autocast_adapter_dtype: bool = True,
    follow_ties: bool = True,
) -> Plan:
    """What ``get_peft_model(model, config)`` would adapt and train, without touching ``model``.

    Args:
        strict: a pattern in ``target_modules``, ``exclude_modules``, ``modules_to_save``, ``rank_pattern`` or
            ``alpha_pattern`` that matches nothing is an error; False turns that off.
        autocast_adapter_dtype: factors of a half-precision base are kept in float32.
        follow_ties: a module that shares its weight with one in ``modules_to_save`` is trained with it, as one
            tensor, and the names of experts mean the parameters that hold them now. False takes all names to the
            letter, as for an adapter that was written elsewhere.

    Raises:
        TargetError: a pattern matches nothing, or a module that cannot carry LoRA; nothing would be trained.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    return plan_on(model, dict(base_modules(model)), config, strict, autocast_adapter_dtype, follow_ties)


def plan_on(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: LoraConfig,
    strict: bool,
    autocast_adapter_dtype: bool,
    follow_ties: bool,
) -> Plan:
    """``plan`` for a model whose ``base_modules`` are known already."""
    check_expressions(config, modules)
    saved = _saved_modules(modules, config, strict, follow_ties)
    inside_saved = {name for name in modules if any(name == s or name.startswith(s + ".") for s in saved)}
    # A preset names what models of a type may have, and "all-linear" what this one has: neither is a demand.
    given = config.target_modules is not None and not _is_all_linear(config.target_modules)
    wanted = config.target_modules
    literal, demanded = not follow_ties and given, config.target_parameters if strict else None
    model_type = _model_type(model)
    config = config.copy(
        target_modules=_resolve(model, modules, config, inside_saved),
        modules_to_save=_names_of_saved(config, saved),
    )
    translation = Translation(config) if literal else translate(config, model_type, modules)
    config = translation.config
    excluded = _excluded(modules, config, strict)
    names = _matches(modules, config, strict and given, excluded, inside_saved)
    idle = [name for name in names if is_never_called(modules[name])]
    names = _adaptable(modules, names, None if literal else model_type)
    spared = inside_saved if literal else inside_saved | excluded
    chosen = _chosen(modules, names, _parameters(modules, config, demanded or (), literal, spared))

    left_out = translation.left_out
    if _is_all_linear(wanted) and (table := TYPES.get(model_type or "", {})):
        adapted = {one.module for one in chosen}
        named = [n for n, m in modules.items() if n.rpartition(".")[2] in table and layer_class(m) is LoraLinear]
        left_out = [n for n in named if n not in adapted and n not in inside_saved]
    targets, reads = [], []
    for one in chosen:
        module = modules[one.module]
        r, alpha = rank_and_alpha(config, one.pattern_name)
        parameters = sum(math.prod(shape) for shape in _shapes(one, module, r, config).values())
        size = adapter_itemsize(module, autocast_adapter_dtype)
        scale = config.scale(r, alpha)
        targets.append(Target(one.name, _kind(module, one.cls), r, alpha, scale, parameters, parameters * size))
        reads.append(Read(one.pattern_name, one.pattern_name != one.module, r, alpha))
    if strict:
        _check_pattern_keys(config, [one.pattern_name for one in chosen])

    patterned = [one.pattern_name for one in chosen]
    config = config.copy(
        rank_pattern=_order_free(config.rank_pattern, patterned),
        alpha_pattern=_order_free(config.alpha_pattern, patterned),
        fan_in_fan_out=any(target.kind == LoraConv1D.kind for target in targets),
    )
    config, unreadable = as_peft_reads(config, model_type, modules, reads)
    unreadable = tuple(dict.fromkeys([*unreadable, *misread(model, [one.module for one in chosen])]))
    extras = tuple(_extras(modules, saved, autocast_adapter_dtype))
    biases = tuple(_biases(modules, config, {t.name for t in targets}, inside_saved))
    if not (targets or extras or biases):
        raise TargetError("target_modules: nothing would be trained; " + _offer(modules))
    total, size = _base_size(modules)
    return Plan(
        config,
        tuple(targets),
        extras,
        biases,
        total,
        size,
        _note(model, modules, wanted, config.target_modules),
        unadapted(modules, [t.name for t in targets] + [*inside_saved], total),
        tuple(_notes(config, targets, left_out, idle, unreadable)),
        unreadable,
        tuple(idle),
    )


def _note(model: nn.Module, modules: dict[str, nn.Module], wanted: object, targets: list[str] | str | None) -> str:
    """That the targets were found in the model, for nobody chose them."""
    if wanted is not None or not targets or _usual(model, modules) is not None:
        return ""
    listed = ", ".join(targets) if isinstance(targets, list) else targets
    return (
        f"target_modules: not given, and {_no_default(model)}: {listed} were found in the model; "
        "give target_modules to adapt others"
    )


class _Chosen(NamedTuple):
    """What is adapted: the target's name, its module's, the name that patterns match, and the class that adapts it."""

    name: str
    module: str
    pattern_name: str
    cls: type[LoraLayer]


def _chosen(modules: dict[str, nn.Module], names: list[str], parameters: list[str]) -> list[_Chosen]:
    """Modules and parameters as targets. The weight of a Linear is adapted as that Linear: the shapes are the same."""
    out = []
    for name in names:
        cls = layer_class(modules[name])
        assert cls is not None
        out.append(_Chosen(name, name, name, cls))
    for parameter in parameters:
        name, _, key = parameter.rpartition(".")
        if name in names:
            raise TargetError(
                f"target_parameters: {parameter} belongs to {name}, which target_modules adapts already; name one of "
                "them (target_modules=[] adapts parameters alone)"
            )
        module = modules[name]
        if key == "weight" and layer_class(module) is LoraLinear and is_map(module):
            out.append(_Chosen(name, name, parameter, LoraLinear))
        else:
            out.append(_Chosen(parameter, name, parameter, LoraParameter))
    return out


def _shapes(one: _Chosen, module: nn.Module, r: int, config: LoraConfig) -> Shapes:
    """The shapes of a slot's tensors around ``module``."""
    if issubclass(one.cls, LoraConv) and r % module.groups:  # type: ignore[operator]
        raise TargetError(
            f"r: {one.name} is a convolution with groups={module.groups}, so its rank must be a multiple of that, "
            f"found {r}; set rank_pattern={{{one.name!r}: ...}} or leave the module out"
        )
    variant = variant_of(config)
    if variant.kinds and one.cls.kind not in variant.kinds:
        raise TargetError(
            f"target_modules: {one.name} is a {_kind(module, one.cls)}, which {variant.name} cannot adapt; name layers "
            f"of kind {', '.join(variant.kinds)}"
        )
    return variant.shapes(one.cls.shapes(module, r, one.name))


def _notes(
    config: LoraConfig, targets: list[Target], left_out: list[str], idle: list[str], unreadable: Sequence[str]
) -> Iterator[str]:
    """What a reader of the plan should know and would not expect."""
    if config.lora_dropout and (count := sum(target.kind == LoraParameter.kind for target in targets)):
        yield f"lora_dropout does not reach {count} of the targets: experts and other parameters are adapted in place"
    if left_out:
        yield (
            f"left out, as in PEFT: {some(left_out)}, called as the experts were before they became parameters; name "
            "them in full to adapt them"
        )
    if idle:
        yield f"left out: {some(idle)}, whose weight the model reads without calling it, so an adapter does nothing"
    if unreadable:
        yield f"PEFT would not find {some(unreadable)} in a folder with this adapter; loraloom does"


def adapter_itemsize(module: nn.Module, autocast_adapter_dtype: bool) -> int:
    """Bytes of one adapter number beside ``module``: float32 for a half-precision base, else the base's own."""
    if layer_class(module) in (LoraLinear, LoraConv1D):
        return adapter_dtype(frozen_linear(module).dtype, autocast_adapter_dtype).itemsize
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    return 4 if weight is None else adapter_dtype(weight.dtype, autocast_adapter_dtype).itemsize


def _kind(module: nn.Module, cls: type[LoraLayer]) -> str:
    return type(module).__name__ if issubclass(cls, LoraConv) else cls.kind


def _base_size(modules: dict[str, nn.Module]) -> tuple[int, int]:
    """Numbers and bytes of the base, tied weights once and quantised ones as stored."""
    sizes = {id(p): (p.numel(), p.nbytes) for m in modules.values() for p in m._parameters.values() if p is not None}
    for module in modules.values():
        if layer_class(module) in (LoraLinear, LoraConv1D):
            linear = frozen_linear(module)
            sizes[id(module._parameters.get("weight", module))] = (math.prod(linear.shape), linear.nbytes)
    return sum(count for count, _ in sizes.values()), sum(size for _, size in sizes.values())


# -- matching -----------------------------------------------------------------------------------------------------


def _is_all_linear(wanted: object) -> bool:
    return isinstance(wanted, str) and wanted.lower() == ALL_LINEAR


def _resolve(
    model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig, inside_saved: set[str]
) -> list[str] | str:
    """``target_modules`` with "all-linear" and the model type's preset written out."""
    wanted = config.target_modules
    model_type = _model_type(model)
    if _is_all_linear(wanted):
        linear = [name for name, m in modules.items() if layer_class(m) in (LoraLinear, LoraConv1D)]
        experts, table = old_names(model_type, modules), TYPES.get(model_type or "", {})
        left_out = _output_heads(model, modules, config) | inside_saved
        left_out |= {name for name in linear if refused(model_type, name) or name.rpartition(".")[2] in table}
        left_out |= {name for name in linear if weight_is_read(model, modules, name)}
        chosen = suffixes([name for name in linear if name not in left_out], modules)
        return chosen if isinstance(chosen, str) else [*chosen, *experts]
    if wanted is not None:
        return wanted
    if config.target_parameters and (model_type in TYPES or _usual(model, modules) is None):
        return []
    usual = _usual(model, modules)
    if usual is not None:
        return usual
    heads = _output_heads(model, modules, config) | {name for name in modules if name in _task_heads(config)}
    return suffixes(_found(model, modules, heads | inside_saved), modules)


def _usual(model: nn.Module, modules: dict[str, nn.Module]) -> list[str] | str | None:
    """The default of the model's type, where it matches something in this model."""
    usual = preset(_model_type(model))
    if usual is None or not any(matches_any(usual, name) for name in modules):
        return None
    return usual if isinstance(usual, str) else list(usual)


def _found(model: nn.Module, modules: dict[str, nn.Module], heads: set[str]) -> list[str]:
    """The targets of a model type for which there is no default."""
    linear = [name for name, module in modules.items() if layer_class(module) in (LoraLinear, LoraConv1D)]
    pointwise = [name for name, module in modules.items() if _is_pointwise(module)]
    names = found(model, modules, linear, pointwise, heads)
    if not names:
        raise TargetError(
            f"target_modules: not given, {_no_default(model)}, and no attention or repeated linear layer was found in "
            f"it; {_offer(modules)}"
        )
    return names


def _is_pointwise(module: nn.Module) -> bool:
    # Of these classes themselves: one made of them may change its weight, or its input, before it is used.
    return (
        type(module) in (nn.Conv1d, nn.Conv2d)
        and isinstance(module, nn.Conv1d | nn.Conv2d)
        and set(module.kernel_size) == {1}
        and module.groups == 1
    )


def _no_default(model: nn.Module) -> str:
    model_type = _model_type(model)
    return f"model type {model_type!r} has no preset" if model_type else "this model has no model type"


def _model_type(model: nn.Module) -> str | None:
    config = getattr(model, "config", None)
    found = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return found if isinstance(found, str) else None


def _output_heads(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> set[str]:
    """The output layer that "all-linear" leaves out: the language-model head, or the classifier."""
    get = getattr(model, "get_output_embeddings", None)
    head = unwrap(out) if get is not None and (out := get()) is not None else None
    if head is not None:
        return {name for name, module in modules.items() if module is head}
    return {name for name in modules if name in _task_heads(config)}


def _excluded(modules: dict[str, nn.Module], config: LoraConfig, strict: bool) -> set[str]:
    patterns = config.exclude_modules
    if strict:
        names = [*modules, *(parameter_names(modules) if config.target_parameters else ())]
        for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
            if not any(matches_any(patterns if isinstance(patterns, str) else [pattern], name) for name in names):
                raise TargetError(f"exclude_modules: {pattern!r} matches no module{_closest(pattern, modules)}")
    return {name for name in modules if matches_any(patterns, name)}


def _matches(
    modules: dict[str, nn.Module],
    config: LoraConfig,
    strict: bool,
    excluded: set[str],
    inside_saved: set[str],
) -> list[str]:
    wanted = config.target_modules or []
    placed = [name for name in modules if in_layers(name, config)]
    matched = [name for name in placed if matches_any(wanted, name)]
    names = [name for name in matched if name not in excluded and name not in inside_saved]
    if strict:
        for pattern in [wanted] if isinstance(wanted, str) else wanted:
            hits = [n for n in modules if matches_any(wanted if isinstance(wanted, str) else [pattern], n)]
            if not hits:
                able = {name: module for name, module in modules.items() if layer_class(module)}
                raise TargetError(
                    f"target_modules: {pattern!r} matches no module{_closest(pattern, able)}; {_offer(modules)}"
                )
            if not set(hits) & set(names):
                why = (
                    "exclude_modules takes all of them out"
                    if set(hits) & excluded
                    else "modules_to_save trains all of them in full"
                    if set(hits) & inside_saved
                    else f"none is in layers_to_transform={config.layers_to_transform}"
                )
                raise TargetError(f"target_modules: {pattern!r} matches {len(hits)} modules, but {why}")
        _check_layers(modules, config)
    elif wanted and not names and not config.target_parameters:
        elsewhere = sum(matches_any(wanted, name) for name in modules)
        if elsewhere and not matched:
            raise TargetError(
                f"layers_to_transform: none of the {elsewhere} modules that {wanted!r} matches is in the layers "
                f"{config.layers_to_transform}"
            )
        raise TargetError(f"target_modules: {wanted!r} matches no module; {_offer(modules)}")
    return names


def _adaptable(modules: dict[str, nn.Module], names: list[str], model_type: str | None) -> list[str]:
    """``names`` without those whose adapter would do nothing.

    Raises:
        TargetError: one of another kind, or one whose forward leaves no place for an update; or none is left.
    """
    out = [name for name in names if not is_never_called(modules[name])]
    if names and not out:
        raise TargetError(
            f"target_modules: {names[0]} is a {type(modules[names[0]]).__name__}, which LoRA cannot wrap, because the "
            f"attention reads its weight without calling it; {_offer(modules)}"
        )
    for name in out:
        module = modules[name]
        if refused(model_type, name):
            raise TargetError(
                f"target_modules: {name} cannot be adapted, because the fused kernels of {model_type!r} read its "
                f"weight without calling it, and PEFT refuses it too; {_offer(modules)}"
            )
        if layer_class(module) is not None:
            continue
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            offer = f"; target_parameters=['{name}.weight'] adapts its weight" if isinstance(module, nn.Linear) else ""
            raise TargetError(
                f"target_modules: {name} is a {type(module).__name__}, which LoRA cannot wrap, because "
                f"{forward_of(module).obstacle}{offer}; {_offer(modules)}"
            )
        raise TargetError(
            f"target_modules: {name} is a {type(module).__name__}, which LoRA cannot wrap; "
            f"name layers of kind Linear, Conv1D, Embedding, Conv1d, Conv2d or Conv3d; {_offer(modules)}"
        )
    return out


def _parameters(
    modules: dict[str, nn.Module], config: LoraConfig, demanded: Iterable[str], literal: bool, spared: set[str]
) -> list[str]:
    """The parameters that ``target_parameters`` names, in the model's order.

    PEFT looks at ``exclude_modules`` and ``layers_to_transform`` for modules alone; here they hold for parameters too,
    unless ``literal``.
    """
    there = parameter_names(modules)
    out: set[str] = set()
    for pattern in config.target_parameters or ():
        hits = [name for name in there if matches_name(pattern, name)]
        left = [name for name in hits if name.rpartition(".")[0] not in spared]
        if not literal:
            left = [n for n in left if in_layers(n, config) and not matches_any(config.exclude_modules, n)]
        if pattern in demanded and not left:
            why = "matches no parameter" if not hits else f"matches {len(hits)} parameters, and all are left out"
            raise TargetError(f"target_parameters: {pattern!r} {why}{_closest_parameter(pattern, there, hits)}")
        out.update(left)
    for name in out:
        module, _, key = name.rpartition(".")
        if (obstacle := parameter_obstacle(modules[module], key)) is not None:
            raise TargetError(f"target_parameters: {name} {obstacle}")
    return [name for name in there if name in out]


def _closest_parameter(pattern: str, there: list[str], hits: list[str]) -> str:
    if hits:
        return " by exclude_modules, modules_to_save or layers_to_transform"
    counts = Counter(name.rpartition(".")[2] for name in there)
    close = difflib.get_close_matches(pattern.rpartition(".")[2], list(counts), n=1, cutoff=0.5)
    if not close:
        return "; str(model) shows the modules, and model.named_parameters() the parameters that they hold"
    example = next(name for name in there if matches_name(close[0], name))
    return f"; did you mean {close[0]!r} ({counts[close[0]]} parameters, such as {example})?"


def _check_layers(modules: dict[str, nn.Module], config: LoraConfig) -> None:
    if not isinstance(config.layers_to_transform, list):
        return
    named = [name for name in modules if matches_any(config.target_modules, name)]
    named += [name for name in parameter_names(modules) if matches_any(config.target_parameters, name)]
    layers = {layer_number(name, config) for name in named} - {None}
    for index in config.layers_to_transform:
        if index not in layers:
            there = ", ".join(str(layer) for layer in sorted(layers, key=int))  # type: ignore[arg-type]
            raise TargetError(f"layers_to_transform: no targeted module is in layer {index}; their layers are {there}")


def _order_free(patterns: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The same patterns whatever their order, which an adapter folder's sorted JSON loses: name by name if need be."""
    in_file = dict(sorted(patterns.items()))
    if all(pattern_key(patterns, name) == pattern_key(in_file, name) for name in names):
        return patterns
    return {name: patterns[key] for name in names if (key := pattern_key(patterns, name)) is not None}


def _check_pattern_keys(config: LoraConfig, targets: list[str]) -> None:
    for which, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        used = {pattern_key(patterns, name) for name in targets}
        for key in patterns:
            if key in used:
                continue
            if any(pattern_key({key: 1}, name) for name in targets):
                raise TargetError(f"{which}: {key!r} never applies, because an earlier key matches the same modules")
            raise TargetError(f"{which}: {key!r} matches no adapted module{_closest(key, dict.fromkeys(targets))}")


# -- what is trained in full ----------------------------------------------------------------------------------------


def _names_of_saved(config: LoraConfig, saved: list[str]) -> list[str] | None:
    """As PEFT writes them: what was asked for, then the task's usual heads, then what is tied to them."""
    asked = config.modules_to_save or []
    asked = [*asked, *(head for head in _task_heads(config) if head not in asked)]
    return [*asked, *(name for name in saved if not ends_as(asked, name))] or config.modules_to_save


def _task_heads(config: LoraConfig) -> tuple[str, ...]:
    return TASK_HEADS.get(config.task_type, ()) if config.task_type else ()


def _saved_modules(modules: dict[str, nn.Module], config: LoraConfig, strict: bool, follow_ties: bool) -> list[str]:
    asked = config.modules_to_save or []
    heads = _task_heads(config)
    if strict:
        for pattern in asked:
            # A task's usual head is asked for by habit; models that call it otherwise are no mistake.
            if pattern not in heads and not any(ends_as([pattern], name) for name in modules):
                raise TargetError(f"modules_to_save: {pattern!r} matches no module{_closest(pattern, modules)}")
    names = [name for name in modules if ends_as([*asked, *heads], name)]
    if follow_ties:
        chosen = [modules[name] for name in names]
        names = [name for name in modules if name in names or _shares(modules[name], chosen)]
    names = [name for name in names if not any(name.startswith(other + ".") for other in names)]
    for name in names:
        if isinstance(modules[name], _CONTAINERS):  # it is indexed and not called, which a copy in its place is not
            raise TargetError(
                f"modules_to_save: {name} is a {type(modules[name]).__name__}, which holds what is trained and is not "
                "called itself; name what it holds"
            )
    return names


def _extras(modules: dict[str, nn.Module], saved: list[str], autocast_adapter_dtype: bool) -> Iterator[Extra]:
    """What is trained in full. Tied weights are one tensor, counted where it is met first."""
    seen: set[int] = set()
    for name in saved:
        module = modules[name]
        twins = sum(p.numel() for p in module._parameters.values() if p is not None and _storage(p) in seen)
        seen |= _storages(module)
        count = sum(p.numel() for p in module.parameters()) - twins
        yield Extra(name, "trained in full", count, count * adapter_itemsize(module, autocast_adapter_dtype))


def _storage(parameter: nn.Parameter) -> int:
    return parameter.data_ptr() or id(parameter)


def _storages(module: nn.Module) -> set[int]:
    return {_storage(p) for p in module._parameters.values() if p is not None and p.numel()}


def _shares(module: nn.Module, others: list[nn.Module]) -> bool:
    """Whether ``module`` itself (not its children) holds a weight that one of ``others`` holds: tied by storage."""
    mine = _storages(module)
    return any(not mine.isdisjoint(_storages(other)) for other in others)


def _biases(
    modules: dict[str, nn.Module], config: LoraConfig, targets: set[str], inside_saved: set[str]
) -> Iterator[Extra]:
    if config.bias == "none":
        return
    for name, module in modules.items():
        bias = module._parameters.get("bias")
        if bias is not None and name not in inside_saved and (config.bias == "all" or name in targets):
            size = adapter_itemsize(module, False)
            yield Extra(f"{name}.bias", "bias", bias.numel(), bias.numel() * size)


# -- words for errors -------------------------------------------------------------------------------------------------


def _closest(pattern: str, modules: dict[str, nn.Module] | dict[str, None]) -> str:
    """``"; did you mean 'q_proj' (22 modules)?"``"""
    counts = Counter(name.rsplit(".", 1)[-1] for name in modules if not name.rsplit(".", 1)[-1].isdigit())
    close = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], list(counts), n=1, cutoff=0.5)
    if not close:
        return ""
    count = counts[close[0]]
    return f"; did you mean {close[0]!r} ({count} module{'s' if count > 1 else ''})?"


def _offer(modules: dict[str, nn.Module]) -> str:
    """The names that could be targeted, with counts."""
    counts = Counter(name.rsplit(".", 1)[-1] for name, module in modules.items() if layer_class(module))
    listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common(30))
    return f"modules that can be adapted: {listed}" if listed else "this model has no module that LoRA can wrap"
