"""How good a configuration is, and how much better than another, on the same held-out rows, each with its interval.

The rows that chose the winner and those of the test are judged alike, by their figures alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import variance

from loraloom.inference import intervals
from loraloom.inference.evaluation import Evaluator
from loraloom.inference.intervals import Difference, Interval, SeedNoise, Seeds
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.training.setup import Setup
from loraloom.tuning.bar import CORRELATIONS, Bar
from loraloom.tuning.ranking import Score, goodness, originals
from loraloom.tuning.trial import Trial

#: Weight of the spread of all outcomes beside the seeds of the finalists, in degrees of freedom. Searches replayed on
#: tables chose it (benchmarks/search/calibrate.py).
PRIOR = 0.25


def seed_noise(scores: Iterable[Score], outcomes: Sequence[float] = ()) -> SeedNoise | None:
    """The noise of one seed, from configurations that learned something; None where none has two seeds.

    Finalists were picked for a good first seed, and three good seeds do not exclude that a fourth fails. How far
    ``outcomes`` differ (those of the function of that name) says how much that would cost, and counts as a little more
    evidence.
    """
    seeds = [list(score.values.values()) for score in scores if score.values]
    return SeedNoise.pooled(seeds, variance(outcomes) if len(outcomes) > 1 else None, PRIOR)


def outcomes(trials: Iterable[Trial], metric: str, bar: Bar | None) -> list[float]:
    """How the first trial of each configuration ended: its metric, or the bar if it diverged or came to no better.

    Empty where all came to better: there is no sign that a further seed might fail. A trial that was stopped above the
    bar has no end to compare.
    """
    best = None if bar is None else bar.best(metric)
    if best is None:
        return []
    least, ends, failed = best[1][0], list[float](), 0
    for trial in (group[0] for group in originals(trials).values()):
        value = trial.latest(metric)
        measured = value is not None and math.isfinite(value)
        if trial.state == "failed" or (measured and goodness(metric, value or 0.0) <= goodness(metric, least)):
            failed += 1
        elif measured and trial.state == "finished":
            ends.append(value or 0.0)
    return ends + [least] * failed if failed else []


@dataclass(frozen=True)
class Against:
    """Another configuration (or an answer in ``words``) on the same rows, and how much better the winner is."""

    trial: int | None
    words: str
    figure: Interval
    better: Difference


@dataclass(frozen=True)
class Judge:
    """Of ``metric`` on ``rows`` held-out rows; seeds differ by ``noise``.

    ``own``: the metric is a user's own, of unknown limits. ``exact``: each example is a row, so that an accuracy is a
    share of rows.
    """

    metric: str
    rows: int
    noise: SeedNoise | None = None
    own: bool = False
    exact: bool = True

    @classmethod
    def of(cls, setup: Setup, evaluator: Evaluator, metric: str, noise: SeedNoise | None = None) -> Judge:
        """The judge of ``metric`` on the rows of ``evaluator``."""
        rows = evaluator.row_count
        exact = rows == len(evaluator.examples) and setup.task.layout == "row"
        return cls(metric, rows, noise, own=metric not in (*setup.metrics.names, "loss"), exact=exact)

    @property
    def limits(self) -> tuple[float, float]:
        """The least and the greatest value of the metric."""
        if self.own:
            return -math.inf, math.inf
        least = -1.0 if self.metric in CORRELATIONS else 0.0
        return least, 1.0 if greater_is_better(self.metric) else math.inf

    def figure(self, seeds: Seeds) -> Interval:
        """The mean over seeds; of one adapter's accuracy the interval is exact."""
        if self.metric == "accuracy" and len(seeds) == 1 and self.exact and not self.own:
            return intervals.share(round(seeds[0][0] * self.rows), self.rows)
        found = intervals.figure(seeds, self.noise, rows=self.rows, unit=self._unit)
        low, high = self.limits
        return Interval(found.value, max(found.low, low), min(found.high, high))

    def better(self, mine: Seeds, its: Seeds, fixed: bool = False) -> Difference:
        """How much better ``mine`` are than ``its``, which no training made if they are ``fixed``."""
        return intervals.compare(
            mine,
            its,
            self.noise,
            rows=self.rows,
            greater_is_better=greater_is_better(self.metric),
            fixed=fixed,
            unit=self._unit,
        )

    def against(
        self, mine: Seeds, others: Mapping[int, Seeds], answers: Iterable[tuple[str, Sequence[float]]]
    ) -> list[Against]:
        """``mine`` beside configurations and beside answers in words; those of other rows are left out."""
        parts = len(mine[0])
        known = {n: seeds for n, seeds in others.items() if seeds and all(len(one) == parts for one in seeds)}
        found = [Against(n, "", self.figure(seeds), self.better(mine, seeds)) for n, seeds in known.items()]
        fixed = [(words, [values]) for words, values in answers if len(values) == parts]
        return found + [Against(None, w, self.figure(one), self.better(mine, one, fixed=True)) for w, one in fixed]

    @property
    def _unit(self) -> float:
        return 1.0 if self.limits[1] == 1 else 0.0
