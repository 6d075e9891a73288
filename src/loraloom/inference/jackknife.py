"""Figures with their error: over all held-out rows, and over all but each of some parts of them (the jackknife).

Any metric gets a standard error this way, a user's own too, and two adapters on the same rows one of their difference
(Efron and Stein 1981). One pass over the rows serves all of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean

from loraloom.tasks.metrics.kinds import Scores, total
from loraloom.tasks.metrics.registry import Metrics
from loraloom.tasks.outputs import Predictions

#: Parts that held-out rows are divided into; rows that are fewer are a part each.
PARTS = 20

#: Metric → its figure over all rows, and over all but each part.
Figures = dict[str, list[float]]


def divide(rows: Sequence[int]) -> list[list[int]]:
    """Examples in parts, at random but always the same. ``rows`` is the row of each: its examples stay together."""
    distinct = sorted(set(rows))
    random.Random("parts").shuffle(distinct)
    part_of = {row: place % min(PARTS, len(distinct)) for place, row in enumerate(distinct)}
    parts: list[list[int]] = [[] for _ in range(min(PARTS, len(distinct)))]
    for number, row in enumerate(rows):
        parts[part_of[row]].append(number)
    return parts


def figures(metrics: Metrics, scores: Sequence[Scores], said: Predictions, parts: Sequence[Sequence[int]]) -> Figures:
    """The figures of what was said. ``scores`` are the losses of each part."""
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
    """The standard error of ``values[0]`` by the others, each without one part; infinite where it cannot be had."""
    rest = [value for value in values[1:] if math.isfinite(value)]
    if len(rest) < 2 or not math.isfinite(values[0]):
        return math.inf
    mean = fmean(rest)
    return math.sqrt((len(rest) - 1) / len(rest) * math.fsum((value - mean) ** 2 for value in rest))
