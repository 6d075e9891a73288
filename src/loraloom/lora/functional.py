"""The maths of LoRA over plain tensors. Knows no module, no config, no route.

``A`` has r rows, ``B`` has r columns. Products are taken in the dtype of ``x``, so a half-precision base computes in
half precision while the factors keep their own dtype; ``lora.products`` says where that is not so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.lora import matmul
from loraloom.lora.dropout import Dropped, masked, masks


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


class Frozen(NamedTuple):
    """A frozen linear layer: weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None


class Update(NamedTuple):
    """What one slot adds beside a frozen layer: a [r, in], b [out, r]."""

    a: Tensor
    b: Tensor
    scale: float


class SlotGroup(NamedTuple):
    """Slots whose rows lie one after another, equally many each, so that one batched product serves all of them.

    ``start:stop`` are their rows together, of the first dimension of ``x``; None is all of it. ``dropped`` has the
    dropout of each slot. ``updates`` has, for each projection, one update for each slot, or none where the slots leave
    that projection alone.
    """

    start: int
    stop: int | None
    dropped: tuple[Dropped | None, ...]
    updates: tuple[tuple[Update, ...], ...]


#: Ranks are filled up with zeros to a multiple of this, the numbers that a vector register holds. It costs nothing and
#: is exact, and then a slot's numbers have the same bits whatever ranks stand beside it.
RANKS = 16


def lora_projections(x: Tensor, frozen: Sequence[Frozen], lanes: Sequence[SlotGroup]) -> tuple[Tensor, ...]:
    """``x Wᵀ + bias + scale · (drop(x) Aᵀ) Bᵀ`` for several projections of one ``x``: [..., in] → [..., out] each.

    Each row's update is that of its slot in ``lanes``; rows of different slots never meet in a product, and rows in no
    lane get none. What is kept for the backward is ``x`` once, ``x Aᵀ``, and the factors in the dtype of ``x``;
    dropout masks are made again. Gradients flow to x, biases, a and b; never to weights. They are exact, and cannot be
    differentiated a second time.
    """
    factors = [factor for lane in lanes for slots in lane.updates for one in slots for factor in (one.a, one.b)]
    weights, biases = zip(*frozen, strict=True)
    dtype = matmul.arithmetic(x, differentiated=torch.is_grad_enabled())
    out: tuple[Tensor, ...] = _Projections.apply(x, lanes, dtype, *weights, *biases, *factors)  # type: ignore[no-untyped-call]
    return out


class _Projections(torch.autograd.Function):
    # Written for few calls: with small models and batches it is their number that takes the time. Where a lane has one
    # slot its tensors are matrices, else batches of them.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lanes: Sequence[SlotGroup], dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n = (len(tensors) - 2 * sum(len(slots) for lane in lanes for slots in lane.updates)) // 2
        wide = x.to(dtype)
        rows = _rows(wide)
        # What is returned is no view: a model may change it in place.
        whole = [matmul.linear(wide, tensors[i], tensors[n + i]) for i in range(n)]
        out = [_rows(y) for y in whole]
        kept: list[Tensor] = []
        for lane in lanes:
            seen = _part(rows, lane, len(x))
            if any(lane.dropped):
                seen = _part(_rows(masked(wide[lane.start : lane.stop], _mask(wide, lane))), lane)
            places = _places(lane)
            joined, hidden = _all_a(lane, places, dtype), []
            for i, place in places:
                # Each on its own: the answer of one has the same bits whether or not others are computed beside it.
                hidden.append(_mm(seen, joined[..., place, :].mT))
                kept.append(_all_b(lane.updates[i], place.stop - place.start, _scales(lane, i, x)).to(dtype).mT)
                _add_mm(_part(out[i], lane, len(x)), hidden[-1], kept[-1])
            kept += [joined, *hidden]
        ctx.save_for_backward(*([x, *kept] if lanes else ()))
        ctx.weights, ctx.lanes, ctx.shape, ctx.dtypes = tensors[:n], lanes, x.shape, (x.dtype, dtype)
        ctx.set_materialize_grads(False)
        return tuple(whole if wide is x else [y.to(x.dtype) for y in whole])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the gradient of a LoRA layer cannot be differentiated again (create_graph=True)")
        kept: list[Tensor] = list(ctx.saved_tensors)
        own, dtype = ctx.dtypes
        x: Any = kept.pop(0).to(dtype) if kept else None
        weights, needed, n = ctx.weights, ctx.needs_input_grad, len(ctx.weights)
        dys = [None if grad is None else _rows(grad.to(dtype)) for grad in grads]
        d_bias = [None if dy is None or not needed[3 + n + i] else dy.sum(0) for i, dy in enumerate(dys)]
        dx: Tensor | None = None
        if needed[0]:
            for dy, weight in zip(dys, weights, strict=True):
                if dy is not None:
                    dx = matmul.back(dy, weight, dx)
        factors: list[Tensor | None] = []
        for lane in ctx.lanes:
            places = _places(lane)
            m = len(places)
            bs, joined, hidden = kept[:m], kept[m], kept[m + 1 : 2 * m + 1]
            del kept[: 2 * m + 1]
            parts = [None if (dy := dys[i]) is None else _part(dy, lane, len(x)) for i, _ in places]
            below = [
                torch.zeros_like(h) if dy is None else _mm(dy, b.mT)  # zero: the loss does not depend on that output
                for h, dy, b in zip(hidden, parts, bs, strict=True)
            ]
            together = below[0] if len(below) == 1 else torch.cat(below, -1)
            mask = _mask(x, lane) if any(lane.dropped) else None
            mine = x[lane.start : lane.stop]
            d_a = None
            if True in needed[3 + 2 * n :]:
                # One product for all A: a thin matrix costs hardly less than a wider one.
                d_a = _mm(together.mT, _part(_rows(mine if mask is None else masked(mine, mask)), lane))
            all_a = _each_a(d_a, lane, places)
            for (i, _), h, dy, d_as in zip(places, hidden, parts, all_a, strict=True):
                slots = lane.updates[i]
                d_bs: Sequence[Tensor | None] = [None] * len(slots)
                if dy is None:  # no gradient, as if it had been computed apart, and not one of zeros
                    d_as = [None] * len(slots)
                elif d_a is not None:
                    # (hᵀ dy)ᵀ and not dyᵀ h: the long side last is the faster product.
                    across = _mm(h.mT, dy).mT
                    scaled = torch.empty(across.shape, dtype=slots[0].b.dtype, device=x.device).copy_(across)
                    d_bs = _each_b(scaled.mul_(_scales(lane, i, scaled)), slots)
                factors += [one for pair in zip(d_as, d_bs, strict=True) for one in pair]
            if dx is not None:
                target = _part(dx, lane, len(x))
                if mask is None:
                    _add_mm(target, together, joined)
                else:
                    target.add_(_part(_rows(masked(_mm(together, joined).view(mine.shape), mask)), lane))
        d_x = None if dx is None else dx.to(own).view(ctx.shape)
        return (d_x, None, None, *[None] * n, *d_bias, *factors)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _part(rows: Tensor, lane: SlotGroup, count: int | None = None) -> Tensor:
    """The lane's rows of a matrix that has equally many for each of ``count``, or of one that holds no others.

    A view, [rows, ·] or [slots, rows, ·].
    """
    if count and lane.stop is not None:
        times = rows.shape[0] // count
        rows = rows[lane.start * times : lane.stop * times]
    slots = len(lane.dropped)
    return rows if slots == 1 else rows.view(slots, rows.shape[0] // slots, rows.shape[1])


def _places(lane: SlotGroup) -> list[tuple[int, slice]]:
    """The projections that a lane adapts, and which of the ranks that it has in all are theirs."""
    found, start = [], 0
    for i, slots in enumerate(lane.updates):
        if slots:
            stop = start + _width(one.a.shape[0] for one in slots)
            found.append((i, slice(start, stop)))
            start = stop
    return found


def _width(ranks: Iterable[int]) -> int:
    return -(-max(ranks) // RANKS) * RANKS


def _all_a(lane: SlotGroup, places: Sequence[tuple[int, slice]], dtype: torch.dtype) -> Tensor:
    """A of all projections, one below the other with zeros between: [ranks, in], or [slots, ranks, in]."""
    parts = []
    for slot in range(len(lane.dropped)):
        for i, place in places:
            a = lane.updates[i][slot].a
            parts.append(a)
            if lacking := place.stop - place.start - a.shape[0]:
                parts.append(a.new_zeros(lacking, a.shape[1]))
    joined = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
    return joined if len(lane.dropped) == 1 else joined.view(len(lane.dropped), -1, joined.shape[1])


def _all_b(slots: Sequence[Update], width: int, scale: float | Tensor) -> Tensor:
    """``scale · B`` with zeros beside it up to ``width``: [out, width], or [slots, out, width]."""
    if all(one.b.shape[1] == width for one in slots):
        return (slots[0].b if len(slots) == 1 else torch.stack([one.b for one in slots])) * scale
    if len(slots) == 1:
        return F.pad(slots[0].b, (0, width - slots[0].b.shape[1])) * scale
    parts = []
    for one in slots:
        parts.append(one.b)
        if lacking := width - one.b.shape[1]:
            parts.append(one.b.new_zeros(one.b.shape[0], lacking))
    return torch.cat(parts, 1).view(-1, len(slots), width).transpose(0, 1) * scale


def _each_a(gradient: Tensor | None, lane: SlotGroup, places: Sequence[tuple[int, slice]]) -> list[list[Tensor | None]]:
    """Projection → slot → its own part of the gradient of ``_all_a``."""
    count = len(lane.dropped)
    if gradient is None:
        return [[None] * count for _ in places]
    own = gradient.to(lane.updates[places[0][0]][0].a.dtype)
    widths = [place.stop - place.start for _, place in places]
    parts = [torch.split(part, widths) for part in ([own] if count == 1 else own.unbind())]
    return [
        [_first(parts[slot][n], lane.updates[i][slot].a.shape[0]) for slot in range(count)]
        for n, (i, _) in enumerate(places)
    ]


def _each_b(gradient: Tensor, slots: Sequence[Update]) -> list[Tensor]:
    """Slot → its own part of the gradient of ``_all_b``."""
    parts = [gradient] if len(slots) == 1 else gradient.unbind()
    return [_first(part.T, one.b.shape[1]).T for part, one in zip(parts, slots, strict=True)]


def _first(rows: Tensor, count: int) -> Tensor:
    return rows if rows.shape[0] == count else rows[:count]


def _scales(lane: SlotGroup, i: int, like: Tensor) -> float | Tensor:
    """Each slot's scale, and what its dropout asks for, as one number or [slots, 1, 1]."""
    scales = [
        one.scale if dropped is None else one.scale * dropped.gain
        for one, dropped in zip(lane.updates[i], lane.dropped, strict=True)
    ]
    if len(set(scales)) == 1:
        return scales[0]
    return _column(tuple(scales), lane.updates[i][0].b.dtype, like.device)


@lru_cache(1024)
def _column(scales: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[slots, 1, 1]. Cached: making a new one waits for the device."""
    with torch.inference_mode(False):
        return torch.tensor(scales, dtype=dtype, device=device).view(-1, 1, 1)


def _mask(x: Tensor, lane: SlotGroup) -> Tensor:
    return masks(x[lane.start : lane.stop], lane.dropped)


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)


def _add_mm(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right`` for each matrix."""
    if out.dim() == 2:
        out.addmm_(left, right)
    else:
        out.baddbmm_(left, right)


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
