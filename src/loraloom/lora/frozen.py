"""What LoRA needs of a frozen linear layer, independent of how its weight is stored: dense, quantised, sharded.

Only this file asks for the type of a weight. A further form is one class and one line: ``register(Int8Linear, Int8)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loraloom.lora import matmul

HALF = (torch.float16, torch.bfloat16)
_COMPUTED = frozenset({*HALF, torch.float32, torch.float64})


class FrozenLinear(Protocol):
    """``y = x Wᵀ + bias``, W [out, in]. Only the bias may train."""

    @property
    def bias(self) -> Tensor | None: ...
    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's inputs and outputs; a slot's tensors derive theirs from it (``adapter_dtype``)."""

    @property
    def device(self) -> torch.device: ...
    @property
    def nbytes(self) -> int:
        """Bytes of the weight as stored, the bias aside."""

    @property
    def merge_obstacle(self) -> str | None:
        """Why no update can be merged into the weight, to follow "because it is"; None if one can."""

    def supports(self, x: Tensor) -> bool:
        """Whether ``matmul`` can replace the module's own forward on ``x``."""

    def matmul(self, x: Tensor) -> Tensor:
        """``x Wᵀ + bias`` in the dtype of ``x``: x [..., in] → [..., out], and no view."""

    def matmul_grad_input(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        """``dy W``, added to ``onto`` if given: dy [rows, out] → [rows, in]."""

    def dequantize(self) -> Tensor:
        """W as an ordinary tensor [out, in]."""


class DenseLinear:
    """An ordinary weight [out, in]."""

    __slots__ = ("bias", "weight")
    merge_obstacle: str | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    @property
    def shape(self) -> tuple[int, int]:
        out, width = self.weight.shape
        return out, width

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def supports(self, x: Tensor) -> bool:
        return self.weight.dtype is x.dtype and not self.weight.requires_grad

    def matmul(self, x: Tensor) -> Tensor:
        return matmul.linear(x, self.weight, self.bias)

    def matmul_grad_input(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        return matmul.matmul_grad_input(dy, self.weight, onto)

    def dequantize(self) -> Tensor:
        return self.weight.detach()


class OpaqueLinear:
    """A weight that only its module can use: sharded by FSDP, or quantised by a library that nobody registered."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module

    @property
    def bias(self) -> Tensor | None:
        return getattr(self._module, "bias", None)

    @property
    def shape(self) -> tuple[int, int]:
        return self._module.out_features, self._module.in_features

    @property
    def dtype(self) -> torch.dtype:
        return next((t.dtype for t in [*self._stored(), self.bias] if t is not None and _computes(t)), torch.float32)

    @property
    def device(self) -> torch.device:
        return self._stored()[0].device

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._stored())

    @property
    def merge_obstacle(self) -> str | None:
        weight = getattr(self._module, "weight", None)
        dense = isinstance(weight, Tensor) and weight.shape == self.shape and _computes(weight)
        return None if dense else f"a {type(self._module).__name__}, whose weight is quantised"

    def supports(self, x: Tensor) -> bool:
        return False

    def matmul(self, x: Tensor) -> Tensor:
        out: Tensor = self._module(x)
        return out

    def matmul_grad_input(self, dy: Tensor, onto: Tensor | None = None) -> Tensor:
        dx = dy @ self.dequantize().to(dy.dtype)
        return dx if onto is None else onto.add_(dx)

    def dequantize(self) -> Tensor:
        with torch.no_grad():
            columns = self.matmul(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))
            return (columns if self.bias is None else columns - self.bias).T

    def _stored(self) -> list[Tensor]:
        """The module's tensors without the bias. FSDP may have put the weight there as a plain attribute."""
        held = {**vars(self._module), **self._module._parameters, **self._module._buffers}
        return [t for name, t in held.items() if isinstance(t, Tensor) and name != "bias"]


def _computes(tensor: Tensor) -> bool:
    return tensor.dtype in _COMPUTED


def adapter_dtype(base: torch.dtype, autocast: bool) -> torch.dtype:
    """The dtype of a slot's tensors beside a layer that computes in ``base``: float32 beside half precision."""
    return base if base in _COMPUTED and not (autocast and base in HALF) else torch.float32


#: The class of a module → how its weight is read.
_MODULES: dict[type[nn.Module], Callable[[Any], FrozenLinear]] = {}
#: The class of a weight [out, in] of an ``nn.Linear`` → the same, from the weight and the bias.
_WEIGHTS: dict[type[Tensor], Callable[[Any, Tensor | None], FrozenLinear]] = {nn.Parameter: DenseLinear}


def register(kind: type[nn.Module] | type[Tensor], make: Callable[..., FrozenLinear]) -> None:
    """Let ``make`` read modules of class ``kind``, or weights of that class in an ``nn.Linear``.

    ``make(module)`` for a class of modules, ``make(weight, bias)`` for a class of tensors, whose own class must be
    ``kind`` itself.
    """
    if issubclass(kind, nn.Module):
        _MODULES[kind] = make
        registered.cache_clear()
    else:
        _WEIGHTS[kind] = make


def frozen_linear(module: nn.Module) -> FrozenLinear:
    """The weight of ``module``: an ``nn.Linear``, transformers' Conv1D, or of a class that is registered."""
    cls: Any = type(module)
    own = registered(cls)
    if own is not None:
        return own(module)
    weight: Any = module._parameters.get("weight")
    make = _WEIGHTS.get(type(weight))
    if make is None or (make is DenseLinear and weight.dtype not in _COMPUTED):
        return OpaqueLinear(module)
    return make(weight.T if is_conv1d(cls) else weight, module._parameters.get("bias"))


@cache
def registered(cls: Any) -> Callable[[Any], FrozenLinear] | None:
    """The reader that is registered for this class or one of its bases."""
    return next((_MODULES[base] for base in cls.__mro__ if base in _MODULES), None)


@cache
def is_conv1d(cls: Any) -> bool:
    """Whether it is transformers' Conv1D, whose weight is [in, out]. Compared by name, so that nothing is imported."""
    return any((base.__module__, base.__name__) == ("transformers.pytorch_utils", "Conv1D") for base in cls.__mro__)


def is_dense(weight: Tensor | None) -> bool:
    """Whether it is an ordinary parameter, of a dtype that products are computed in."""
    return weight is not None and _WEIGHTS.get(type(weight)) is DenseLinear and _computes(weight)
