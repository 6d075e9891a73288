"""How trials compare: what each configuration scored over its seeds, with its noise, and who stands before whom.

Numbers alone. A configuration is known by the number of its first trial; trials that repeat it are further seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median_low, variance
from typing import Any

from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.tuning.trial import Trial

#: Fewer trials than these say nothing about hyperparameters.
COMPARED = 8
#: A configuration whose seeds differ this many times more than the others' is unstable: that is its own noise alone.
UNSTABLE = 10


def goodness(metric: str, value: float) -> float:
    """More is better, whatever the metric."""
    return value if greater_is_better(metric) else -value


def measured(evaluation: Mapping[str, float | None], metric: str) -> float:
    """The metric of one evaluation; NaN where it is missing, or null as in a file."""
    value = evaluation.get(metric)
    return math.nan if value is None else float(value)


def last_measured(trial: Trial, metric: str) -> tuple[int, float] | None:
    """The step and the value of the last evaluation, finite or not."""
    if not trial.curve.evaluations:
        return None
    last = trial.curve.evaluations[-1]
    return int(last["step"]), measured(last, metric)


@dataclass(frozen=True)
class Score:
    """What one configuration reached.

    ``mean`` is over the seeds that came furthest, NaN when none has a finite value. ``noise`` is the standard error of
    that mean, from the deviation pooled over all configurations that were trained with several seeds; None where
    there is none.
    """

    mean: float
    noise: float | None
    #: seed → metric
    values: dict[int, float] = field(default_factory=dict)
    #: the step it was measured at, and that over the steps of the whole training
    step: int = 0
    share: float = 0.0
    finished: bool = False
    #: seeds whose training failed, or ended with a metric that is not finite
    failed: int = 0
    #: its seeds differ far more than those of the others
    unstable: bool = False


def originals(trials: Iterable[Trial]) -> dict[int, list[Trial]]:
    """Number of the first trial → all trials of its configuration, itself first."""
    ordered = sorted(trials, key=lambda trial: trial.number)
    parent = {trial.number: trial.repeats for trial in ordered}
    groups: dict[int, list[Trial]] = {}
    for trial in ordered:
        root = trial.number
        while (up := parent[root]) is not None and up in parent and up != root:
            root = up
        groups.setdefault(root, []).append(trial)
    return {root: sorted(group, key=lambda trial: trial.number != root) for root, group in sorted(groups.items())}


def scores(trials: Iterable[Trial], metric: str) -> dict[int, Score]:
    """Every configuration's score, also of those that never got one."""
    groups = originals(trials)
    seen = {number: _seeds(group, metric) for number, group in groups.items()}
    ended = any(score.finished for score in seen.values())
    several = {
        number: (len(s.values) - 1, variance(s.values.values()))
        for number, s in seen.items()
        if len(s.values) > 1 and s.finished == ended
    }
    typical = median_low(square for _, square in several.values()) if several else 0.0
    unstable = {n: math.sqrt(square) for n, (_, square) in several.items() if square > UNSTABLE**2 * typical > 0}
    steady = [pair for number, pair in several.items() if number not in unstable]
    degrees = sum(freedom for freedom, _ in steady)
    pooled = math.sqrt(sum(freedom * square for freedom, square in steady) / degrees) if degrees else None
    out = {}
    for number, s in seen.items():
        # The noise at the end says nothing of trials that were stopped on the way.
        deviation = unstable.get(number, pooled) if s.values and s.finished == ended else None
        noise = None if deviation is None else deviation / math.sqrt(len(s.values))
        out[number] = Score(s.mean, noise, s.values, s.step, s.share, s.finished, s.failed, number in unstable)
    return out


def _seeds(group: Sequence[Trial], metric: str) -> Score:
    alive = [trial for trial in group if trial.state != "failed"]
    failed = len(group) - len(alive)
    finished = [trial for trial in alive if trial.state == "finished"]
    reached = {}
    for trial in finished or alive:
        if (last := last_measured(trial, metric)) is not None:
            reached[trial.number] = (*last, trial)
    furthest = max((step for step, _, _ in reached.values()), default=0)
    at = [(value, trial) for step, value, trial in reached.values() if step == furthest]
    values = {trial.options.seed: value for value, trial in at if math.isfinite(value)}
    failed += sum(not math.isfinite(value) for value, _ in at)
    mean = fmean(values.values()) if values else math.nan
    share = furthest / max(group[0].steps, 1)
    return Score(mean, None, values, furthest, share, bool(finished and values), failed)


def ranking(trials: Iterable[Trial], metric: str, known: Mapping[int, Score]) -> list[int]:
    """Configurations, best first: finished ones before those that were stopped on the way, the furthest of these first.

    Where several were repeated with other seeds these stand before the rest: they were the best so far, and a mean over
    seeds is no match for a single lucky one. One of which a seed failed stands behind those of which none did.
    """
    groups = originals(trials)
    repeated = sum(len(s.values) > 1 for s in known.values() if s.finished) > 1

    def key(number: int) -> tuple[Any, ...]:
        score, first = known[number], groups[number][0]
        if not score.values:
            tier = 3
        elif not score.finished:
            tier = 2
        else:
            tier = 1 if score.failed else 0
        single = repeated and len(score.values) < 2
        far = -score.share if tier == 2 else 0.0
        good = -goodness(metric, score.mean) if score.values else 0.0
        return tier, single, far, good, first.parameters, number

    return sorted(groups, key=key)


@dataclass(frozen=True)
class Comparison:
    """All trials at one point of their training.

    ``values`` are the metric by trial number; ``failed`` are the trials that failed, which count as badly as the worst.
    """

    metric: str
    share: float
    values: dict[int, float]
    failed: frozenset[int]
    #: steps that the shortest of them had taken there
    steps: int = 0

    def good(self, number: int) -> float:
        return goodness(self.metric, self.values[number])


def compare(trials: Iterable[Trial], metric: str) -> Comparison:
    """Compare at the furthest point that at least half of the measured trials, and eight, reached.

    Later is closer to the truth, and more trials say more. Further seeds stay out.
    """
    firsts = [group[0] for group in originals(trials).values()]
    failed = frozenset(trial.number for trial in firsts if trial.state == "failed")
    alive = [trial for trial in firsts if trial.number not in failed]
    curves: dict[int, list[tuple[float, float]]] = {}
    for trial in alive:
        points = [(e["step"] / max(trial.steps, 1), measured(e, metric)) for e in trial.curve.evaluations]
        if finite := [(share, value) for share, value in points if math.isfinite(value)]:
            curves[trial.number] = finite
    if not curves:
        return Comparison(metric, 0.0, {}, failed)
    reached = sorted((points[-1][0] for points in curves.values()), reverse=True)
    share = reached[min(max((len(reached) + 1) // 2, COMPARED), len(reached)) - 1]
    values = {}
    for number, points in curves.items():
        before = [value for at, value in points if at <= share + 1e-9]
        if points[-1][0] >= share - 1e-9 and before:
            values[number] = before[-1]
    worst = min(values.values(), key=lambda value: goodness(metric, value))
    steps = min(round(share * trial.steps) for trial in alive if trial.number in values)
    return Comparison(metric, share, values | dict.fromkeys(sorted(failed), worst), failed, steps)


def same(value: Any) -> str:
    """A hyperparameter's value as something that can be compared and hashed: lists and numbers alike."""
    return json.dumps(value, sort_keys=True, default=str)


def varying(trials: Iterable[Trial]) -> list[str]:
    """The hyperparameters that have more than one value, in the order they were proposed."""
    seen: dict[str, set[str]] = {}
    for trial in trials:
        for param, value in trial.values.items():
            seen.setdefault(param, set()).add(same(value))
    return [param for param, values in seen.items() if len(values) > 1]
