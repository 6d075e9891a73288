"""Whether padding changes a model's output: tried once for each model.

Most models mask padding. Some do not: those that mix all positions (FNet), convolve over them (ConvBERT), or have no
mask (RWKV, on the left of a prompt). Their rows are evaluated in batches of one length, so that metrics do not depend
on which rows share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

#: Differences by rounding, relative to the largest value: in half precision, and in other dtypes.
ROUNDING = {torch.float16: 0.02, torch.bfloat16: 0.05}
USUAL = 1e-3

_FOUND: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def is_seen(model: nn.Module, what: str, lengths: Sequence[int], answer: Callable[[list[int]], Tensor]) -> bool:
    """Whether padding changes the output of ``model`` for the task ``what``.

    ``answer`` gives the output of the first of some rows, by their indices in ``lengths``. Rows of one length are not
    enough to try it.
    """
    found = _FOUND.setdefault(model, {})
    if what not in found:
        if len(set(lengths)) < 2:
            return False
        short, long = (pick(range(len(lengths)), key=lengths.__getitem__) for pick in (min, max))
        found[what] = _differ(answer([short]), answer([short, long]), next(model.parameters()).dtype)
    return found[what]


def _differ(alone: Tensor, padded: Tensor, dtype: torch.dtype) -> bool:
    alone, padded = alone.double(), padded.double()
    if not bool(alone.isfinite().all()):
        return False  # NaN shows nothing
    largest = float(alone.abs().max()) if alone.numel() else 0.0
    return not float((alone - padded).abs().max() if alone.numel() else 0.0) <= ROUNDING.get(dtype, USUAL) * largest
