"""Why no trial learned anything, or no more than a new head does, from the curves and the held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from loraloom.messages import Message
from loraloom.tuning.asha import WINDOW
from loraloom.tuning.bar import Bar, Gain, gain, needed
from loraloom.tuning.head_baseline import HEAD
from loraloom.tuning.judge import Against
from loraloom.tuning.trial import Trial

#: If more than this share of the trials failed, that comes first.
FAILED = 0.5
#: A figure this near to the best there is leaves no room above it.
FULL = 0.98


def nothing(trials: Sequence[Trial], best: Trial, bar: Bar, metric: str) -> list[Message]:
    """The likeliest cause first. ``trials`` are first seeds, ``best`` the best of them; never empty."""
    tried = len(trials)
    by_metric, by_loss = gain(bar, [best], metric, tried), gain(bar, [best], "loss", tried)
    found = [
        _failed(trials),
        _full(bar, metric),
        _other_metric(by_metric, by_loss),
        _too_few_rows(by_metric, bar, tried),
        _stuck(trials, bar) or _overfitting(trials, bar),
    ]
    return [advice for advice in found if advice is not None]


def no_better_than_head(trials: Sequence[Trial], against: Sequence[Against], metric: str) -> list[Message]:
    """What to change if the best that learned is not shown to be better than a new head on the frozen model."""
    head = next((one for one in against if one.words == HEAD), None)
    if head is None:
        return []
    gain, rows = head.better.value, head.better.rows
    if metric not in ("loss", "perplexity") and FULL <= head.figure.value <= 1:
        return [Message("full", bar=head.figure.value, bar_words=HEAD, metric=metric)]
    if gain > 0:
        figures = {"gain": gain, "error": (head.better.high - head.better.low) / 4, "rows": rows}
        enough = head.better.rows_needed or 0
        return [Message("rows", **figures, enough=enough, tried=len(trials), metric=metric, bar_words=HEAD)]
    rates = [trial.options.learning_rate for trial in trials]
    steps = max(trial.steps for trial in trials)
    return [Message("behind_head", gain=gain, metric=metric, rates=[min(rates), max(rates)], steps=steps)]


def _failed(trials: Sequence[Trial]) -> Message | None:
    failed = [trial for trial in trials if trial.state == "failed"]
    if len(failed) <= FAILED * len(trials):
        return None
    lowest = min(trial.options.learning_rate for trial in failed)
    return Message("failures", failed=len(failed), trials=len(trials), rate=lowest)


def _full(bar: Bar, metric: str) -> Message | None:
    best = bar.best(metric)
    if best is None or metric in ("loss", "perplexity") or not FULL <= best[1][0] <= 1:
        return None
    return Message("full", bar=best[1][0], bar_words=best[0], metric=metric)


def _other_metric(by_metric: Gain | None, by_loss: Gain | None) -> Message | None:
    """The loss is better beyond doubt, the metric is not."""
    if by_loss is None or not by_loss.sure or by_metric is None or by_metric.metric == "loss":
        return None
    figures = {"loss": by_loss.figure, "bar": by_loss.bar, "gain": by_loss.gain}
    return Message("metric", **figures, metric=by_metric.metric, bar_words=by_metric.bar_words)


def _too_few_rows(by_metric: Gain | None, bar: Bar, tried: int) -> Message | None:
    if by_metric is None or by_metric.gain <= 0:
        return None
    times = needed(bar.parts, tried) * by_metric.error / by_metric.gain
    enough = math.ceil(bar.rows * times**2) if math.isfinite(times) else 0
    figures = {"gain": by_metric.gain, "error": by_metric.error, "rows": bar.rows, "enough": enough}
    return Message("rows", **figures, tried=tried, metric=by_metric.metric, bar_words=by_metric.bar_words)


def _stuck(trials: Sequence[Trial], bar: Bar) -> Message | None:
    """No training loss ever left that of the best constant answer."""
    curves = {t.number: t for t in trials if len(t.curve.loss) >= WINDOW and t.state != "failed"}
    if any(bar.has_taken_off(trial.curve.loss, trial.steps) for trial in curves.values()):
        return None
    rates = [trial.options.learning_rate for trial in trials]
    steps = max(trial.steps for trial in trials)
    lowest = min((fmean(t.curve.loss[-WINDOW:]) for t in curves.values()), default=math.nan)
    return Message("stuck", lowest=lowest, base=bar.base, rates=[min(rates), max(rates)], steps=steps)


def _overfitting(trials: Sequence[Trial], bar: Bar) -> Message | None:
    """A training loss fell, and the held-out rows do not follow."""
    off = [trial for trial in trials if bar.has_taken_off(trial.curve.loss, trial.steps)]
    if not off:
        return None
    lowest = min(off, key=lambda trial: fmean(trial.curve.loss[-WINDOW:]))
    loss = fmean(lowest.curve.loss[-WINDOW:])
    return Message("apart", training=loss, held_out=lowest.latest("loss"), trial=lowest.number)
