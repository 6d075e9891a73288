"""LoRA on a parameter that is not a layer's weight: stacked weights of experts, a router's matrix.

The layout is PEFT's. For ``E`` experts A is [E · r, in], one expert's rows after another; B is [out, r · E], one rank's
columns after another. A matrix has E = 1. The module runs with ``W + scale · B A`` in place of ``W``, so there is no
dropout on its input, and rows of several adapters cannot share a forward: see ``lora.mixed``.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loraloom.lora.layer import LoraLayer
from loraloom.lora.variants.base import Shapes

#: Held while a parameter is exchanged in the module itself, which other threads would see.
_exchange = threading.RLock()


class LoraParameter(LoraLayer):
    """Adapts one parameter of ``base_layer``, which may be another ``LoraParameter`` of the same module.

    ``name`` is the parameter's, with the module's before it.
    """

    kind = "Parameter"
    peft_class = ("peft.tuners.lora.layer", "ParamWrapper")

    @property
    def parameter_name(self) -> str:
        return self.name.rpartition(".")[2]

    def get_base_layer(self) -> nn.Module:
        """The module that holds the parameter."""
        inner: nn.Module = self.base_layer
        while isinstance(inner, LoraParameter):
            inner = inner.base_layer
        return inner

    @property
    def experts(self) -> int:
        """The number of stacked matrices."""
        return self.frozen_weight.shape[0] if self.frozen_weight.dim() == 3 else 1

    @staticmethod
    def shapes(base: nn.Module, r: int, name: str) -> Shapes:
        """For [E, out, in] or [out, in]; a module that says ``is_transposed`` holds [E, in, out]."""
        shape = base._parameters[name.rpartition(".")[2]].shape  # type: ignore[union-attr]
        if len(shape) == 2:
            return {"lora_A": (r, shape[1]), "lora_B": (shape[0], r)}
        experts, rows, columns = shape
        if _is_transposed(base):
            rows, columns = columns, rows
        return {"lora_A": (experts * r, columns), "lora_B": (rows, r * experts)}

    # -- forward ------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        updated: dict[str, Tensor] = {}
        layer: nn.Module = self
        while isinstance(layer, LoraParameter):
            if slots := layer.slots_of_forward():
                updated[layer.parameter_name] = layer.updated(slots)
            layer = layer.base_layer
        return call_with(layer, updated, args, kwargs) if updated else layer(*args, **kwargs)

    def slots_of_forward(self) -> tuple[str, ...]:
        """The slots whose updates the parameter gets in this forward, for all rows."""
        route = self.dispatcher.route
        if self.merged:
            return ()
        if any(block.slot in self.r for block in route.blocks):
            raise self.dispatcher.indivisible(self.name, self.frozen_weight.shape)
        return tuple(slot for slot in route.active if slot in self.r)

    def updated(self, slots: tuple[str, ...]) -> Tensor:
        """The parameter plus the updates of ``slots``, rounded once to the parameter's dtype, as when merged."""
        weight = self.frozen_weight
        out: Tensor = weight
        with torch.autocast(weight.device.type, enabled=False):
            for slot in slots:
                left, right = self.pair(slot)
                out = out.to(torch.promote_types(out.dtype, left.dtype))
                add = torch.baddbmm if weight.dim() == 3 else torch.addmm
                out = add(out, left.to(out.dtype), right.to(out.dtype), alpha=self.scaling[slot])
        return out.to(weight.dtype)

    def pair(self, slot: str) -> tuple[Tensor, Tensor]:
        """Two tensors whose (batched) product has the parameter's shape."""
        flat_a, flat_b = self.factors(slot)
        if self.frozen_weight.dim() == 2:
            return flat_b, flat_a
        experts = self.frozen_weight.shape[0]
        a = flat_a.view(experts, -1, flat_a.shape[1])  # [E, r, in]
        b = flat_b.view(flat_b.shape[0], -1, experts).permute(2, 0, 1)  # [E, out, r]
        return (a.mT, b.mT) if _is_transposed(self.get_base_layer()) else (b, a)

    # -- merging ------------------------------------------------------------------------------------------------

    def merge_obstacle(self) -> str | None:
        return None  # the module computes with W + scale · B A, merged or not

    def delta(self, slot: str) -> Tensor:
        left, right = (factor.detach() for factor in self.pair(slot))
        dtype = torch.promote_types(left.dtype, torch.float32)
        return left.to(dtype) @ right.to(dtype) * self.scaling[slot]

    def _put_weight(self, weight: Any) -> None:
        self.get_base_layer()._parameters[self.parameter_name] = weight

    @property
    def live_weight(self) -> Tensor:
        found = self.get_base_layer()._parameters[self.parameter_name]
        assert found is not None
        return found

    def extra_repr(self) -> str:
        return ", ".join([self.parameter_name, super().extra_repr()])


def parameter_obstacle(module: nn.Module, name: str) -> str | None:
    """Why the parameter cannot be adapted, or None."""
    parameter = module._parameters[name]
    assert parameter is not None
    if parameter.dim() not in (2, 3):
        return f"has {parameter.dim()} dimensions, and LoRA needs a matrix, or a stack of them (2 or 3)"
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        return f"is stored as {str(parameter.dtype).removeprefix('torch.')}, to which no update can be added"
    return None


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", False))


def call_with(module: nn.Module, parameters: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
    """``module(*args, **kwargs)`` with ``parameters`` replaced; calls in other threads still use the module's."""
    if torch.compiler.is_compiling():
        return functional_call(module, dict(parameters), args, kwargs)
    if "forward" in vars(module):  # another library's, bound to this object
        with _exchange:
            return functional_call(module, dict(parameters), args, kwargs)
    twin = object.__new__(type(module))
    vars(twin).update(vars(module), _parameters={**module._parameters, **parameters})
    return twin(*args, **kwargs)
