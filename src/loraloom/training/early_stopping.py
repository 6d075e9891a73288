"""The best evaluation of a curve, and early stopping.

Both follow from the curve alone, so a resumed training decides as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loraloom.errors import ConfigError, nearest
from loraloom.tasks.metrics.registry import greater_is_better

Evaluations = Sequence[Mapping[str, float]]


def watched(evaluation: Mapping[str, float], asked: str | None) -> str:
    """The metric to compare by: ``asked`` (``eval_loss`` means ``loss``), by default the first after the loss.

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
    """(step, metric, value) of the best evaluation, the first of equal ones; None without a finite value."""
    found: tuple[int, str, float] | None = None
    for one in evaluations:
        metric = watched(one, asked)
        value = one[metric]
        if math.isfinite(value) and (found is None or _gain(metric, value, found[2]) > 0):
            found = int(one["step"]), metric, value
    return found


def stalled(evaluations: Evaluations, asked: str | None, threshold: float = 0.0) -> int:
    """The number of last evaluations that did not beat the best before them by more than ``threshold``.

    The first evaluation counts as an improvement.
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
