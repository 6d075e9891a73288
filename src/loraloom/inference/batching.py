"""Whether a model answers a row otherwise with padding beside it: found by trying, once for each model.

Most models look away from padding. Some cannot: those that mix all places (FNet), convolve over them (ConvBERT), or
have no mask (RWKV, to the left of a prompt). Their rows are evaluated in batches of one length, so that a figure does
not depend on the rows that happen to share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

#: Differences that rounding explains, relative to the largest number; of half precision, and of others.
ROUNDING = {torch.float16: 0.02, torch.bfloat16: 0.05}
USUAL = 1e-3

_FOUND: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()


def is_seen(model: nn.Module, what: str, lengths: Sequence[int], answer: Callable[[list[int]], Tensor]) -> bool:
    """Whether ``model`` sees padding when it does ``what``.

    ``answer`` gives the model's numbers for the first of some rows, by their places among ``lengths``. While all rows
    are of one length nothing is tried.
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
