"""One forward and backward of a row for each adapter, before the first step: does what is to train get a gradient?

A module may carry an adapter and never be called, or be called and have no part in the loss. Trained beside the model
that does nothing, in silence. Looks alone: no gradient is left behind, no generator moves.
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

#: With fewer tokens attention has nothing to choose from, and its query and key get no gradient.
ENOUGH = 4
#: Modules that a message names.
SHOWN = 3
_USELESS = "so the adapter there would not train; exclude_modules leaves it out"
#: model → adapters that were looked at, with their configs
_seen: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


@dataclass
class Seen:
    """What one forward and backward showed, by the names of modules with an adapter."""

    #: called with something
    called: set[str] = field(default_factory=set)
    #: whose weight was handed to an operation while the module itself was not running
    read: set[str] = field(default_factory=set)
    #: all modules of the model that ran
    ran: set[str] = field(default_factory=set)
    #: without any gradient, and with one that is zero throughout
    without: set[str] = field(default_factory=set)
    zero: set[str] = field(default_factory=set)
    tokens: int = 0


@dataclass(frozen=True)
class Fault:
    """``stops``: what would train is not what is used afterwards, or nothing would train at all."""

    text: str
    stops: bool = False


def unseen(model: PeftModel, names: Sequence[str]) -> list[str]:
    """Of ``names`` the adapters that were not looked at yet. From now on they count as looked at."""
    known = _seen.setdefault(model, {})
    found = [name for name in names if known.get(name) is not model.peft_config[name]]
    known.update({name: model.peft_config[name] for name in found})
    return found


def probe(model: PeftModel, objective: Objective, name: str, row: Mapping[str, Tensor]) -> list[Fault]:
    """What is wrong with the adapter ``name``, by ``row`` [1, ...] (or a few) with its ``labels``."""
    inputs = dict(row)
    labels = inputs.pop("labels")
    rows = len(inputs["input_ids"])
    # A parameter that is adapted by itself is read, never called.
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
    got: dict[str, list[Tensor | None]] = {}
    for (place, _), grad in zip(factors, grads, strict=True):
        got.setdefault(place, []).append(grad)
    seen.without = {name for name, found in got.items() if all(grad is None for grad in found)}
    flags = {name: [grad.any() for grad in found if grad is not None] for name, found in got.items()}
    flags = {name: found for name, found in flags.items() if found}
    # One look at all of them: each by itself would wait for the device.
    nonzero = torch.stack([torch.stack(found).any() for found in flags.values()]).tolist() if flags else []
    seen.zero = {name for name, moves in zip(flags, nonzero, strict=True) if not moves}
    found = faults(type(base).__name__, list(got), seen)
    if ahead:
        text = "sees a text's later tokens when it predicts earlier ones, so it would learn to copy them"
        found.insert(0, Fault(f"model: {type(base).__name__} {text}; choose one that reads in one direction", True))
    return found


def _gradients(total: Tensor, model: nn.Module, factors: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """By a whole backward, the one that reentrant checkpointing knows; what gradients there were, stay."""
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
    """Whether a causal language model's output for earlier tokens changes with the last one of the first row."""
    ids = inputs["input_ids"]
    last = int(inputs.get("attention_mask", torch.ones_like(ids))[0].sum()) - 1
    others = ids[0][ids[0] != ids[0, last]]
    if objective.way is None or last < 1 or not len(others):
        return False
    changed = ids.clone()
    changed[0, last] = others[0]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        one = _hidden(model, objective, inputs, name)[0, :last].float()
        other = _hidden(model, objective, {**inputs, "input_ids": changed}, name)[0, :last].float()
    return bool((one - other).abs().max() > 1e-2 * one.abs().max()) if one.isfinite().all() else False


def _hidden(model: PeftModel, objective: Objective, inputs: Mapping[str, Tensor], name: str) -> Tensor:
    with model.base_model.lora_routed([name], {name: 0}):
        return objective.outputs(objective.forward(inputs))


def faults(model: str, names: Sequence[str], seen: Seen) -> list[Fault]:
    """The faults among the modules ``names``, which carry adapters."""
    read = [name for name in names if name in seen.read and name not in seen.called]
    idle = [name for name in names if name not in seen.called and name not in seen.read and not _spare(name, seen.ran)]
    aside = [name for name in names if name in seen.called and name in seen.without]
    still = [name for name in names if name in seen.called and name in seen.zero]
    found: list[Fault] = []
    if read:
        found.append(
            Fault(
                f"target_modules: {some(read, SHOWN)}: {model} reads the weight and never calls the module, so an "
                "adapter does nothing beside it, and something else once it is merged; leave it out "
                f"(exclude_modules: [{', '.join(_leaves(read))}])",
                stops=True,
            )
        )
    if idle:
        found.append(Fault(f"{some(idle, SHOWN)}: {model} does not call it for this data, {_USELESS}"))
    if aside:
        found.append(Fault(f"{some(aside, SHOWN)}: what it computes does not reach the loss, {_USELESS}"))
    if len(still) == len(names) and names:
        return found  # a head of zeros, or a loss that is 0 already
    if still and seen.tokens >= ENOUGH:
        why = "a gate that is closed, or an output that is multiplied by 0"
        found.append(Fault(f"{some(still, SHOWN)}: the gradient there is exactly 0 on the first row: {why}"))
    if names and not read and len(idle) + len(aside) == len(names):
        found = [Fault(f"target_modules: no adapter would train: {found[0].text}", stops=True)]
    return found


def _spare(name: str, ran: set[str]) -> bool:
    """It lies in one of several alike of which others ran: an expert that no token went to, a layer left out."""
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


def _leaves(names: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


@contextmanager
def _watched(base: nn.Module, layers: Mapping[str, LoraLayer], seen: Seen) -> Iterator[None]:
    running: list[LoraLayer] = []
    held = {name: getattr(layer.base_layer, "weight", None) for name, layer in layers.items()}
    weights = {id(weight): name for name, weight in held.items() if isinstance(weight, nn.Parameter)}

    def began(name: str, layer: LoraLayer) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            running.append(layer)
            first = next((one for one in args if isinstance(one, Tensor)), None)
            if first is None or first.numel():
                seen.called.add(name)

        return hook

    def ended(module: nn.Module, args: Any, out: Any) -> None:
        if running:
            running.pop()

    def ran(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            seen.ran.add(name)

        return hook

    hooks = [module.register_forward_pre_hook(ran(name)) for name, module in base.named_modules()]
    for name, layer in layers.items():
        hooks += [layer.register_forward_pre_hook(began(name, layer)), layer.register_forward_hook(ended)]
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
        if not self._running and isinstance(out, Tensor):  # and not its dtype, say
            for one in (*args, *(kwargs or {}).values()):
                if (name := self._weights.get(id(one))) is not None:
                    self._read.add(name)
        return out
