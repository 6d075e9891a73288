"""One forward and backward of a row for each adapter before its first step: does everything get a gradient?

A module with an adapter may never be called, or may have no part in the loss; its adapter would silently not train.
The probe leaves no gradient behind and does not advance random generators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loraloom.errors import some
from loraloom.lora.layer import LoraLayer
from loraloom.lora.model import PeftModel
from loraloom.lora.parameters import LoraParameter
from loraloom.tasks.objective import Objective

#: With fewer tokens attention has no choice, and its query and key may get no gradient.
ENOUGH = 4
#: Maximum number of modules named in a message.
SHOWN = 3
_USELESS = "so the adapter there would not train; exclude_modules leaves it out"
#: model → adapters that were probed, with their configs
_seen: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


@dataclass
class Seen:
    """What one forward and backward showed, by the names of modules with an adapter."""

    #: called with a non-empty tensor
    called: set[str] = field(default_factory=set)
    #: whose weight was an argument of an operation outside the module
    read: set[str] = field(default_factory=set)
    #: all modules of the model that ran
    ran: set[str] = field(default_factory=set)
    #: without any gradient, and with one that is zero throughout
    without: set[str] = field(default_factory=set)
    zero: set[str] = field(default_factory=set)
    tokens: int = 0


@dataclass(frozen=True)
class Fault:
    """``stops``: the adapter would train something else than is used later, or nothing."""

    text: str
    stops: bool = False


def unseen(model: PeftModel, names: Sequence[str]) -> list[str]:
    """The adapters among ``names`` that were not probed yet. From now on they count as probed."""
    known = _seen.setdefault(model, {})
    found = [name for name in names if known.get(name) is not model.peft_config[name]]
    known.update({name: model.peft_config[name] for name in found})
    return found


def probe(model: PeftModel, objective: Objective, name: str, row: Mapping[str, Tensor]) -> list[Fault]:
    """What is wrong with the adapter ``name``, found on ``row`` [1, ...] (or a few rows) with ``labels``."""
    inputs = dict(row)
    labels = inputs.pop("labels")
    rows = len(inputs["input_ids"])
    # An adapted parameter is read and never called.
    layers = {
        place: layer
        for place, layer in model.base_model.lora_layers.items()
        if name in layer.slots and not isinstance(layer, LoraParameter)
    }
    base = model.get_base_model()
    factors = [(place, p) for place, layer in layers.items() for p in layer.tensors(name).values() if p.requires_grad]
    ahead = _reads_ahead(model, objective, inputs, name)
    seen = Seen(tokens=int(inputs["input_ids"].shape[-1]))
    with (
        torch.random.fork_rng(devices=[]),
        _watched(base, layers, seen),
        model.base_model.lora_routed([name] * rows, {name: 0}),
        objective.attention(inputs["input_ids"]),
    ):
        loss = objective.losses(objective.forward(inputs, labels), labels, {name: slice(0, rows)})[name]
        grads = _gradients(loss, model, [p for _, p in factors])
    flags: dict[str, list[Tensor]] = {place: [] for place, _ in factors}
    for (place, _), grad in zip(factors, grads, strict=True):
        flags[place] += [] if grad is None else [grad.any()]
    seen.without = {place for place, found in flags.items() if not found}
    # One transfer for all: each by itself would wait for the device.
    any_of = {place: torch.stack(found).any() for place, found in flags.items() if found}
    nonzero = torch.stack(list(any_of.values())).tolist() if any_of else []
    seen.zero = {place for place, moves in zip(any_of, nonzero, strict=True) if not moves}
    found = faults(type(base).__name__, list(flags), seen)
    if ahead:
        text = "sees a text's later tokens when it predicts earlier ones, so it would learn to copy them"
        found.insert(0, Fault(f"model: {type(base).__name__} {text}; choose one that reads in one direction", True))
    return found


def _gradients(total: Tensor, model: nn.Module, factors: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Gradients by a full backward, which reentrant checkpointing needs. Earlier gradients are restored."""
    if not total.requires_grad:
        return [None] * len(factors)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in trained]
    try:
        for parameter in trained:
            parameter.grad = None
        total.backward()  # type: ignore[no-untyped-call]
        return [parameter.grad for parameter in factors]
    finally:
        for parameter, grad in zip(trained, before, strict=True):
            parameter.grad = grad


def _reads_ahead(model: PeftModel, objective: Objective, inputs: Mapping[str, Tensor], name: str) -> bool:
    """True if a causal language model's output for earlier tokens depends on the last token of the first row."""
    ids = inputs["input_ids"]
    last = int(inputs.get("attention_mask", torch.ones_like(ids))[0].sum()) - 1
    others = ids[0][ids[0] != ids[0, last]]
    if objective.way is None or last < 1 or not len(others):
        return False
    changed = ids.clone()
    changed[0, last] = others[0]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), model.base_model.lora_routed([name], {name: 0}):
        given = [{**inputs, "input_ids": both} for both in (ids, changed)]
        one, other = (objective.outputs(objective.forward(each))[0, :last].float() for each in given)
    return bool((one - other).abs().max() > 1e-2 * one.abs().max()) if one.isfinite().all() else False


def faults(model: str, names: Sequence[str], seen: Seen) -> list[Fault]:
    """The faults among the modules ``names``, which carry adapters."""
    read = [name for name in names if name in seen.read and name not in seen.called]
    idle = [name for name in names if name not in seen.called and name not in seen.read and not _spare(name, seen.ran)]
    aside = [name for name in names if name in seen.called and name in seen.without]
    still = [name for name in names if name in seen.called and name in seen.zero]
    found: list[Fault] = []
    if read:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in read}))
        text = (
            f"target_modules: {some(read, SHOWN)}: {model} reads the weight and never calls the module, so an adapter "
            "does nothing beside it, and something else once it is merged; leave it out "
            f"(exclude_modules: [{leaves}])"
        )
        found.append(Fault(text, stops=True))
    if idle:
        found.append(Fault(f"{some(idle, SHOWN)}: {model} does not call it for this data, {_USELESS}"))
    if aside:
        found.append(Fault(f"{some(aside, SHOWN)}: what it computes does not reach the loss, {_USELESS}"))
    if len(still) == len(names) and names:
        return found  # a head of zeros, or a loss of 0
    if still and seen.tokens >= ENOUGH:
        why = "a gate that is closed, or an output that is multiplied by 0"
        found.append(Fault(f"{some(still, SHOWN)}: the gradient there is exactly 0 on the first row: {why}"))
    if names and not read and len(idle) + len(aside) == len(names):
        found = [Fault(f"target_modules: no adapter would train: {found[0].text}", stops=True)]
    return found


def _spare(name: str, ran: set[str]) -> bool:
    """True if similar modules ran instead: another expert that tokens were routed to, another layer."""
    parts = name.split(".")
    top = len(parts)
    while top > 1 and ".".join(parts[: top - 1]) not in ran:
        top -= 1
    for depth in range(top, len(parts) + 1):
        if not parts[depth - 1].isdigit():
            continue
        above, below = ".".join(parts[: depth - 1]), ".".join(parts[depth:])
        mates = (other for other in ran if other.startswith(f"{above}.") and other != name)
        for other in mates:
            number, _, rest = other[len(above) + 1 :].partition(".")
            if number.isdigit() and number != parts[depth - 1] and rest == below:
                return True
    return False


@contextmanager
def _watched(base: nn.Module, layers: Mapping[str, LoraLayer], seen: Seen) -> Iterator[None]:
    """Context that notes in ``seen`` which modules run and whose weights are read."""
    running: list[LoraLayer] = []
    held = {name: getattr(layer.base_layer, "weight", None) for name, layer in layers.items()}
    weights = {id(weight): name for name, weight in held.items() if isinstance(weight, nn.Parameter)}
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: seen.ran.add(name))
        for name, module in base.named_modules()
    ]
    for name, layer in layers.items():

        def began(module: Any, args: Any, name: str = name) -> None:
            running.append(module)
            first = next((one for one in args if isinstance(one, Tensor)), None)
            if first is None or first.numel():
                seen.called.add(name)

        def ended(module: Any, args: Any, out: Any) -> None:
            if running:
                running.pop()

        hooks += [layer.register_forward_pre_hook(began), layer.register_forward_hook(ended)]
    try:
        with _Reads(weights, running, seen.read):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Reads(TorchFunctionMode):
    """Notes whose weight is an argument of an operation outside its module."""

    def __init__(self, weights: Mapping[int, str], running: list[LoraLayer], read: set[str]) -> None:
        super().__init__()
        self._weights, self._running, self._read = weights, running, read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._running and isinstance(out, Tensor):  # reading its dtype, for example, does not count
            for one in (*args, *(kwargs or {}).values()):
                if (name := self._weights.get(id(one))) is not None:
                    self._read.add(name)
        return out
