"""Which evaluation of a curve is the best, and for how long there was no better one. Knows numbers alone.

All follows from the curve, so that a training that is gone on with decides as if it had never been stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loraloom.errors import ConfigError, nearest
from loraloom.tasks.metrics.registry import greater_is_better

Evaluations = Sequence[Mapping[str, float]]


def watched(evaluation: Mapping[str, float], asked: str | None) -> str:
    """The metric to compare by: the one ``asked`` for (as ``eval_loss`` too), else the first beside the loss.

    Raises:
        ConfigError: it was not measured.
    """
    names = [name for name in evaluation if name != "step"]
    if asked is None:
        return next((name for name in names if name != "loss"), "loss")
    for name in (asked, asked.removeprefix("eval_")):
        if name in names:
            return name
    raise ConfigError(
        f"metric_for_best_model: {asked!r} is not measured{nearest(asked, names)}; there are {', '.join(names)}"
    )


def best(evaluations: Evaluations, asked: str | None) -> tuple[int, str, float] | None:
    """(step, metric, value) of the best evaluation, of equal ones the first; None where nothing finite was measured."""
    found: tuple[int, str, float] | None = None
    for one in evaluations:
        metric = watched(one, asked)
        value = one[metric]
        if math.isfinite(value) and (found is None or _gain(metric, value, found[2]) > 0):
            found = int(one["step"]), metric, value
    return found


def stalled(evaluations: Evaluations, asked: str | None, threshold: float = 0.0) -> int:
    """How many evaluations, up to the last one, were not better than the best before them by more than ``threshold``.

    The first one is better than nothing, whatever it says.
    """
    top, count = math.nan, 0
    for place, one in enumerate(evaluations):
        metric = watched(one, asked)
        value = one[metric]
        finite, first = math.isfinite(value), not math.isfinite(top)
        better = finite and (first or _gain(metric, value, top) > threshold)
        count = 0 if better or place == 0 else count + 1
        if finite and (first or _gain(metric, value, top) > 0):
            top = value
    return count


def _gain(metric: str, new: float, old: float) -> float:
    return new - old if greater_is_better(metric) else old - new
