"""Standard errors of metrics by the jackknife: over all held-out rows, and without each of several parts of them.

It works for any metric, including a user's own, and for the difference of two adapters on the same rows (Efron and
Stein 1981). One pass over the rows is enough.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean

from loraloom.tasks.metrics.kinds import Scores, total
from loraloom.tasks.metrics.registry import Metrics
from loraloom.tasks.outputs import Predictions

#: Parts of the held-out rows; fewer rows are a part each.
PARTS = 20

#: Metric → its value over all rows, then without each part.
Figures = dict[str, list[float]]


def divide(rows: Sequence[int]) -> list[list[int]]:
    """Examples in random but fixed parts. ``rows`` gives the row of each; a row's examples stay together."""
    distinct = sorted(set(rows))
    random.Random("parts").shuffle(distinct)
    part_of = {row: place % min(PARTS, len(distinct)) for place, row in enumerate(distinct)}
    parts: list[list[int]] = [[] for _ in range(min(PARTS, len(distinct)))]
    for number, row in enumerate(rows):
        parts[part_of[row]].append(number)
    return parts


def figures(metrics: Metrics, scores: Sequence[Scores], said: Predictions, parts: Sequence[Sequence[int]]) -> Figures:
    """The metrics of predictions. ``scores`` are the losses of each part."""
    part_of = {number: place for place, part in enumerate(parts) for number in part}
    found: Figures = {}
    for left_out in [-1, *(range(len(parts)) if len(parts) > 1 else ())]:
        kept = [i for i, example in enumerate(said.examples) if part_of[example] != left_out]
        one = metrics.measure(
            total(score for place, score in enumerate(scores) if place != left_out),
            [said.predictions[i] for i in kept],
            [said.references[i] for i in kept],
        )
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return found


def error(values: Sequence[float]) -> float:
    """The standard error of ``values[0]``; the others are without one part each. Infinite if it is unknown."""
    rest = [value for value in values[1:] if math.isfinite(value)]
    if len(rest) < 2 or not math.isfinite(values[0]):
        return math.inf
    mean = fmean(rest)
    return math.sqrt((len(rest) - 1) / len(rest) * math.fsum((value - mean) ** 2 for value in rest))
