"""The maths of LoRA over plain tensors. Knows no module, no config, no route.

``A`` has r rows, ``B`` has r columns. Products are taken in the dtype of ``x``, so a half-precision base computes in
half precision while the factors keep their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.lora.dropout import Dropped, masked


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


class Projection(NamedTuple):
    """A frozen linear layer and the update beside it: weight [out, in], bias [out] or None, a [r, in], b [out, r]."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float


def lora_projections(
    x: Tensor, projections: Sequence[Projection], dropped: Dropped | None = None
) -> tuple[Tensor, ...]:
    """``x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ`` for several projections of one ``x``: [..., in] → [..., out] each.

    What is kept for the backward is ``x`` once, ``x Aᵀ`` of all projections, and the factors in the dtype of ``x``;
    the dropout mask is made again. Gradients flow to x, biases, a and b; never to weights. They are exact, and cannot
    be differentiated a second time.
    """
    weights, biases, a, b, scales = zip(*projections, strict=True)
    out: tuple[Tensor, ...] = _Projections.apply(x, dropped, scales, *weights, *biases, *a, *b)  # type: ignore[no-untyped-call]
    return out


class _Projections(torch.autograd.Function):
    # Written for few calls: with small models and batches it is their number that takes the time.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Dropped | None, scales: tuple[float, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n, dtype = len(scales), x.dtype
        low = [tensor.to(dtype) for tensor in tensors[2 * n :]]
        rows = seen = _rows(x)
        if dropped is not None:
            seen, scales = _rows(dropped.apply(x)), tuple([scale * dropped.gain for scale in scales])
        hidden, out = [], []
        # Each on its own: the answer of one has the same bits whether or not others are computed beside it.
        for i, scale in enumerate(scales):
            h = torch.mm(seen, low[i].T)
            y = F.linear(rows, tensors[i], tensors[n + i]).addmm_(h, low[n + i].T, alpha=scale)
            hidden.append(h)
            out.append(y if rows is x else y.view(*x.shape[:-1], y.shape[-1]))
        ctx.save_for_backward(x, *hidden, *low)
        ctx.weights, ctx.scales, ctx.dropped = tensors[:n], scales, dropped
        ctx.dtypes = tensors[2 * n].dtype, tensors[3 * n].dtype
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the gradient of a LoRA layer cannot be differentiated again (create_graph=True)")
        x, *kept = ctx.saved_tensors
        scales, weights, dropped, needed = ctx.scales, ctx.weights, ctx.dropped, ctx.needs_input_grad
        n = len(scales)
        hidden, a, b = kept[:n], kept[n : 2 * n], kept[2 * n :]
        need_x, need_bias, need_a, need_b = needed[0], *(needed[3 + k * n : 3 + (k + 1) * n] for k in (1, 2, 3))
        dtype_a, dtype_b = ctx.dtypes
        any_number = x.new_empty(())  # addmm's first argument, which beta=0 leaves unread
        dx: Tensor | None = None
        below: list[Tensor] = []
        d_bias: list[Tensor | None] = [None] * n
        d_b: list[Tensor | None] = [None] * n
        for i, grad in enumerate(grads):
            if grad is None:  # an output that the loss does not depend on
                below.append(torch.zeros_like(hidden[i]))
                continue
            dy, scale = _rows(grad), scales[i]
            below.append(torch.addmm(any_number, dy, b[i], beta=0, alpha=scale))
            if need_bias[i]:
                d_bias[i] = dy.sum(0)
            if need_b[i]:
                # (hᵀ dy)ᵀ and not dyᵀ h: the long side last is the faster product.
                across = torch.addmm(any_number, hidden[i].T, dy, beta=0, alpha=scale).T
                d_b[i] = torch.empty(across.shape, dtype=dtype_b, device=x.device).copy_(across)
            if need_x:
                dx = torch.mm(dy, weights[i]) if dx is None else dx.addmm_(dy, weights[i])
        # One product for all A, above and below: a thin matrix costs hardly less than a wider one.
        joined, a_all = (below[0], a[0]) if n == 1 else (torch.cat(below, 1), torch.cat(a))
        each_a: Sequence[Tensor | None] = [None] * n
        mask = None if dropped is None else dropped.mask(x)
        if True in need_a:
            d_a = torch.mm(joined.T, _rows(x if mask is None else masked(x, mask))).to(dtype_a)
            each_a = (d_a,) if n == 1 else torch.split(d_a, [a_i.shape[0] for a_i in a])
        if dx is not None:
            if mask is None:
                dx.addmm_(joined, a_all)
            else:
                dx.add_(_rows(masked(torch.mm(joined, a_all).view(x.shape), mask)))
            dx = dx.view(x.shape)
        return (dx, None, None, *[None] * n, *d_bias, *each_a, *d_b)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


# -- norms --------------------------------------------------------------------------------------------------------


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scale: float, squared: Tensor | None = None) -> Tensor:
    """``‖W + scale · B A‖`` of each row, without the [out, in] product: what DoRA divides by (Liu et al. 2024, eq. 5).

    Shapes: weight [out, in], a [r, in], b [out, r] → [out], in at least float32. ``squared`` is ``‖W‖²`` of each row,
    which is frozen and need be computed once. From ``‖W‖² + 2s (W Aᵀ)·B + s² (B A Aᵀ)·B``, row by row.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    if squared is None:
        squared = weight.to(dtype).square().sum(1)
    cross = torch.mm(weight, a.T.to(weight.dtype)).to(dtype)
    total = squared + (b * (2 * scale * cross + scale**2 * torch.mm(b, torch.mm(a, a.T)))).sum(1)
    return total.clamp_min(0).sqrt()
