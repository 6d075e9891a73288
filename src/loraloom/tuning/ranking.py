"""How trials compare: what each configuration scored over its seeds, with its noise, and their order.

Numbers alone. A configuration is known by the number of its first trial; trials that repeat it are further seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, median_low, variance
from typing import Any

from loraloom.inference.jackknife import error
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.tuning.trial import Trial

#: Trials that are needed to compare hyperparameters.
COMPARED = 8
#: A configuration whose seeds differ this many times more than the others' is unstable: that is its own noise alone.
UNSTABLE = 10


def goodness(metric: str, value: float) -> float:
    """The value, or its negative, so that more is better for every metric."""
    return value if greater_is_better(metric) else -value


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
    #: the step at which it was measured over the steps of the whole training
    share: float = 0.0
    finished: bool = False
    #: seeds whose training failed, or ended with a metric that is not finite
    failed: int = 0
    #: its seeds differ far more than those of the others
    unstable: bool = False
    #: standard error of the mean by the held-out rows; infinite if it is unknown
    of_rows: float = math.inf

    @property
    def error(self) -> float | None:
        """Standard error by rows and seeds together, as far as they are known."""
        known = [one for one in (self.noise, self.of_rows) if one is not None and math.isfinite(one)]
        return math.hypot(*known) if known else None

    @property
    def tier(self) -> int:
        """0: every seed finished; 1: some did; 2: measured before its end; 3: never measured."""
        if not self.values:
            return 3
        return int(self.failed > 0) if self.finished else 2


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
    found = {number: _score(group, metric) for number, group in originals(trials).items()}
    ended = any(score.finished for score in found.values())
    # The noise at the end says nothing of trials that were stopped before it.
    level = {number: score for number, score in found.items() if score.values and score.finished == ended}
    squares = {number: variance(score.values.values()) for number, score in level.items() if len(score.values) > 1}
    typical = median_low(squares.values()) if squares else 0.0
    unstable = {number for number, square in squares.items() if square > UNSTABLE**2 * typical > 0}
    degrees = {number: len(level[number].values) - 1 for number in squares.keys() - unstable}
    pooled = sum(squares[n] * degrees[n] for n in sorted(degrees)) / sum(degrees.values()) if degrees else None
    for number, score in level.items():
        square = squares[number] if number in unstable else pooled
        noise = None if square is None else math.sqrt(square) / math.sqrt(len(score.values))
        found[number] = replace(score, noise=noise, unstable=number in unstable)
    return found


def _score(group: Sequence[Trial], metric: str) -> Score:
    group = [trial for trial in group if not trial.dropped]
    alive = [trial for trial in group if trial.state != "failed"]
    finished = [trial for trial in alive if trial.state == "finished"]
    reached = [(*points[-1], t) for t in finished or alive if (points := t.points(metric))]
    furthest = max((step for step, *_ in reached), default=0)
    there = [(trial, value) for step, value, trial in reached if step == furthest]
    kept = [(trial, value) for trial, value in there if math.isfinite(value)]
    values = {trial.options.seed: value for trial, value in kept}
    seeds = [trial.figures(metric) for trial, _ in kept]
    same_rows = seeds and len({len(one) for one in seeds}) == 1
    return Score(
        mean=fmean(values.values()) if values else math.nan,
        noise=None,
        values=values,
        share=furthest / max(group[0].steps, 1),
        finished=bool(finished and values),
        failed=len(group) - len(alive) + len(there) - len(values),
        of_rows=error([fmean(column) for column in zip(*seeds, strict=True)]) if same_rows and seeds[0] else math.inf,
    )


def ranking(trials: Iterable[Trial], metric: str, known: Mapping[int, Score]) -> list[int]:
    """Configurations, best first: finished ones before those that were stopped early, the furthest of these first.

    Where several were repeated with other seeds these stand before the rest: they were the best so far, and a mean over
    seeds is no match for a single lucky one. One of which a seed failed stands behind those of which none did.
    """
    groups = originals(trials)
    repeated = sum(len(s.values) > 1 for s in known.values() if s.finished) > 1

    def key(number: int) -> tuple[Any, ...]:
        score = known[number]
        single = repeated and len(score.values) < 2
        far = -score.share if score.tier == 2 else 0.0
        good = -goodness(metric, score.mean) if score.values else 0.0
        return score.tier, single, far, good, groups[number][0].parameters, number

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
        points = [(step / max(trial.steps, 1), value) for step, value in trial.points(metric) if math.isfinite(value)]
        if points:
            curves[trial.number] = points
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
