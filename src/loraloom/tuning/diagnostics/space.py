"""Diagnoses from all trials on the space: its edges, rates that diverge, hyperparameters that made no difference.

Every function looks at one symptom and returns None if its figures do not show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from loraloom.messages import Message
from loraloom.tuning.diagnostics.inputs import FEW_STEPS, DiagnosticInputs
from loraloom.tuning.ranking import same, varying
from loraloom.tuning.trial import Trial

#: A trend: a trial nearer the edge beats one farther away in this share of all pairs. Chance alone gives 0.5, and
#: 0.75 with eight trials on each side about once in twenty.
TREND = 0.75
#: Trials that a trend needs on each side.
TREND_TRIALS = 3
#: A rate is too high when at least this share of the trials at or above it failed.
FAILED = 2 / 3
#: A hyperparameter did not matter below this share of the importance, if chance gives as much, and no value's trials
#: beat another's in more than this share of pairs.
IDLE = 0.1
IDLE_PAIRS = 0.7
#: Trials that must be compared for that.
IDLE_TRIALS = 12


def failures(evidence: DiagnosticInputs) -> Message | None:
    """Most trials from some rate on failed, and lower ones held."""
    rates = {trial.number: trial.options.learning_rate for trial in evidence.trials}
    failed = {trial.number for trial in evidence.trials if trial.state == "failed"}
    for bound in sorted({rates[number] for number in failed}):
        above = [number for number, rate in rates.items() if rate >= bound]
        held = [rate for number, rate in rates.items() if rate < bound and number not in failed]
        count = len(failed.intersection(above))
        if held and count >= FAILED * len(above):
            return Message("failures", failed=count, trials=len(above), rate=bound, held=max(held))
    return None


def edge(evidence: DiagnosticInputs) -> Iterator[Message]:
    """The best lies at an edge of the space, and trials nearer that edge did better."""
    if evidence.comparison.steps < FEW_STEPS:
        return
    for param, side in evidence.edges.items():
        at = evidence.place(evidence.best, param)
        # A trend of a hyperparameter that hardly counts is borrowed from others that happened to vary with it.
        borrowed = evidence.importance.get(param, 1.0) < IDLE and param not in evidence.mattered
        if at is None or borrowed:
            continue
        lower, upper = _halves(evidence, param)
        if min(len(lower), len(upper)) < TREND_TRIALS:
            continue
        near, far = (upper, lower) if side == "high" else (lower, upper)
        share = _beats([evidence.comparison.good(n) for n in near], [evidence.comparison.good(n) for n in far])
        if share < TREND or _failed_beyond(evidence, param, at, side):
            continue
        values = evidence.comparison.values
        means = {"near": median(values[n] for n in near), "far": median(values[n] for n in far)}
        figures = {"knob": param, "side": side, "value": evidence.best.values[param], **means, "pairs": share}
        yield Message("edge", **figures, metric=evidence.comparison.metric, at=evidence.comparison.share)


def _failed_beyond(evidence: DiagnosticInputs, param: str, at: float, side: str) -> bool:
    places = [evidence.place(trial, param) for trial in evidence.trials if trial.state == "failed"]
    return any(place is not None and (place >= at if side == "high" else place <= at) for place in places)


def _halves(evidence: DiagnosticInputs, param: str) -> tuple[list[int], list[int]]:
    """Trials with low and with high values of ``param``; equal values stay together."""
    places = {
        trial.number: place
        for trial in evidence.trials
        if trial.number in evidence.comparison.values and (place := evidence.place(trial, param)) is not None
    }
    ordered = sorted(places.values())
    if not ordered or ordered[0] == ordered[-1]:
        return [], []
    # The cut between two neighbouring values that divides most evenly.
    cuts = [low for low, high in pairwise(ordered) if low < high]
    cut = min(cuts, key=lambda c: abs(2 * sum(v <= c for v in ordered) - len(ordered)))
    return [n for n, v in places.items() if v <= cut], [n for n, v in places.items() if v > cut]


def _beats(ones: Sequence[float], others: Sequence[float]) -> float:
    """The share of pairs in which the one is greater; a draw is half. It cares for no scale and no outlier."""
    return fmean(1.0 if one > other else 0.5 if one == other else 0.0 for one in ones for other in others)


def insensitive_params(evidence: DiagnosticInputs) -> Iterator[Message]:
    """Hyperparameters that made no difference: fix them where the adapter is smallest."""
    compared = [trial for trial in evidence.trials if trial.number in evidence.comparison.values]
    if len(compared) < IDLE_TRIALS or evidence.comparison.steps < FEW_STEPS:
        return
    for param in varying(compared):
        share = evidence.importance.get(param, 1.0)
        groups = _groups(evidence, compared, param)
        if share >= IDLE or param in evidence.mattered or len(groups) < 2 or min(map(len, groups)) < TREND_TRIALS:
            continue
        goods = [[evidence.comparison.good(trial.number) for trial in group] for group in groups]
        if max(_beats(one, other) for one in goods for other in goods if one is not other) > IDLE_PAIRS:
            continue
        medians = [median(evidence.comparison.values[trial.number] for trial in group) for group in groups]
        value = _cheapest(compared, evidence.best, param)
        figures = {"knob": param, "share": share, "lowest": min(medians), "highest": max(medians), "value": value}
        yield Message("idle", **figures, metric=evidence.comparison.metric, at=evidence.comparison.share)


def _groups(evidence: DiagnosticInputs, trials: Sequence[Trial], param: str) -> list[list[Trial]]:
    """Trials by their value; by halves if nearly every trial has another value."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if param in trial.values:
            groups.setdefault(same(trial.values[param]), []).append(trial)
    if min(map(len, groups.values())) >= TREND_TRIALS:
        return list(groups.values())
    by_number = {trial.number: trial for trial in trials}
    return [[by_number[n] for n in half] for half in _halves(evidence, param) if half]


def _cheapest(trials: Sequence[Trial], best: Trial, param: str) -> Any:
    """The value with the fewest parameters, or the least to compute; the best's own where all cost the same."""
    values = {same(trial.values[param]): trial.values[param] for trial in trials if param in trial.values}
    if param.endswith((".r", "lora_dropout")):
        return min(values.values())
    if not param.endswith(("target_modules", "modules_to_save")):
        return best.values.get(param, next(iter(values.values())))  # the best may be of an earlier space
    sizes: dict[str, list[float]] = {text: [] for text in values}
    for trial in trials:
        if param in trial.values:
            sizes[same(trial.values[param])].append(trial.parameters / trial.options.lora.r)
    return values[min(sizes, key=lambda text: (median(sizes[text]), text))]
