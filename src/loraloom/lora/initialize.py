"""Initial values of ``A`` and ``B``. They depend on a seed and the module's name alone: not on the global generator,
the device, other modules, or existing adapters.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

Init = bool | Literal["gaussian"]


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any parts: the same in every process and on every machine."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def factors(
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    *,
    init: Init,
    seed: int,
    embedding: bool = False,
    r: int | None = None,
) -> tuple[Tensor, Tensor]:
    """New ``A`` and ``B`` in float32 on the CPU.

    ``True``: A uniform in ±1/sqrt(fan in) (Kaiming with a=√5, as nn.Linear), B zero. ``"gaussian"``: A normal with
    deviation 1/r (``r`` is A's first dimension unless given), B zero. An embedding starts with A zero and B normal
    instead, for either. ``False``: both random, so that the update is not zero (for tests).
    """
    generator = torch.Generator().manual_seed(seed)
    r = a_shape[0] if r is None else r
    a, b = torch.empty(a_shape), torch.empty(b_shape)
    if embedding:
        b.normal_(generator=generator)
        if init is False:
            a.normal_(generator=generator)
        else:
            a.zero_()
        return a, b
    bound = 1 / math.sqrt(math.prod(a_shape[1:]))
    if init == "gaussian":
        a.normal_(std=1 / r, generator=generator)
    else:
        a.uniform_(-bound, bound, generator=generator)
    if init is False:
        bound = 1 / math.sqrt(math.prod(b_shape[1:]))
        b.uniform_(-bound, bound, generator=generator)
    else:
        b.zero_()
    return a, b
