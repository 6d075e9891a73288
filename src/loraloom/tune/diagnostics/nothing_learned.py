"""Why nothing was learned, as far as the curves and the held-out rows say, and what to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from loraloom.tune.asha import WINDOW
from loraloom.tune.bar import Bar, Gain, gain, needed
from loraloom.tune.diagnostics.inputs import Advice
from loraloom.tune.format import shown
from loraloom.tune.trial import Trial

#: Where more than this share of the trials failed, that is what to mend first.
FAILED = 0.5
#: A figure this near to the best there is leaves no room above it.
FULL = 0.98


def nothing(trials: Sequence[Trial], best: Trial, bar: Bar, metric: str) -> list[Advice]:
    """What to change, the likeliest first. ``trials`` are first seeds, ``best`` the best of them; never empty."""
    tried = len(trials)
    by_metric, by_loss = gain(bar, [best], metric, tried), gain(bar, [best], "loss", tried)
    found = [
        _failed(trials),
        _full(bar, metric),
        _other_metric(by_metric, by_loss),
        _too_few_rows(by_metric, bar, tried),
        _still(trials, bar) or _by_heart(trials, bar),
    ]
    return [advice for advice in found if advice is not None]


def _failed(trials: Sequence[Trial]) -> Advice | None:
    failed = [trial for trial in trials if trial.state == "failed"]
    if len(failed) <= FAILED * len(trials):
        return None
    lowest = min(trial.options.learning_rate for trial in failed)
    return Advice(
        "failures",
        f"{len(failed)} of {len(trials)} trials diverged, the one with the lowest rate at {shown(lowest)}: lower the "
        "learning rates of the space",
        {"failed": len(failed), "trials": len(trials), "rate": lowest},
    )


def _full(bar: Bar, metric: str) -> Advice | None:
    best = bar.best(metric)
    if best is None or metric in ("loss", "perplexity") or not FULL <= best[1][0] <= 1:
        return None
    return Advice(
        "full",
        f"{best[0]} has {metric} {best[1][0]:.3g} already, which leaves no room: compare by another metric (loss, or "
        "one that counts rare classes such as f1_macro), or hold out harder rows",
        {"bar": best[1][0]},
    )


def _other_metric(by_metric: Gain | None, by_loss: Gain | None) -> Advice | None:
    """The loss is surely better, the metric is not."""
    if by_loss is None or not by_loss.sure or by_metric is None or by_metric.metric == "loss":
        return None
    return Advice(
        "metric",
        f"the held-out loss of the best is {by_loss.gain:.3g} below {by_loss.bar:.3g}, and its {by_metric.metric} is "
        f"no better than that of {by_metric.bar_words}: it has learned something that {by_metric.metric} does not "
        "see. Compare by the loss (metric: loss) or by a metric that counts rare classes, or train longer",
        {"loss": by_loss.figure, "bar": by_loss.bar},
    )


def _too_few_rows(by_metric: Gain | None, bar: Bar, tried: int) -> Advice | None:
    if by_metric is None or by_metric.gain <= 0:
        return None
    times = needed(bar.parts, tried) * by_metric.error / by_metric.gain
    enough = math.ceil(bar.rows * times**2) if math.isfinite(times) else 0
    rows = "1 held-out row" if bar.rows == 1 else f"{bar.rows:,} held-out rows"
    about = f"; if it is real, about {enough:,} would show it" if bar.rows < enough < 100 * bar.rows else ""
    return Advice(
        "rows",
        f"the best of {tried} is {by_metric.gain:.3g} better in {by_metric.metric} than {by_metric.bar_words}, "
        f"which {rows} cannot tell from luck{about}: hold out more",
        {"gain": by_metric.gain, "error": by_metric.error, "rows": bar.rows, "enough": enough},
    )


def _still(trials: Sequence[Trial], bar: Bar) -> Advice | None:
    """No training loss ever left that of the best constant answer."""
    curves = {t.number: t for t in trials if len(t.curve.loss) >= WINDOW and t.state != "failed"}
    if any(bar.has_taken_off(trial.curve.loss, trial.steps) for trial in curves.values()):
        return None
    rates = [trial.options.learning_rate for trial in trials]
    tried = shown(rates[0]) if min(rates) == max(rates) else f"{shown(min(rates))} to {shown(max(rates))}"
    steps = max(trial.steps for trial in trials)
    lowest = min((fmean(t.curve.loss[-WINDOW:]) for t in curves.values()), default=math.nan)
    to = f"that of the best constant answer ({bar.base:.3g})" if bar.base is not None else "where it began"
    seen = f": the lowest is {lowest:.3g}" if math.isfinite(lowest) else ""
    return Advice(
        "stuck",
        f"in {steps} steps no trial's training loss came clearly below {to}{seen}. Raise the learning rates (tried: "
        f"{tried}), train longer (epochs, max_steps), or adapt more modules; and look whether the labels follow from "
        "the rows at all (loraloom data)",
        {"lowest": lowest, "base": bar.base, "rates": [min(rates), max(rates)], "steps": steps},
    )


def _by_heart(trials: Sequence[Trial], bar: Bar) -> Advice | None:
    """The training loss fell, and what made it fall does not hold for other rows."""
    off = [trial for trial in trials if bar.has_taken_off(trial.curve.loss, trial.steps)]
    if not off:
        return None
    lowest = min(off, key=lambda trial: fmean(trial.curve.loss[-WINDOW:]))
    loss = fmean(lowest.curve.loss[-WINDOW:])
    held = lowest.latest("loss")
    beside = "" if held is None else f" while its held-out loss is {held:.3g}"
    return Advice(
        "apart",
        f"the training loss of trial {lowest.number} came down to {loss:.3g}{beside}: what it learned of its rows does "
        "not hold for others. Look whether the labels are right and the held-out rows are of the same kind (loraloom "
        "data), get more rows, or train for fewer epochs with less r and more dropout",
        {"training": loss, "held_out": held, "trial": lowest.number},
    )
