"""From a config and a model to a ``Plan``: which modules get which rank, alpha and scale, and their memory.

Nothing here changes the model. Strict: a pattern that matches nothing is an error that names the closest match.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loraloom.config.lora import LoraConfig
from loraloom.errors import TargetError, some
from loraloom.lora.base import Base, task_heads
from loraloom.lora.frozen import adapter_dtype, frozen_linear, registered
from loraloom.lora.layers import LoraConv, LoraConv1D, LoraLinear, layer_class
from loraloom.lora.matching import check_expressions, ends_as, lies_in, pattern_key, rank_and_alpha
from loraloom.lora.parameters import LoraParameter
from loraloom.lora.peft_targets import Experts, PeftTarget, config_for_peft, renamed_by_peft, unadapted
from loraloom.lora.selection import Chosen, select
from loraloom.lora.variants import variant_of

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
    """Something that is trained in full: a module, or one bias."""

    name: str
    kind: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """An adapter on a model: its targets and their size. ``str(plan)`` is a table to read."""

    config: LoraConfig
    targets: tuple[Target, ...]
    saved: tuple[Extra, ...]
    biases: tuple[Extra, ...]
    base_parameters: int
    base_bytes: int
    #: a choice that was made for the user; "" if none
    note: str = ""
    #: expert weights that are not adapted
    experts: Experts = field(default_factory=Experts)
    #: sentences about what is left out or does not apply
    notes: tuple[str, ...] = ()
    #: targets that PEFT would not find, with any config; a folder with them is not for PEFT
    unreadable: tuple[str, ...] = ()
    #: named modules whose weight the model reads without calling them; not adapted
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
        ranks = [(str(t.r), f"{t.alpha:g}", f"{t.scale:g}") for t in self.targets] + [("",) * 3] * len(self.rows)
        rows = [(x.name, x.kind, *r, f"{x.parameters:,}", f"{x.bytes:,}") for x, r in zip(self.rows, ranks)]
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
            tensor, and the names of experts mean the parameters that hold them now. False takes all names literally,
            as for an adapter that was written elsewhere.

    Raises:
        TargetError: a pattern matches nothing, or a module that cannot carry LoRA; nothing would be trained.
    """
    model = getattr(model, "get_base_model", lambda: model)()
    return plan_on(Base(model), config, strict, autocast_adapter_dtype, follow_ties)


def plan_on(base: Base, config: LoraConfig, strict: bool, autocast_adapter_dtype: bool, follow_ties: bool) -> Plan:
    """``plan`` for a model whose modules are listed already."""
    modules, wanted = base.modules, config.target_modules
    check_expressions(config, modules)
    saved = _saved_modules(base, config, strict, follow_ties)
    config = config.copy(modules_to_save=_names_of_saved(config, saved))
    config, chosen, idle, left_out = select(base, config, saved, strict, literal=not follow_ties)
    targets = [_target(one, modules[one.module], config, autocast_adapter_dtype) for one in chosen]
    patterned = [one.pattern_name for one in chosen]
    if strict:
        _check_pattern_keys(base, config, patterned)
    config = config.copy(
        rank_pattern=_order_free(config.rank_pattern, patterned),
        alpha_pattern=_order_free(config.alpha_pattern, patterned),
        fan_in_fan_out=any(target.kind == LoraConv1D.kind for target in targets),
    )
    pairs = zip(chosen, targets, strict=True)
    reads = [PeftTarget(one.pattern_name, one.pattern_name != one.module, made.r, made.alpha) for one, made in pairs]
    config, lost = config_for_peft(config, base.type, modules, reads)
    unreadable = tuple(dict.fromkeys([*lost, *renamed_by_peft(base.model, [one.module for one in chosen])]))
    extras = tuple(_extras(modules, saved, autocast_adapter_dtype))
    biases = tuple(_biases(modules, config, {target.name for target in targets}, saved))
    if not (targets or extras or biases):
        raise TargetError(f"target_modules: nothing would be trained; {base.offer}")
    total, size = _base_size(modules)
    inside_saved = [name for name in modules if lies_in(name, saved)]
    return Plan(
        config,
        tuple(targets),
        extras,
        biases,
        total,
        size,
        _note(base, wanted, config.target_modules),
        unadapted(modules, [target.name for target in targets] + inside_saved, total),
        tuple(_notes(config, targets, left_out, idle, unreadable)),
        unreadable,
        tuple(idle),
    )


def _note(base: Base, wanted: object, targets: list[str] | str | None) -> str:
    """A sentence on targets that were found in the model, because none were given."""
    if wanted is not None or not targets or base.usual is not None:
        return ""
    listed = ", ".join(targets) if isinstance(targets, list) else targets
    return (
        f"target_modules: not given, and {base.no_default}: {listed} were found in the model; "
        "give target_modules to adapt others"
    )


def _target(one: Chosen, module: nn.Module, config: LoraConfig, autocast_adapter_dtype: bool) -> Target:
    r, alpha = rank_and_alpha(config, one.pattern_name)
    variant, conv = variant_of(config), issubclass(one.cls, LoraConv)
    kind = type(module).__name__ if conv else one.cls.kind
    if conv and r % module.groups:  # type: ignore[operator]
        raise TargetError(
            f"r: {one.name} is a convolution with groups={module.groups}, so its rank must be a multiple of that, "
            f"found {r}; set rank_pattern={{{one.name!r}: ...}} or leave the module out"
        )
    if variant.kinds and one.cls.kind not in variant.kinds:
        raise TargetError(
            f"target_modules: {one.name} is a {kind}, which {variant.name} cannot adapt; name layers of kind "
            f"{', '.join(variant.kinds)}"
        )
    shapes = variant.shapes(one.cls.shapes(module, r, one.name))
    count = sum(math.prod(shape) for shape in shapes.values())
    size = count * adapter_itemsize(module, autocast_adapter_dtype)
    return Target(one.name, kind, r, alpha, config.scale(r, alpha), count, size)


def _notes(
    config: LoraConfig, targets: list[Target], left_out: list[str], idle: list[str], unreadable: Sequence[str]
) -> Iterator[str]:
    """What a reader of the plan might not expect."""
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
    """Bytes of an element of an adapter on ``module``: float32 for a half-precision base, else the base's dtype."""
    if layer_class(module) in (LoraLinear, LoraConv1D):
        return adapter_dtype(frozen_linear(module).dtype, autocast_adapter_dtype).itemsize
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    return 4 if weight is None else adapter_dtype(weight.dtype, autocast_adapter_dtype).itemsize


def _base_size(modules: dict[str, nn.Module]) -> tuple[int, int]:
    """Parameters and bytes of the base: tied weights count once, quantised ones as stored."""
    sizes = {id(p): (p.numel(), p.nbytes) for m in modules.values() for p in m._parameters.values() if p is not None}
    for module in modules.values():
        own: Any = type(module)
        dense = type(module._parameters.get("weight")) is nn.Parameter and registered(own) is None
        if not dense and layer_class(module) in (LoraLinear, LoraConv1D):
            linear = frozen_linear(module)
            sizes[id(module._parameters.get("weight", module))] = (math.prod(linear.shape), linear.nbytes)
    return sum(count for count, _ in sizes.values()), sum(size for _, size in sizes.values())


# -- patterns for ranks and alphas ----------------------------------------------------------------------------------


def _order_free(patterns: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Equivalent patterns whose order does not matter, since the JSON of an adapter folder is sorted."""
    in_file = dict(sorted(patterns.items()))
    if all(pattern_key(patterns, name) == pattern_key(in_file, name) for name in names):
        return patterns
    return {name: patterns[key] for name in names if (key := pattern_key(patterns, name)) is not None}


def _check_pattern_keys(base: Base, config: LoraConfig, targets: list[str]) -> None:
    for which, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        used = {pattern_key(patterns, name) for name in targets}
        for key in [key for key in patterns if key not in used]:
            if any(pattern_key({key: 1}, name) for name in targets):
                raise TargetError(f"{which}: {key!r} never applies, because an earlier key matches the same modules")
            raise TargetError(f"{which}: {key!r} matches no adapted module{base.closest(key, dict.fromkeys(targets))}")


# -- what is trained in full ----------------------------------------------------------------------------------------


def _names_of_saved(config: LoraConfig, saved: list[str]) -> list[str] | None:
    """As PEFT writes them: the given names, then the task's usual heads, then modules that are tied to these."""
    asked = config.modules_to_save or []
    asked = [*asked, *(head for head in task_heads(config) if head not in asked)]
    return [*asked, *(name for name in saved if not ends_as(asked, name))] or config.modules_to_save


def _saved_modules(base: Base, config: LoraConfig, strict: bool, follow_ties: bool) -> list[str]:
    asked, heads, modules = config.modules_to_save or [], task_heads(config), base.modules
    for pattern in asked if strict else ():
        # A task's usual heads are often listed although the model has another name for its head.
        if pattern not in heads and not any(ends_as([pattern], name) for name in modules):
            raise TargetError(f"modules_to_save: {pattern!r} matches no module{base.closest(pattern)}")
    names = [name for name in modules if ends_as([*asked, *heads], name)]
    if follow_ties:
        held = set().union(*(_storages(modules[name]) for name in names))
        names = [name for name in modules if name in names or not held.isdisjoint(_storages(modules[name]))]
    names = [name for name in names if not any(name.startswith(other + ".") for other in names)]
    for name in names:
        if isinstance(modules[name], _CONTAINERS):  # containers are not called, so no copy could take their place
            raise TargetError(
                f"modules_to_save: {name} is a {type(modules[name]).__name__}, which holds what is trained and is not "
                "called itself; name what it holds"
            )
    return names


def _extras(modules: dict[str, nn.Module], saved: list[str], autocast_adapter_dtype: bool) -> Iterator[Extra]:
    """The modules that are trained in full. Tied weights are one tensor, counted with the first module."""
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
    """The storages of the parameters of ``module`` itself, without its children: equal for tied parameters."""
    return {_storage(p) for p in module._parameters.values() if p is not None and p.numel()}


def _biases(
    modules: dict[str, nn.Module], config: LoraConfig, targets: set[str], saved: Sequence[str]
) -> Iterator[Extra]:
    for name, module in modules.items() if config.bias != "none" else ():
        bias = module._parameters.get("bias")
        if bias is not None and not lies_in(name, saved) and (config.bias == "all" or name in targets):
            yield Extra(f"{name}.bias", "bias", bias.numel(), bias.numel() * adapter_itemsize(module, False))
