"""The maths of LoRA over plain tensors. Knows no module, no config, no route.

``A`` has r rows, ``B`` has r columns. Products are taken in the dtype of ``x``, so a half-precision base computes in
half precision while the factors keep their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.lora.dropout import Dropped


def lora_linear(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``scale · (x Aᵀ) Bᵀ``. Shapes: x [..., in], a [r, in], b [out, r] → [..., out]. (Hu et al. 2021, eq. 3)"""
    return F.linear(F.linear(x, a.to(x.dtype)) * scale, b.to(x.dtype))


def lora_embedding(
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    padding_idx: int | None = None,
    by_frequency: bool = False,
) -> Tensor:
    """``scale · B A[:, ids]``. Shapes: ids [...] whole numbers, a [r, vocabulary], b [dim, r] → [..., dim].

    The column of ``padding_idx`` gets no gradient, as in the frozen table. No norm is clipped here: ``max_norm``
    is a property of the table, not of the update.
    """
    return F.linear(F.embedding(ids, a.T, padding_idx, scale_grad_by_freq=by_frequency) * scale, b)


def lora_conv(
    x: Tensor, a: Tensor, b: Tensor, scale: float, convolve: Callable[[Tensor, Tensor], Tensor], groups: int
) -> Tensor:
    """``scale · B(A(x))``: ``A`` with the frozen layer's window, ``B`` of width one.

    Shapes: x [rows, in, *space], a [r, in, *kernel], b [out, r / groups, 1...] → [rows, out, *space'].
    ``convolve(x, a)`` is the frozen layer's own convolution: its stride, dilation and padding mode, ungrouped.
    """
    hidden = convolve(x, a.to(x.dtype)) * scale
    pointwise: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[a.dim() - 3]
    update: Tensor = pointwise(hidden, b.to(x.dtype), groups=groups)
    return update


def product(a: Tensor, b: Tensor) -> Tensor:
    """``B A`` in at least float32: a [r, ...in], b [out, r, 1...] → [out, ...in]."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    delta: Tensor = torch.tensordot(b.to(dtype).flatten(1), a.to(dtype), dims=1)
    return delta


# -- projections that read one input ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer and the update beside it: weight [out, in], bias [out] or None, a [r, in], b [out, r]."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float


def lora_projections(x: Tensor, projections: Sequence[Projection], dropped: Dropped | None = None) -> list[Tensor]:
    """``x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ`` for several projections of one ``x``: [..., in] → [..., out] each.

    What is kept for the backward is ``x`` once, ``x Aᵀ`` of all projections, and the factors in the dtype of ``x``;
    the dropout mask is made again. Gradients flow to x, biases, a and b; never to weights. They are exact, and cannot
    be differentiated a second time.
    """
    each = len(projections)
    columns = zip(*((p.weight, p.bias, p.a, p.b) for p in projections), strict=True)
    scales = tuple(p.scale for p in projections)
    out: tuple[Tensor, ...] = _Projections.apply(x, dropped, scales, *(t for column in columns for t in column))  # type: ignore[no-untyped-call]
    assert len(out) == each
    return list(out)


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Dropped | None, scales: tuple[float, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n = len(scales)
        weights, biases, a, b = (tensors[i * n : (i + 1) * n] for i in range(4))
        a_low, b_low = ([factor.to(x.dtype) for factor in factors] for factors in (a, b))
        rows = seen = _rows(x)
        if dropped is not None:
            seen, scales = _rows(dropped.apply(x)), tuple(scale * dropped.gain for scale in scales)
        hidden, out = [], []
        # Each on its own: the answer of one has the same bits whether or not others are computed beside it.
        for weight, bias, a_i, b_i, scale in zip(weights, biases, a_low, b_low, scales, strict=True):
            hidden.append(torch.mm(seen, a_i.T))
            y = F.linear(rows, weight, bias).addmm_(hidden[-1], b_i.T, alpha=scale)
            out.append(y.view(*x.shape[:-1], weight.shape[0]))
        ctx.save_for_backward(x, *hidden, *a_low, *b_low)
        ctx.weights, ctx.scales, ctx.dropped = weights, scales, dropped
        ctx.dtypes = (a[0].dtype, b[0].dtype)
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, *kept = ctx.saved_tensors
        n, needed = len(ctx.scales), ctx.needs_input_grad
        hidden, a, b = (kept[i * n : (i + 1) * n] for i in range(3))
        dx: Tensor | None = None
        d_hidden: list[Tensor] = []
        d_bias: list[Tensor | None] = []
        d_b: list[Tensor | None] = []
        for i, (grad, h_i) in enumerate(zip(grads, hidden, strict=True)):
            if grad is None:  # an output that the loss does not depend on
                d_hidden.append(torch.zeros_like(h_i))
                d_bias.append(None)
                d_b.append(None)
                continue
            dy = _rows(grad)
            d_hidden.append(torch.mm(dy, b[i]).mul_(ctx.scales[i]))
            d_bias.append(dy.sum(0) if needed[3 + n + i] else None)
            # (hᵀ dy)ᵀ and not dyᵀ h: the long side last is the faster product.
            d_b.append(_as(torch.mm(h_i.T, dy).T, ctx.dtypes[1]).mul_(ctx.scales[i]) if needed[3 + 3 * n + i] else None)
            if needed[0]:
                dx = torch.mm(dy, ctx.weights[i]) if dx is None else dx.addmm_(dy, ctx.weights[i])
        # One product for all A, above and below: a thin matrix costs hardly less than a wider one.
        below, a_all = (d_hidden[0], a[0]) if n == 1 else (torch.cat(d_hidden, 1), torch.cat(a))
        d_a: Sequence[Tensor | None] = [None] * n
        if any(needed[3 + 2 * n : 3 + 3 * n]):
            seen = x if ctx.dropped is None else ctx.dropped.apply(x)
            d_a = torch.split(torch.mm(below.T, _rows(seen)).to(ctx.dtypes[0]), [a_i.shape[0] for a_i in a])
        if dx is not None:
            if ctx.dropped is None:
                dx.addmm_(below, a_all)
            else:
                dx.add_(_rows(ctx.dropped.apply(torch.mm(below, a_all).view(x.shape))))
            dx = dx.view(x.shape)
        return (dx, None, None, *[None] * n, *d_bias, *d_a, *d_b)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in ``dtype``, in one pass."""
    return torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
