"""Diagnoses from the best trial's curves: overfitting, undertraining, loss spikes.

Every function looks at one symptom and returns None if its figures do not show it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from loraloom.messages import Message
from loraloom.tuning.diagnostics.inputs import FEW_STEPS, DiagnosticInputs
from loraloom.tuning.ranking import goodness

#: Overfitting: the held-out loss is this far above the training loss, and above its own lowest. Smaller gaps also come
#: from dropout on training rows, and from the rows themselves.
APART = 1.2
RISE = 1.03
#: Undertrained: over the last third of the steps the training loss falls by this share, which is at least this many
#: standard errors of its slope, and scatters by less than this share about the line.
FALL = 0.05
FALL_ERRORS = 4.0
EVEN = 0.25
#: A spike: a loss above this many times the mean of the steps before it, and by this share of the first losses, so that
#: noise near 0 is no spike.
SPIKE = 1.5
SPIKE_SHARE = 0.15
SPIKE_WINDOW = 8
#: At least this many spikes, and this share of the steps, are a pattern.
SPIKES = 3
SPIKES_SHARE = 0.03


def overfitting(evidence: DiagnosticInputs) -> Message | None:
    """Training loss keeps falling while held-out loss has turned up."""
    trial = evidence.best
    held = trial.points("loss", full=True)
    losses = _finite_ones(trial.curve.loss)
    if len(held) < 3 or len(losses) < FEW_STEPS or not all(math.isfinite(loss) for _, loss in held):
        return None
    train = fmean(losses[-max(len(losses) // 10, 5) :])
    step, lowest = min(held, key=lambda pair: (pair[1], pair[0]))
    last = held[-1][1]
    if last < APART * train or last < RISE * lowest or last <= held[-2][1]:
        return None
    lora = trial.options.lora
    figures = {"training": train, "held_out": last, "lowest": lowest, "step": step}
    return Message("apart", **figures, dropout=lora.lora_dropout, r=lora.r)


def undertrained(evidence: DiagnosticInputs) -> Message | None:
    """The loss still falls evenly: larger or more steps would help."""
    trial = evidence.best
    losses = _finite_ones(trial.curve.loss[-(len(trial.curve.loss) // 3) :])
    if len(losses) < FEW_STEPS or fmean(losses) <= 0:
        return None
    level, slope, error, scatter = _line(losses)
    start = level - slope * len(losses) / 2
    fall = -slope * len(losses) / start if start > 0 else 0.0
    held = [loss for _, loss in trial.points("loss", full=True)]
    turned = len(held) > 1 and not held[-1] < held[-2]
    if fall < FALL or -slope < FALL_ERRORS * error or scatter > EVEN * level or turned:
        return None
    # If higher rates were tried and did worse, a higher rate is no remedy.
    good, comparison = evidence.comparison.good, evidence.comparison
    mine = comparison.values.get(trial.number)
    faster = [
        other.number
        for other in evidence.trials
        if other.number in comparison.values and other.options.learning_rate > trial.options.learning_rate * 1.2
    ]
    worse = [n for n in faster if mine is not None and good(n) < goodness(comparison.metric, mine)]
    figures = {"fall": fall, "scatter": scatter / level, "faster": len(faster), "faster_and_worse": len(worse)}
    options = trial.options
    return Message("slow", **figures, lora_alpha=options.lora.lora_alpha, rate=options.learning_rate)


def _line(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Least squares: mean, slope a step, standard error of the slope, standard deviation about the line."""
    n, mean = len(values), fmean(values)
    middle = (n - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * (v - mean) for i, v in enumerate(values)) / spread
    scatter = math.sqrt(sum((v - mean - slope * (i - middle)) ** 2 for i, v in enumerate(values)) / (n - 2))
    return mean, slope, scatter / math.sqrt(spread), scatter


def loss_spikes(evidence: DiagnosticInputs) -> Message | None:
    """The loss spikes repeatedly, and more often than at lower rates on the same rows."""
    trial = evidence.best
    count, steps = _spikes(trial.curve.loss), len(trial.curve.loss)
    if steps < FEW_STEPS or count < SPIKES or count < SPIKES_SHARE * steps:
        return None
    rate = trial.options.learning_rate
    lower = [
        _spikes(other.curve.loss[:steps]) * steps / min(len(other.curve.loss), steps)
        for other in evidence.trials
        if other.options.learning_rate < rate / 1.2 and len(other.curve.loss) >= FEW_STEPS
    ]
    if lower and median(lower) > count / 2:
        return None  # the rows cause the spikes, not the rate
    at_lower = median(lower) if lower else None
    alpha = trial.options.lora.lora_alpha
    return Message("spiky", jumps=count, steps=steps, at_lower_rates=at_lower, rate=rate, lora_alpha=alpha)


def _spikes(losses: Sequence[float | None]) -> int:
    values = _finite_ones(losses)
    if len(values) <= SPIKE_WINDOW:
        return 0
    floor = SPIKE_SHARE * fmean(values[:SPIKE_WINDOW])
    before = (fmean(values[i - SPIKE_WINDOW : i]) for i in range(SPIKE_WINDOW, len(values)))
    return sum(
        value > SPIKE * mean and value - mean > floor for value, mean in zip(values[SPIKE_WINDOW:], before, strict=True)
    )


def _finite_ones(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
