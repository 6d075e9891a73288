"""Any optimizer of ``torch.optim`` by its name, with the methods that a slot needs.

``engine.flat_adamw`` has the usual one, faster. Knows parameters and numbers, no slots, schedules or options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loraloom.engine.flat_adamw import FlatAdamW
from loraloom.errors import ConfigError, nearest

#: What changes a flat tensor of gradients in place before they are used: a sum over processes.
Reduce = Callable[[Tensor], None]
#: Those of torch.optim that need more than gradients of full tensors.
_NEED_MORE = {"LBFGS": "a closure that runs the forward again", "SparseAdam": "sparse gradients"}


class Optimizer(Protocol):
    """One adapter's optimizer."""

    def step(self, learning_rate: float, max_norm: float, scale: float = 1.0, reduce: Reduce | None = None) -> float:
        """Divide the gradients by ``scale``, clip them together to ``max_norm``, update, and let the gradients go.

        Returns their norm before clipping. Where it is not finite, nothing is changed.
        """

    def state(self) -> dict[str, Tensor]:
        """The state to resume from, as tensors."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state()`` of an optimizer over the same parameters; this one took no step yet."""


def build(
    name: str, parameters: Sequence[tuple[nn.Parameter, float]], weight_decay: float, arguments: Mapping[str, Any]
) -> Optimizer:
    """``adamw``, or the class ``name`` of torch.optim. ``parameters`` come with what the rate is multiplied with.

    Raises:
        ConfigError: no such class, or one that does not take what it is given.
    """
    if name == "adamw":
        return FlatAdamW(parameters, weight_decay)
    return NamedOptimizer(name, parameters, weight_decay, arguments)


def find(name: str, weight_decay: float, arguments: Mapping[str, Any]) -> type[torch.optim.Optimizer]:
    """The class ``name`` of torch.optim, which takes ``weight_decay`` and ``arguments``.

    Raises:
        ConfigError: begins with the option that is wrong.
    """
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    usable = sorted(key for key in known if key not in _NEED_MORE)
    if name in _NEED_MORE:
        raise ConfigError(f"optim: {name} needs {_NEED_MORE[name]}; choose one of adamw, {', '.join(usable)}")
    if name not in known:
        hint = nearest(name, ["adamw", *usable]) or f"; there are adamw, {', '.join(usable)}"
        raise ConfigError(f"optim: torch.optim has no {name!r}{hint}")
    takes = inspect.signature(known[name].__init__).parameters
    if weight_decay and "weight_decay" not in takes:
        raise ConfigError(f"weight_decay: {name} has none, found {weight_decay}; set it to 0 or choose another optim")
    for key in arguments:
        if key in ("lr", "weight_decay"):
            home = "learning_rate" if key == "lr" else key
            raise ConfigError(f"optim_args: {key} is set by {home}; leave it out")
        if key not in takes:
            raise ConfigError(f"optim_args: {name} takes no {key!r}{nearest(key, takes)}")
    return known[name]


class NamedOptimizer:
    """A class of torch.optim over one adapter's parameters."""

    def __init__(
        self,
        name: str,
        parameters: Sequence[tuple[nn.Parameter, float]],
        weight_decay: float,
        arguments: Mapping[str, Any],
    ) -> None:
        kind = find(name, weight_decay, arguments)
        self._parameters = [parameter for parameter, _ in parameters]
        takes = inspect.signature(kind.__init__).parameters
        given = dict(arguments) | ({"weight_decay": weight_decay} if "weight_decay" in takes else {})
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter, times in parameters:
            groups.setdefault(times, []).append(parameter)
        self._times = list(groups)
        try:
            self._optimizer = kind([{"params": members} for members in groups.values()], **given)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optim: {name} cannot be made ({error})") from None

    def step(self, learning_rate: float, max_norm: float, scale: float = 1.0, reduce: Reduce | None = None) -> float:
        members = [parameter for parameter in self._parameters if parameter.grad is not None]
        if not members:
            return 0.0
        gradients = [parameter.grad for parameter in members if parameter.grad is not None]
        if reduce is not None:
            for gradient in gradients:
                reduce(gradient)
        norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients])
        norm = float(torch.linalg.vector_norm(norms)) / scale
        if math.isfinite(norm):
            factor = (max_norm / (norm + 1e-6) if norm > max_norm else 1.0) / scale
            if factor != 1.0:
                for gradient in gradients:
                    gradient.mul_(factor)
            for group, times in zip(self._optimizer.param_groups, self._times, strict=True):
                group["lr"] = learning_rate * times
            self._optimizer.step()
        for parameter in members:
            parameter.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for number, parameter in enumerate(self._parameters):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    out[f"{number}.{key}"] = value
                elif isinstance(value, int | float):
                    out[f"{number}.{key}.{type(value).__name__}"] = torch.tensor(value, dtype=torch.float64)
        return out

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        # As torch's load_state_dict: a count of steps is on a CPU unless the step's kernel reads it.
        on_device = {
            parameter: bool(group.get("fused") or group.get("capturable"))
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }
        for name, value in state.items():
            number, key, *kind = name.split(".")
            parameter = self._parameters[int(number)]
            known: Any = self._optimizer.state[parameter]
            if kind:
                known[key] = int(value) if kind[0] == "int" else float(value)
            elif key == "step" and not on_device[parameter]:
                known[key] = value.clone()
            else:
                known[key] = value.to(parameter.device, copy=True)
