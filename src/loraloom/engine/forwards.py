"""How the batches of a step are divided into forwards: in one forward every row is padded to the longest.

A second forward has a fixed cost: it reads the weights again, and each layer adds Python, launches and autograd nodes.
Batches of like width share a forward where that is cheaper. The division follows from shapes alone, never from a clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import nn

#: A forward and backward cost as much as this many places beside their own, because weights are read; and, for each
#: adapted layer, as this many multiply-adds of weights. Of a CPU ``benchmarks/padding.py`` measures it; of a GPU it is
#: estimated: its products are faster, its host is not.
READING = {"cpu": 80, "cuda": 256}
CALLS = {"cpu": 2.5e6, "cuda": 1.5e10}


def fixed_cost(model: nn.Module, layers: int) -> float:
    """What a forward and backward cost beside their places, as a number of places, with ``layers`` adapted layers."""
    embeddings = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    frozen = [one for one in model.parameters() if not one.requires_grad and id(one) not in embeddings]
    device = "cpu" if not frozen or frozen[0].device.type == "cpu" else "cuda"
    return READING[device] + CALLS[device] * layers / max(sum(one.numel() for one in frozen), 1)


def divide(names: Sequence[str], sizes: Mapping[str, tuple[int, int]], fixed: float) -> list[list[str]]:
    """``names`` in groups that share a forward, with the least ``fixed + places`` in all; their order is kept.

    ``sizes``: name → rows and padded width of its batch. A group's places are its rows times its greatest width.
    """
    rows: dict[int, int] = {}
    for name in names:
        count, width = sizes[name]
        rows[width] = rows.get(width, 0) + count
    if len(rows) == 1:
        return [list(names)]
    widths = sorted(rows)
    below = [0, *accumulate(rows[width] for width in widths)]
    #: the least cost of the first widths, and where the last of their groups begins
    best = [(0.0, 0)]
    for end, width in enumerate(widths, 1):
        costs = ((best[start][0] + fixed + (below[end] - below[start]) * width, start) for start in range(end))
        best.append(min(costs))
    groups, end = list[list[str]](), len(widths)
    while end:
        start = best[end][1]
        within = set(widths[start:end])
        groups.append([name for name in names if sizes[name][1] in within])
        end = start
    return groups
