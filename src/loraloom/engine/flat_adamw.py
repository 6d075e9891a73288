"""AdamW over many small tensors as if they were one: a step is a handful of calls, whatever their number.

An adapter is hundreds of small tensors. Gathering their gradients into one, their norm and the update are one call
each; the parameters are views of one tensor and follow by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FlatAdamW:
    """AdamW, by torch's own fused step. A parameter that never had a gradient stays as it is.

    Args:
        parameters: each with what the learning rate is multiplied with for it.
    """

    def __init__(self, parameters: Sequence[tuple[nn.Parameter, float]], weight_decay: float) -> None:
        self._parameters = list(parameters)
        self._weight_decay = weight_decay
        #: those that move together, which had their first gradient in one step and share rate, dtype and device
        self._groups: list[list[int]] = []
        self._optimizer: torch.optim.AdamW | None = None

    def step(
        self,
        learning_rate: float,
        max_norm: float,
        scale: float = 1.0,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> float:
        """Divide the gradients by ``scale``, clip them together to ``max_norm``, update, and let the gradients go.

        ``reduce`` changes the gathered gradients first, as a sum over processes does. Returns their norm before
        clipping. Where it is not finite, nothing is changed.
        """
        known = {i for members in self._groups for i in members}
        new = [i for i, (p, _) in enumerate(self._parameters) if i not in known and p.grad is not None]
        self._take(new)
        if self._optimizer is None:
            return 0.0
        norms = []
        for group, members in zip(self._optimizer.param_groups, self._groups, strict=True):
            parameters = [self._parameters[i][0] for i in members]
            flat = self._current(group, parameters)
            flat.grad = torch.cat(
                [(p.new_zeros(p.shape) if p.grad is None else p.grad).reshape(-1) for p in parameters]
            )
            if reduce is not None:
                reduce(flat.grad)
            norms.append(torch.linalg.vector_norm(flat.grad))
            group["lr"] = learning_rate * self._parameters[members[0]][1]
            for parameter in parameters:
                parameter.grad = None
        norm = math.hypot(*torch.stack([n.to(norms[0]) for n in norms]).tolist()) / scale
        if math.isfinite(norm):
            factor = (max_norm / (norm + 1e-6) if norm > max_norm else 1.0) / scale
            for group in self._optimizer.param_groups:
                if factor != 1.0:
                    group["params"][0].grad.mul_(factor)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def _take(self, members: Sequence[int]) -> None:
        kinds: dict[Any, list[int]] = {}
        for i in members:
            parameter, times = self._parameters[i]
            kinds.setdefault((times, parameter.dtype, parameter.device), []).append(i)
        for kind in kinds.values():
            self._groups.append(kind)
            group = {"params": [_gathered([self._parameters[i][0] for i in kind])]}
            if self._optimizer is None:
                self._optimizer = torch.optim.AdamW([group], weight_decay=self._weight_decay, fused=True)
            else:
                self._optimizer.add_param_group(group)

    def _current(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> nn.Parameter:
        """The tensor that ``parameters`` are views of: another one after the model was moved."""
        flat: nn.Parameter = group["params"][0]
        place = flat.data_ptr()
        for parameter in parameters:
            if parameter.data_ptr() != place or parameter.device != flat.device:
                break
            place += parameter.numel() * parameter.element_size()
        else:
            return flat
        assert self._optimizer is not None
        group["params"] = [_gathered(parameters)]
        moved: nn.Parameter = group["params"][0]
        state = self._optimizer.state.pop(flat, {})
        self._optimizer.state[moved] = _beside(moved, state)
        return moved

    def state(self) -> dict[str, Tensor]:
        """Who moves together, their moments and counts of steps: what a file must hold to resume."""
        out: dict[str, Tensor] = {}
        for number, members in enumerate(self._groups):
            assert self._optimizer is not None
            (flat,) = self._optimizer.param_groups[number]["params"]
            out[f"{number}.members"] = torch.tensor(members)
            out |= {f"{number}.{key}": value for key, value in self._optimizer.state[flat].items()}
        return out

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state()`` of an optimizer over the same parameters; this one took no step yet."""
        for number in range(sum(key.endswith(".members") for key in state)):
            self._take(state[f"{number}.members"].tolist())
            assert self._optimizer is not None
            (flat,) = self._optimizer.param_groups[-1]["params"]
            mine = {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{number}.")}
            del mine["members"]
            self._optimizer.state[flat] = {key: value.clone() for key, value in _beside(flat, mine).items()}


def _beside(flat: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the device of ``flat``, where the fused step reads the count of steps too; the count keeps its dtype."""
    return {key: value.to(flat) if value.dim() else value.to(flat.device) for key, value in state.items()}


def _gathered(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """One tensor with the numbers of all, which become views of it."""
    flat = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.data = flat.detach()[start:stop].view(parameter.shape)
        start = stop
    return flat
