"""AdamW over many small tensors as if they were one: a step is a handful of calls, whatever their number.

An adapter is hundreds of small tensors. Gathering their gradients into one, their norm and the update are one call
each; the parameters are views of one flat tensor and follow by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.engine.optimizer_state import by_parameter, check_kinds

#: What is kept of each parameter, of its shape, beside the count of steps.
_MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatAdamW:
    """AdamW, by torch's own fused step. A parameter that never had a gradient stays as it is.

    Args:
        parameters: name → parameter, and the factor on its learning rate; in a sequence, positions are the names.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[nn.Parameter, float]] | Sequence[tuple[nn.Parameter, float]],
        weight_decay: float,
    ) -> None:
        if not isinstance(parameters, Mapping):
            parameters = {str(number): one for number, one in enumerate(parameters)}
        self._names, self._parameters = list(parameters), list(parameters.values())
        #: positions of the parameters in one flat tensor: of one learning rate, dtype, device and first step
        self._groups: list[list[int]] = []
        self._optimizer = torch.optim.AdamW([torch.empty(0)], weight_decay=weight_decay, fused=True)
        self._optimizer.param_groups.clear()  # torch makes none without a parameter

    def step(
        self,
        learning_rate: float,
        max_norm: float,
        scale: float = 1.0,
        reduce: Callable[[Tensor], None] | None = None,
    ) -> float:
        """Divide the gradients by ``scale``, clip their common norm to ``max_norm``, update, and free the gradients.

        ``reduce`` changes the gathered gradients first, as a sum over processes does. Returns their norm before
        clipping. If the norm is not finite, nothing is changed.
        """
        known, before = {i for members in self._groups for i in members}, len(self._groups)
        self._add_groups([i for i, (p, _) in enumerate(self._parameters) if i not in known and p.grad is not None])
        if not self._groups:
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
        if not math.isfinite(norm):  # so that a group is known by its count of steps: a new one has taken none
            del self._groups[before:], self._optimizer.param_groups[before:]
        return norm

    def _add_groups(self, members: Sequence[int]) -> None:
        kinds: dict[Any, list[int]] = {}
        for i in members:
            parameter, factor = self._parameters[i]
            kinds.setdefault((factor, parameter.dtype, parameter.device), []).append(i)
        for kind in kinds.values():
            self._groups.append(kind)
            self._optimizer.add_param_group({"params": [_gathered([self._parameters[i][0] for i in kind])]})

    def _current(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> nn.Parameter:
        """The flat tensor that ``parameters`` are views of: a new one after the model was moved."""
        flat: nn.Parameter = group["params"][0]
        place = flat.data_ptr()
        for parameter in parameters:
            if parameter.data_ptr() != place or parameter.device != flat.device:
                break
            place += parameter.numel() * parameter.element_size()
        else:
            return flat
        group["params"] = [_gathered(parameters)]
        moved: nn.Parameter = group["params"][0]
        state = self._optimizer.state.pop(flat, {})
        self._optimizer.state[moved] = _beside(moved, state)
        return moved

    def state_dict(self) -> dict[str, Tensor]:
        """``exp_avg/NAME``, ``exp_avg_sq/NAME`` and ``step/NAME`` of each parameter that had a gradient; views."""
        out: dict[str, Tensor] = {}
        for members, group in zip(self._groups, self._optimizer.param_groups, strict=True):
            parameters = [self._parameters[i][0] for i in members]
            for kind, flat in self._optimizer.state[group["params"][0]].items():
                for i, part in zip(members, _split(flat, parameters), strict=True):
                    out[f"{kind}/{self._names[i]}"] = part
        return out

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the ``state_dict`` of an optimizer over parameters of these names. This one has taken no step yet.

        Raises:
            AdapterError: a parameter that is unknown here, or a tensor that is missing, unknown or of another shape.
        """
        known = dict(zip(self._names, (parameter for parameter, _ in self._parameters), strict=True))
        saved = by_parameter(state, known)
        for name, kinds in saved.items():
            check_kinds(name, kinds, dict.fromkeys(_MOMENTS, known[name]) | {"step": torch.empty(())})
        counts = {i: float(saved[name]["step"]) for i, name in enumerate(self._names) if name in saved}
        for count in sorted(set(counts.values()), reverse=True):  # as they came: the first group took the most steps
            self._add_groups([i for i in counts if counts[i] == count])
        for members, group in zip(self._groups, self._optimizer.param_groups, strict=True):
            mine, flat = [saved[self._names[i]] for i in members], group["params"][0]
            joined = {kind: torch.cat([one[kind].reshape(-1) for one in mine]) for kind in _MOMENTS}
            self._optimizer.state[flat] = _beside(flat, {**joined, "step": mine[0]["step"].clone()})


def _split(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """What is kept of each parameter, of its shape. A number, the count of steps, is that of all."""
    if not flat.dim():
        return [flat] * len(parameters)
    parts = torch.split(flat, [parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


def _beside(flat: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the device of ``flat``, where the fused step reads the count of steps too; the count keeps its dtype."""
    return {key: value.to(flat) if value.dim() else value.to(flat.device) for key, value in state.items()}


def _gathered(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """One flat tensor with the numbers of all ``parameters``, which become views of it."""
    flat = nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    start = 0
    for parameter in parameters:
        stop = start + parameter.numel()
        parameter.data = flat.detach()[start:stop].view(parameter.shape)
        start = stop
    return flat
