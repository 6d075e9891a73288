"""The maths of LoRA over plain tensors. Knows no module, no config, no route.

``A`` has r rows, ``B`` has r columns. Products are taken in the dtype of ``x``, so a half-precision base computes in
half precision while the factors keep their own dtype. ``lora.matmul`` describes the exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.lora import matmul
from loraloom.lora.dropout import DropoutMask, masked, masks
from loraloom.lora.frozen import FrozenLinear


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
    """``scale · B A[:, ids]``. Shapes: ids [...] integers, a [r, vocabulary], b [dim, r] → [..., dim].

    The column of ``padding_idx`` gets no gradient, as in the frozen table. ``max_norm`` does not apply: it is
    a property of the table, not of the update.
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


class Update(NamedTuple):
    """What one slot adds beside a frozen layer: a [r, in], b [out, r]; see ``Variant.row_gain`` for the gain [out]."""

    a: Tensor
    b: Tensor
    scale: float
    row_gain: Tensor | None = None


class SlotGroup(NamedTuple):
    """Slots with adjacent blocks of rows of equal size, computed by one batched product.

    ``start:stop`` is the range of all their rows in the first dimension of ``x``; a ``stop`` of None is its end.
    ``dropout``: one for each slot. ``updates``: for each projection one update per slot, or () if the slots do not
    adapt it.
    """

    start: int
    stop: int | None
    dropout: tuple[DropoutMask | None, ...]
    updates: tuple[tuple[Update, ...], ...]


#: Ranks are padded with zeros to a multiple of this, the width of a vector register. That is exact, costs nothing, and
#: makes a slot's results bit-identical beside slots of any other rank.
RANK_MULTIPLE = 16


def lora_projections(x: Tensor, frozen: Sequence[FrozenLinear], groups: Sequence[SlotGroup]) -> tuple[Tensor, ...]:
    """``gain · (x Wᵀ + scale · (drop(x) Aᵀ) Bᵀ) + bias`` for several projections of one x: [..., in] → [..., out] each.

    Each row's update and gain are those of its slot in ``groups``; rows of different slots never meet in a product, and
    rows in no group get none. Groups may share rows only if they have no gain. Saved for the backward: ``x`` once,
    ``x Aᵀ``, the factors in the dtype of ``x``, and with a gain its argument. Dropout masks are recomputed. Gradients
    flow to x, biases, a, b and gains, never to weights. They are exact, and not differentiable a second time.
    """
    updates = [one for group in groups for slots in group.updates for one in slots]
    factors = [factor for one in updates for factor in (one.a, one.b)]
    gains = [one.row_gain for one in updates if one.row_gain is not None]
    dtype = matmul.compute_dtype(x, differentiated=torch.is_grad_enabled())
    out: tuple[Tensor, ...] = _Projections.apply(  # type: ignore[no-untyped-call]
        x, groups, dtype, frozen, *[one.bias for one in frozen], *factors, *gains
    )
    return out


def scale_rows(y: Tensor, gain: Tensor, bias: Tensor | None, dim: int) -> Tensor:
    """``gain · (y - bias) + bias``. gain [out] and bias [out] belong to dimension ``dim`` of y."""
    shape = [1] * y.dim()
    shape[dim] = -1
    gain = gain.view(shape).to(y.dtype)
    return y * gain if bias is None else (y - bias.view(shape)) * gain + bias.view(shape)


class _Projections(torch.autograd.Function):
    # Written for few calls: with small models and batches, launch overhead dominates. A group of one slot has matrices,
    # other groups have batches of matrices.

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: Sequence[SlotGroup],
        dtype: torch.dtype,
        frozen: Sequence[FrozenLinear],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        wide = x.to(dtype)
        rows = _rows(wide)
        # The outputs must be no views: a model may change them in place.
        whole = [one.matmul(wide) for one in frozen]
        out = [_rows(y) for y in whole]
        kept: list[Tensor] = []
        scaled: list[Tensor] = []
        for group in groups:
            seen = _rows_of(rows, group, len(x))
            if any(group.dropout):
                seen = _rows_of(_rows(masked(wide[group.start : group.stop], _mask(wide, group))), group)
            places = _rank_slices(group)
            joined, hidden = _stacked_a(group, places, dtype), []
            for i, place in places:
                # One product for each projection, so that its bits do not depend on which others are computed here.
                hidden.append(_mm(seen, joined[..., place, :].mT))
                kept.append(_stacked_b(group.updates[i], place.stop - place.start, _scales(group, i, x)).to(dtype).mT)
                mine = _rows_of(out[i], group, len(x))
                _add_mm(mine, hidden[-1], kept[-1])
                if group.updates[i][0].row_gain is not None:
                    scaled += _apply_gains(mine, group.updates[i], frozen[i].bias)
            kept += [joined, *hidden]
        ctx.save_for_backward(*([x, *scaled, *kept] if groups else ()))
        ctx.frozen, ctx.groups, ctx.shape, ctx.dtypes = frozen, groups, x.shape, (x.dtype, dtype)
        ctx.set_materialize_grads(False)
        return tuple(whole if wide is x else [y.to(x.dtype) for y in whole])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the gradient of a LoRA layer cannot be differentiated again (create_graph=True)")
        kept: list[Tensor] = list(ctx.saved_tensors)
        own, dtype = ctx.dtypes
        x: Any = kept.pop(0).to(dtype) if kept else None
        frozen, needed, n = ctx.frozen, ctx.needs_input_grad, len(ctx.frozen)
        dys = [None if grad is None else _rows(grad.to(dtype)) for grad in grads]
        d_bias = [None if dy is None or not needed[4 + i] else dy.sum(0) for i, dy in enumerate(dys)]
        d_gains: list[Tensor | None] = []
        for group in ctx.groups:
            for i, slots in enumerate(group.updates):
                if slots and slots[0].row_gain is not None:
                    d_gains += _gain_gradients(dys, i, group, kept, len(x))
        dx: Tensor | None = None
        if needed[0]:
            for dy, one in zip(dys, frozen, strict=True):
                if dy is not None:
                    dx = one.matmul_grad_input(dy, dx)
        factors: list[Tensor | None] = []
        for group in ctx.groups:
            places = _rank_slices(group)
            m = len(places)
            bs, joined, hidden = kept[:m], kept[m], kept[m + 1 : 2 * m + 1]
            del kept[: 2 * m + 1]
            parts = [None if (dy := dys[i]) is None else _rows_of(dy, group, len(x)) for i, _ in places]
            below = [
                torch.zeros_like(h) if dy is None else _mm(dy, b.mT)  # the loss does not depend on that output
                for h, dy, b in zip(hidden, parts, bs, strict=True)
            ]
            together = below[0] if len(below) == 1 else torch.cat(below, -1)
            mask = _mask(x, group) if any(group.dropout) else None
            mine = x[group.start : group.stop]
            d_a = None
            if True in needed[4 + n :]:
                # One product for all A: a narrow one takes about as long as a wide one.
                d_a = _mm(together.mT, _rows_of(_rows(mine if mask is None else masked(mine, mask)), group))
            all_a = _split_a(d_a, group, places)
            for (i, _), h, dy, d_as in zip(places, hidden, parts, all_a, strict=True):
                slots = group.updates[i]
                d_bs: Sequence[Tensor | None] = [None] * len(slots)
                if dy is None:  # no gradient, rather than zeros: as if this projection had been computed alone
                    d_as = [None] * len(slots)
                elif d_a is not None:
                    # (hᵀ dy)ᵀ is faster than dyᵀ h: the long side comes last.
                    across = _mm(h.mT, dy).mT
                    scaled = torch.empty(across.shape, dtype=slots[0].b.dtype, device=x.device).copy_(across)
                    d_bs = _split_b(scaled.mul_(_scales(group, i, scaled)), slots)
                factors += [one for pair in zip(d_as, d_bs, strict=True) for one in pair]
            if dx is not None:
                target = _rows_of(dx, group, len(x))
                if mask is None:
                    _add_mm(target, together, joined)
                else:
                    target.add_(_rows_of(_rows(masked(_mm(together, joined).view(mine.shape), mask)), group))
        d_x = None if dx is None else dx.to(own).view(ctx.shape)
        return (d_x, None, None, None, *d_bias, *factors, *d_gains)


def _apply_gains(y: Tensor, slots: Sequence[Update], bias: Tensor | None) -> list[Tensor]:
    """Apply the gains of ``slots`` to their rows y, in place. Returns [gains, their argument] for the backward."""
    gains = torch.stack([one.row_gain for one in slots if one.row_gain is not None]).to(y.dtype)
    gains = gains if y.dim() == 2 else gains[:, None]
    before = y.clone() if bias is None else y - bias
    torch.mul(before, gains, out=y)
    if bias is not None:
        y += bias
    return [gains, before]


def _gain_gradients(
    dys: list[Tensor | None], i: int, group: SlotGroup, kept: list[Tensor], count: int
) -> list[Tensor | None]:
    """The gradients of the gains of a group's projection ``i``; ``dys[i]`` becomes that of their argument."""
    gains, before = kept.pop(0), kept.pop(0)
    whole = dys[i]
    if whole is None:
        return [None] * len(group.dropout)
    whole = dys[i] = whole.clone()  # autograd may share the incoming gradient
    dy = _rows_of(whole, group, count)
    each = (dy * before).reshape(len(group.dropout), -1, dy.shape[-1]).sum(1)
    dy.mul_(gains)
    return [one.to(slot.row_gain.dtype) for one, slot in zip(each, group.updates[i], strict=True)]  # type: ignore[union-attr]


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _rows_of(rows: Tensor, group: SlotGroup, count: int | None = None) -> Tensor:
    """A view of the group's rows, [rows, ·] or [slots, rows, ·], of a matrix with all rows of a batch of ``count``.

    Without ``count`` the matrix holds the group's rows alone.
    """
    if count and group.stop is not None:
        times = rows.shape[0] // count
        rows = rows[group.start * times : group.stop * times]
    slots = len(group.dropout)
    return rows if slots == 1 else rows.view(slots, rows.shape[0] // slots, rows.shape[1])


def _rank_slices(group: SlotGroup) -> list[tuple[int, slice]]:
    """The projections that a group adapts, and each one's slice of the group's stacked ranks."""
    found, start = [], 0
    for i, slots in enumerate(group.updates):
        if slots:
            stop = start + _padded_rank(one.a.shape[0] for one in slots)
            found.append((i, slice(start, stop)))
            start = stop
    return found


def _padded_rank(ranks: Iterable[int]) -> int:
    return -(-max(ranks) // RANK_MULTIPLE) * RANK_MULTIPLE


def _stacked_a(group: SlotGroup, places: Sequence[tuple[int, slice]], dtype: torch.dtype) -> Tensor:
    """A of all projections, stacked and padded with zeros: [ranks, in], or [slots, ranks, in]."""
    parts = []
    for slot in range(len(group.dropout)):
        for i, place in places:
            a = group.updates[i][slot].a
            parts.append(a)
            if lacking := place.stop - place.start - a.shape[0]:
                parts.append(a.new_zeros(lacking, a.shape[1]))
    joined = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
    return joined if len(group.dropout) == 1 else joined.view(len(group.dropout), -1, joined.shape[1])


def _stacked_b(slots: Sequence[Update], width: int, scale: float | Tensor) -> Tensor:
    """``scale · B`` padded with zeros: [out, width], or [slots, out, width]."""
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


def _split_a(
    gradient: Tensor | None, group: SlotGroup, places: Sequence[tuple[int, slice]]
) -> list[list[Tensor | None]]:
    """Projection → slot → its part of the gradient of ``_stacked_a``."""
    count = len(group.dropout)
    if gradient is None:
        return [[None] * count for _ in places]
    own = gradient.to(group.updates[places[0][0]][0].a.dtype)
    widths = [place.stop - place.start for _, place in places]
    parts = [torch.split(part, widths) for part in ([own] if count == 1 else own.unbind())]
    return [
        [_first(parts[slot][n], group.updates[i][slot].a.shape[0]) for slot in range(count)]
        for n, (i, _) in enumerate(places)
    ]


def _split_b(gradient: Tensor, slots: Sequence[Update]) -> list[Tensor]:
    """Slot → its part of the gradient of ``_stacked_b``."""
    parts = [gradient] if len(slots) == 1 else gradient.unbind()
    return [_first(part.T, one.b.shape[1]).T for part, one in zip(parts, slots, strict=True)]


def _first(rows: Tensor, count: int) -> Tensor:
    return rows if rows.shape[0] == count else rows[:count]


def _scales(group: SlotGroup, i: int, like: Tensor) -> float | Tensor:
    """Each slot's scale times its dropout's gain: one number if all are equal, or [slots, 1, 1]."""
    scales = [
        one.scale if dropout is None else one.scale * dropout.gain
        for one, dropout in zip(group.updates[i], group.dropout, strict=True)
    ]
    if len(set(scales)) == 1:
        return scales[0]
    return _column(tuple(scales), group.updates[i][0].b.dtype, like.device)


@lru_cache(1024)
def _column(scales: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[slots, 1, 1]. Cached, because a copy to the device synchronises."""
    with torch.inference_mode(False):
        return torch.tensor(scales, dtype=dtype, device=device).view(-1, 1, 1)


def _mask(x: Tensor, group: SlotGroup) -> Tensor:
    return masks(x[group.start : group.stop], group.dropout)


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)


def _add_mm(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right`` for each matrix."""
    if out.dim() == 2:
        out.addmm_(left, right)
    else:
        out.baddbmm_(left, right)
