"""Adapters of experts that were separate modules (transformers 4), on a model that stacks them in parameters.

``experts.3.gate_proj`` and ``experts.3.up_proj`` became rows of ``experts.gate_up_proj[3]``. Their factors are
concatenated: A along the rank, B block-diagonally. That is the same update, with the sum of their ranks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from loraloom.config.lora import LoraConfig
from loraloom.errors import AdapterError
from loraloom.lora.keys import PREFIX, LoadReport
from loraloom.lora.matching import rank_and_alpha

_KEY = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)\.lora_(?P<factor>[AB])\.weight")
#: Old name → the parameter, and the half of its rows that the old module was: 0 upper, 1 lower, None all.
_PARTS: dict[str, tuple[str, int | None]] = {
    **dict.fromkeys(("gate_proj", "w1"), ("gate_up_proj", 0)),
    **dict.fromkeys(("up_proj", "w3"), ("gate_up_proj", 1)),
    **dict.fromkeys(("down_proj", "w2"), ("down_proj", None)),
}
#: What transformers 4 called the block of experts on some types, and what it is called now.
_BLOCKS = (".block_sparse_moe.", ".mlp.")


@dataclass
class Stack:
    """The old factors of one parameter: (expert, old name) → A, B."""

    module: str
    parameter: str
    a: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    b: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}"


def restack(
    tensors: dict[str, Tensor], config: LoraConfig, modules: Mapping[str, nn.Module], report: LoadReport, source: str
) -> tuple[dict[str, Tensor], LoraConfig]:
    """``tensors`` by their keys and ``config`` as if the adapter had been made on stacked experts.

    Both are returned unchanged if no tensor belongs to an expert that was a module.

    Raises:
        AdapterError: the experts of the model are stacked in a way that the factors cannot follow exactly.
    """
    out: dict[str, Tensor] = {}
    stacks: dict[str, Stack] = {}
    for key, tensor in tensors.items() if any(".experts." in key for key in tensors) else ():
        name = key.removeprefix(PREFIX)
        found = _KEY.fullmatch(name)
        if found is None or f"{found['owner']}.{found['expert']}.{found['part']}" in modules:
            out[_renamed(name, modules)] = tensor
            continue
        stack = _stack(stacks, found["owner"], found["part"], modules, f"{source}{name}")
        table = stack.a if found["factor"] == "A" else stack.b
        table[int(found["expert"]), found["part"]] = tensor
    if not stacks:
        return tensors, config
    ranks, alphas = {}, {}
    names = [key.rpartition(".lora_")[0] for key in out if ".lora_" in key]
    parameters = [f"{n}.weight" for n in dict.fromkeys(names) if n in modules and not _is_layer(modules[n])]
    parameters += [stack.name for stack in stacks.values()]
    stacked = Counter(stack.module for stack in stacks.values())
    for stack in stacks.values():
        a, b, r, alpha = _joined(stack, config, modules[stack.module], source)
        ranks[stack.name], alphas[stack.name] = r, alpha
        inner = ".base_layer" if stack.parameter == "gate_up_proj" and stacked[stack.module] > 1 else ""
        out[f"{stack.module}{inner}.lora_A.weight"], out[f"{stack.module}{inner}.lora_B.weight"] = a, b
    kept = [name for name in dict.fromkeys(names) if f"{name}.weight" not in parameters]
    keyed = {PREFIX + name: tensor for name, tensor in out.items()}
    report.renamed.update(dict.fromkeys(tensors.keys() - keyed.keys(), "stacked"))
    return keyed, config.copy(
        target_modules=kept,
        target_parameters=[*(config.target_parameters or ()), *parameters],
        rank_pattern={**ranks, **config.rank_pattern},
        alpha_pattern={**alphas, **config.alpha_pattern},
        layers_to_transform=None,
        layers_pattern=None,
    )


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or "weight" not in module._parameters


def _renamed(name: str, modules: Mapping[str, nn.Module]) -> str:
    old, new = _BLOCKS
    if old in name and not any(old in f"{module}." for module in modules):
        return name.replace(old, new)
    return name


def _stack(stacks: dict[str, Stack], owner: str, part: str, modules: Mapping[str, nn.Module], what: str) -> Stack:
    if part not in _PARTS:
        raise AdapterError(f"{what} adapts an expert's {part!r}, of which no stacked parameter is known to hold it")
    module, parameter = _renamed(f"{owner}.", modules)[:-1], _PARTS[part][0]
    holder = modules.get(module)
    if holder is None or holder._parameters.get(parameter) is None:
        raise AdapterError(
            f"{what} adapts an expert that is a module of its own, and this model has no {module}.{parameter} that "
            "would hold it. Was the adapter made for another base, or with another version of transformers?"
        )
    if getattr(holder, "is_transposed", False) or not getattr(holder, "is_concatenated", False):
        raise AdapterError(
            f"{what} adapts an expert that is a module of its own; {type(holder).__name__} stacks its experts in "
            "another order, which the factors cannot follow exactly"
        )
    name = f"{module}.{parameter}"
    return stacks.setdefault(name, Stack(module, parameter))


def _joined(stack: Stack, config: LoraConfig, holder: nn.Module, source: str) -> tuple[Tensor, Tensor, int, float]:
    """A [E · r, in], B [out, r · E], and the r and alpha that give the old scale."""
    weight = holder._parameters[stack.parameter]
    assert weight is not None
    experts, height, width = weight.shape
    if lone := sorted(stack.a.keys() ^ stack.b.keys()):
        raise AdapterError(f"{source}{stack.module}.{lone[0][0]}.{lone[0][1]} has one of its factors A and B alone")
    scales = {rank_and_alpha(config, f"{stack.module}.{e}.{part}") for e, part in stack.a}
    if len({config.scale(r, alpha) for r, alpha in scales}) > 1:
        raise AdapterError(f"{source}experts of {stack.name} have unlike scales, which one parameter cannot have")
    old_r, old_alpha = scales.pop()
    parts = sorted({part for _, part in stack.a}, key=lambda part: _PARTS[part][1] or 0)
    ranks = {part: max(a.shape[0] for (_, p), a in stack.a.items() if p == part) for part in parts}
    r = sum(ranks.values())
    first = next(iter(stack.a.values()))
    a, b = first.new_zeros(experts, r, width), first.new_zeros(experts, height, r)
    for (e, part), factor in stack.a.items():
        start, top = sum(ranks[p] for p in parts[: parts.index(part)]), (_PARTS[part][1] or 0) * (height // 2)
        rows = height if _PARTS[part][1] is None else height // 2
        other = stack.b[e, part]
        if e >= experts or factor.shape[1:] != (width,) or other.shape != (rows, factor.shape[0]):
            raise AdapterError(
                f"{source}the adapter does not fit this model: {stack.module}.{e}.{part} has A {tuple(factor.shape)} "
                f"and B {tuple(other.shape)}, and {stack.name} is {tuple(weight.shape)}. Is it for another base?"
            )
        a[e, start : start + factor.shape[0]] = factor
        b[e, top : top + rows, start : start + factor.shape[0]] = other
    grown: Callable[[float], float] = (lambda n: n**0.5) if config.use_rslora else (lambda n: n)
    alpha = old_alpha * grown(r) / grown(old_r)
    return a.flatten(0, 1), b.permute(1, 2, 0).reshape(height, -1), r, alpha
