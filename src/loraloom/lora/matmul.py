"""Products with a frozen weight, in a dtype that the processor has instructions for.

Without half-precision instructions, a product in bfloat16 takes 10 to 100 times as long as in float32. There the weight
stays in half precision and is converted to float32 a block at a time, so that no copy of it ever exists; each result is
rounded once, as in hardware. Knows tensors alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

#: With fewer rows than this the product is memory-bound, where half precision is faster on any processor.
_FEW = 8
#: Elements of a weight that are converted at a time: few enough to stay in the cache until they are multiplied.
_BLOCK = 2**20
_reshaped = torch.ops.aten._unsafe_view.default


@functools.cache
def native(device: str, dtype: torch.dtype) -> bool:
    """Whether devices of this type multiply in this dtype at full speed.

    ``meta``, on which memory is estimated, stands for the device that this machine trains on.
    """
    if device == "meta" and not torch.accelerator.is_available():
        device = "cpu"
    if device != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return True
    name = f"_is_mkldnn_{'bf16' if dtype is torch.bfloat16 else 'fp16'}_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    if supported is None:
        return True
    # With AVX-512 alone oneDNN takes bfloat16 as well, and is 5 to 10 times as slow as in float32.
    emulated = dtype is torch.bfloat16 and _has("avx512") and not _has("avx512_bf16") and not _has("amx_tile")
    return bool(supported()) and not emulated


def _has(instructions: str) -> bool:
    """Whether torch finds these instructions of an x86 processor."""
    found = getattr(torch.cpu, f"_is_{instructions}_supported", None)
    return found is not None and bool(found())


def compute_dtype(x: Tensor, differentiated: bool = True) -> torch.dtype:
    """The dtype of products with ``x`` [..., in]: its own, or float32 where that is faster.

    Without a backward, few rows keep their own: the product is memory-bound.
    """
    if native(x.device.type, x.dtype) or (not differentiated and x.numel() < _FEW * x.shape[-1]):
        return x.dtype
    return torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + bias`` in the dtype of ``x``: x [..., in], weight [out, in] of any dtype → [..., out], and no view."""
    if x.dtype is weight.dtype:
        made = F.linear(x, weight, bias)
        # The same shape, but not a view: torch's linear with a bias may return one.
        return _reshaped(made, made.shape) if made._is_view() else made
    count = x.shape[:-1].numel()
    rows = x.reshape(count, x.shape[-1])
    out = x.new_empty(*x.shape[:-1], len(weight))
    flat = out.view(count, len(weight))
    for part in _blocks(weight):
        torch.mm(rows, weight[part].to(x.dtype).T, out=flat[:, part])
    return out if bias is None else out.add_(bias)


def matmul_grad_input(dy: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """``dy W``, added to ``onto`` if that is given: dy [rows, out], weight [out, in] → [rows, in]."""
    if dy.dtype is weight.dtype:
        return torch.mm(dy, weight) if onto is None else onto.addmm_(dy, weight)
    for rows in _blocks(weight):
        wide = weight[rows].to(dy.dtype)
        onto = torch.mm(dy[:, rows], wide) if onto is None else onto.addmm_(dy[:, rows], wide)
    return dy.new_zeros(len(dy), weight.shape[1]) if onto is None else onto


def _blocks(weight: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK // weight.shape[1])
    for start in range(0, len(weight), size):
        yield slice(start, start + size)
