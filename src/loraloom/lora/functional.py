"""The maths of the low-rank update, over plain tensors: no modules, no slots, no state.

Every function returns the update alone, to be added to the frozen layer's output. Factors are computed in the
input's dtype, so that a bf16 model stays in bf16 while ``A`` and ``B`` may be kept in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


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


def dropout(x: Tensor, p: float) -> Tensor:
    """``x`` with each number zero with probability ``p`` and the rest scaled by ``1 / (1 - p)``.

    On the CPU torch draws one float for each number, which costs as much as the layer itself. Sixteen random bits
    for each do, at a quarter of the time: ``p`` is then a multiple of 2⁻¹⁶, and the scale is exact for that.
    """
    dropped = round(p * 2**16)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or dropped in (0, 2**16):
        return F.dropout(x, p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return torch.where(kept, x * (2**16 / (2**16 - dropped)), 0.0)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``B A`` in at least float32: a [r, ...in], b [out, r, 1...] → [out, ...in]."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    delta: Tensor = torch.tensordot(b.to(dtype).flatten(1), a.to(dtype), dims=1)
    return delta
