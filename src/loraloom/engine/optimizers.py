"""Any optimizer of ``torch.optim`` by its name, with the methods that a slot needs.

``engine.flat_adamw`` has the default one, faster. Knows parameters and numbers, no slots, schedules or options.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loraloom.engine.flat_adamw import FlatAdamW
from loraloom.engine.optimizer_state import by_parameter, check_kinds
from loraloom.errors import ConfigError, nearest

#: Changes a tensor of gradients in place before they are used: a sum over processes.
Reduce = Callable[[Tensor], None]
#: Name → parameter, and the factor on its learning rate.
Parameters = Mapping[str, tuple[nn.Parameter, float]]
#: Classes of torch.optim that need more than dense gradients.
_NEED_MORE = {"LBFGS": "a closure that runs the forward again", "SparseAdam": "sparse gradients"}


class Optimizer(Protocol):
    """One adapter's optimizer."""

    def step(self, learning_rate: float, max_norm: float, scale: float = 1.0, reduce: Reduce | None = None) -> float:
        """Divide the gradients by ``scale``, clip their common norm to ``max_norm``, update, and free the gradients.

        Returns their norm before clipping. If the norm is not finite, nothing is changed.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """``KIND/NAME`` → tensor, such as ``exp_avg/…lora_A.weight``. A parameter without a step has none."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the ``state_dict`` of an optimizer over parameters of these names, in any order.

        Raises:
            AdapterError: a parameter that is unknown here, or a tensor that is missing, unknown or of another shape.
        """


def build(name: str, parameters: Parameters, weight_decay: float, arguments: Mapping[str, Any]) -> Optimizer:
    """``adamw``, or the class ``name`` of torch.optim.

    Raises:
        ConfigError: no such class, or one that does not accept the arguments.
    """
    if name == "adamw":
        return FlatAdamW(parameters, weight_decay)
    return NamedOptimizer(name, parameters, weight_decay, arguments)


def find(name: str, weight_decay: float, arguments: Mapping[str, Any]) -> type[torch.optim.Optimizer]:
    """The class ``name`` of torch.optim, which accepts ``weight_decay`` and ``arguments``.

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

    def __init__(self, name: str, parameters: Parameters, weight_decay: float, arguments: Mapping[str, Any]) -> None:
        self._kind = find(name, weight_decay, arguments)
        self._parameters = {key: parameter for key, (parameter, _) in parameters.items()}
        takes = inspect.signature(self._kind.__init__).parameters
        self._given = dict(arguments) | ({"weight_decay": weight_decay} if "weight_decay" in takes else {})
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter, factor in parameters.values():
            groups.setdefault(factor, []).append(parameter)
        self._factors = list(groups)
        try:
            self._optimizer = self._kind([{"params": members} for members in groups.values()], **self._given)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optim: {name} cannot be made ({error})") from None

    def step(self, learning_rate: float, max_norm: float, scale: float = 1.0, reduce: Reduce | None = None) -> float:
        members = [parameter for parameter in self._parameters.values() if parameter.grad is not None]
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
            for group, times in zip(self._optimizer.param_groups, self._factors, strict=True):
                group["lr"] = learning_rate * times
            self._optimizer.step()
        for parameter in members:
            parameter.grad = None
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        states = {name: self._optimizer.state.get(parameter, {}) for name, parameter in self._parameters.items()}
        return {f"{kind}/{name}": value for name, state in states.items() for kind, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        saved = by_parameter(state, self._parameters)
        for name, kinds in saved.items():
            fresh = self._state_after_a_step(self._parameters[name])
            check_kinds(name, kinds, fresh)
            self._optimizer.state[self._parameters[name]] = {
                kind: value.copy_(kinds[kind]) for kind, value in fresh.items()
            }

    def _state_after_a_step(self, like: nn.Parameter) -> dict[str, Tensor]:
        """What the class keeps of a parameter of this shape, on the devices where it keeps that."""
        parameter = nn.Parameter(torch.zeros_like(like))
        parameter.grad = torch.zeros_like(like)
        optimizer = self._kind([parameter], **self._given)
        optimizer.step()
        return dict(optimizer.state[parameter])
