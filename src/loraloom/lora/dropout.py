"""Dropout whose mask is not stored: it is recomputed from a seed.

Torch's dropout keeps a mask as large as its input until the backward, and on the CPU draws it element by element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: The keep probability is rounded to a multiple of 2⁻¹⁵, and the scale is its exact reciprocal.
_LEVELS = 2**15
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class DropoutMask:
    """The numbers from which a dropout mask is recomputed.

    The bit of an element is a hash of ``seed``, the row, and the place in the row: the same beside any other rows, with
    any padding after the row's end, on every device and in every dtype. A row has ``times`` consecutive positions of
    the first dimension.
    """

    p: float
    seed: int
    times: int = 1

    @property
    def gain(self) -> float:
        """``1 / (1 - p)``, the scale of the elements that are kept."""
        return _LEVELS / self._kept

    @property
    def _kept(self) -> int:
        return max(_LEVELS - round(self.p * _LEVELS), 1)

    def mask(self, x: Tensor) -> Tensor:
        """Integers of the width of ``x``'s elements, x [rows, ...]: all bits set where one is kept, none elsewhere."""
        return masks(x, (self,))

    def apply(self, x: Tensor) -> Tensor:
        """``x`` [rows, ...] with each element 0 with probability ``p``, and the others not scaled: see ``gain``."""
        return masked(x, self.mask(x))


def masks(x: Tensor, parts: Sequence[DropoutMask | None]) -> Tensor:
    """The mask of ``x`` [parts · rows · times, ...], in which each part has its own; None keeps all."""
    times = next((part.times for part in parts if part is not None), 1)
    size, rows = x[:times].numel(), x.shape[0] // (len(parts) * times)
    words = _hash(rows, -(-size // 2), [0 if part is None else part.seed for part in parts], x.device)
    # Two draws of 15 bits a word. Draws below the threshold become negative: all ones after the shift, which keeps. The
    # threshold that keeps all is 2¹⁵, which wraps to -2¹⁵ in 16 bits; subtracting it makes every draw negative.
    kept = [_signed(_LEVELS if part is None else part._kept, 16) for part in parts]
    threshold: int | Tensor = kept[0]
    if len(set(kept)) > 1:
        threshold = _column(kept, torch.int16, x.device)
    draws = words.view(torch.int16).bitwise_and_(_LEVELS - 1).sub_(threshold).bitwise_right_shift_(15)
    return draws[..., :size].reshape(x.shape).to(_INTEGERS[x.element_size()])


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where ``mask`` (see ``DropoutMask.mask``) is set, else 0."""
    return x.contiguous().view(mask.dtype).bitwise_and(mask).view(x.dtype)


def _hash(rows: int, columns: int, seeds: Sequence[int], device: torch.device) -> Tensor:
    """[seeds, rows, columns] int32: a hash of seed, row and column (two rounds of "lowbias32", C. Wellons)."""
    first, second = (_words([seed >> shift & 0xFFFFFFFF for seed in seeds], device) for shift in (0, 32))
    start = torch.arange(rows, dtype=torch.int32, device=device).mul_(_signed(0x9E3779B9))[None, :, None] + first
    words = torch.arange(columns, dtype=torch.int32, device=device).mul_(_signed(0x85EBCA6B))
    return _mix(_mix(start, second) + words, second)


def _words(words: Sequence[int], device: torch.device) -> int | Tensor:
    if len(words) == 1:
        return _signed(words[0])
    return _column([_signed(word) for word in words], torch.int32, device)


def _column(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[numbers, 1, 1] on ``device``. From pinned memory, since other copies to CUDA synchronise."""
    made = torch.tensor(numbers, dtype=dtype).view(-1, 1, 1)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


def _mix(z: Tensor, key: int | Tensor) -> Tensor:
    shifted = z >> 16  # one buffer for all three: allocating takes as long as the arithmetic
    z.bitwise_xor_(shifted).mul_(_signed(0x7FEB352D)).add_(key)
    z.bitwise_xor_(torch.bitwise_right_shift(z, 15, out=shifted)).mul_(_signed(0x846CA68B))
    return z.bitwise_xor_(torch.bitwise_right_shift(z, 16, out=shifted))


def _signed(word: int, bits: int = 32) -> int:
    return word - 2**bits if word >= 2 ** (bits - 1) else word


def dropout(x: Tensor, dropped: DropoutMask) -> Tensor:
    """``x`` with ``dropped`` applied and the rest scaled. Differentiable any number of times."""
    out: Tensor = _Dropout.apply(x, dropped)  # type: ignore[no-untyped-call]
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: DropoutMask) -> Tensor:
        ctx.dropped = dropped
        return dropped.apply(x).mul_(dropped.gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return dropout(grads[0], ctx.dropped), None
