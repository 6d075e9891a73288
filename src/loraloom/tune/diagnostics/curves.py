"""What the best trial's curves say: learnt by heart, not done yet, or torn about.

Every function looks at one symptom and answers None when its figures do not support a word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median

from loraloom.tune.diagnostics.inputs import FEW_STEPS, Advice, DiagnosticInputs
from loraloom.tune.format import shown
from loraloom.tune.ranking import goodness, measured

#: Apart: the held-out loss is this far above the training loss, and above its own lowest. Both are means over many
#: rows; smaller gaps also arise from training rows being seen with dropout, and from the rows themselves.
APART = 1.2
RISE = 1.03
#: Training loss that still falls by this share over the last third of the steps is not done, where the fall is at least
#: so many standard errors of its own slope and the steps scatter by less than this share about the line.
FALL = 0.05
FALL_ERRORS = 4.0
EVEN = 0.25
#: A jump: a loss above this many times the mean of the steps before it, and by this share of where training began, so
#: that the wobble of losses near 0 is none.
JUMP = 1.5
JUMP_SHARE = 0.15
JUMP_WINDOW = 8
#: So many jumps, and so large a share of the steps, are a pattern.
JUMPS = 3
JUMPS_SHARE = 0.03


def apart(evidence: DiagnosticInputs) -> Advice | None:
    """Training loss goes on down while held-out loss has turned up: rows are learnt by heart."""
    trial = evidence.best
    held = [(int(e["step"]), measured(e, "loss")) for e in trial.curve.evaluations if "rows" not in e]
    losses = _finite_ones(trial.curve.loss)
    if len(held) < 3 or len(losses) < FEW_STEPS or not all(math.isfinite(loss) for _, loss in held):
        return None
    train = fmean(losses[-max(len(losses) // 10, 5) :])
    step, lowest = min(((s, loss) for s, loss in held), key=lambda pair: (pair[1], pair[0]))
    last = held[-1][1]
    if last < APART * train or last < RISE * lowest or last <= held[-2][1]:
        return None
    lora = trial.options.lora
    return Advice(
        "apart",
        f"training loss is down to {train:.3g} while held-out loss rose to {last:.3g} from {lowest:.3g} at step "
        f"{step}: the rows are learnt by heart. Use more dropout (now {shown(lora.lora_dropout)}), less r (now "
        f"{lora.r}), fewer steps, or more data",
        {"training": train, "held_out": last, "lowest": lowest, "step": step},
    )


def slow(evidence: DiagnosticInputs) -> Advice | None:
    """The loss is still on its way down, evenly: there was room for larger or for more steps."""
    trial = evidence.best
    losses = _finite_ones(trial.curve.loss[-(len(trial.curve.loss) // 3) :])
    if len(losses) < FEW_STEPS or fmean(losses) <= 0:
        return None
    level, slope, error, scatter = _line(losses)
    start = level - slope * len(losses) / 2
    fall = -slope * len(losses) / start if start > 0 else 0.0
    held = [measured(e, "loss") for e in trial.curve.evaluations if "rows" not in e]
    turned = len(held) > 1 and not held[-1] < held[-2]
    if fall < FALL or -slope < FALL_ERRORS * error or scatter > EVEN * level or turned:
        return None
    # Where faster trials were tried and did worse, a higher rate is no advice.
    good, comparison = evidence.comparison.good, evidence.comparison
    mine = comparison.values.get(trial.number)
    faster = [
        other.number
        for other in evidence.trials
        if other.number in comparison.values and other.options.learning_rate > trial.options.learning_rate * 1.2
    ]
    worse = [n for n in faster if mine is not None and good(n) < goodness(comparison.metric, mine)]
    figures = {"fall": fall, "scatter": scatter / level, "faster": len(faster), "faster_and_worse": len(worse)}
    words = f"the training loss still fell by {fall:.0%} over the last third of the steps, evenly"
    if faster and len(worse) > len(faster) / 2:
        return Advice(
            "slow",
            f"{words}, and {len(worse)} of {len(faster)} trials with higher rates did worse: train longer",
            figures,
        )
    lora = trial.options.lora
    return Advice(
        "slow",
        f"{words}: raise lora_alpha (now {lora.lora_alpha:g}) or the learning rate (now "
        f"{shown(trial.options.learning_rate)}), or train longer",
        figures,
    )


def _line(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Least squares: mean, slope a step, standard error of the slope, standard deviation about the line."""
    n, mean = len(values), fmean(values)
    middle = (n - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * (v - mean) for i, v in enumerate(values)) / spread
    scatter = math.sqrt(sum((v - mean - slope * (i - middle)) ** 2 for i, v in enumerate(values)) / (n - 2))
    return mean, slope, scatter / math.sqrt(spread), scatter


def spiky(evidence: DiagnosticInputs) -> Advice | None:
    """The loss leaps up again and again, and more often than at lower rates on the same rows."""
    trial = evidence.best
    count, steps = _jumps(trial.curve.loss), len(trial.curve.loss)
    if steps < FEW_STEPS or count < JUMPS or count < JUMPS_SHARE * steps:
        return None
    rate = trial.options.learning_rate
    lower = [
        _jumps(other.curve.loss[:steps]) * steps / min(len(other.curve.loss), steps)
        for other in evidence.trials
        if other.options.learning_rate < rate / 1.2 and len(other.curve.loss) >= FEW_STEPS
    ]
    if lower and median(lower) > count / 2:
        return None  # the rows make the jumps, not the rate
    beside = f"; at lower rates the median is {median(lower):.0f}" if lower else ""
    return Advice(
        "spiky",
        f"the training loss leapt up at {count} of {steps} steps{beside}: lower the learning rate (now {shown(rate)}) "
        f"or lora_alpha (now {trial.options.lora.lora_alpha:g})",
        {"jumps": count, "steps": steps, "at_lower_rates": median(lower) if lower else None, "rate": rate},
    )


def _jumps(losses: Sequence[float | None]) -> int:
    values = _finite_ones(losses)
    if len(values) <= JUMP_WINDOW:
        return 0
    floor = JUMP_SHARE * fmean(values[:JUMP_WINDOW])
    before = (fmean(values[i - JUMP_WINDOW : i]) for i in range(JUMP_WINDOW, len(values)))
    return sum(
        value > JUMP * mean and value - mean > floor for value, mean in zip(values[JUMP_WINDOW:], before, strict=True)
    )


def _finite_ones(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
