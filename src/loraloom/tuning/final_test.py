"""The test of a search: rows that chose nothing, looked at once, when the choice is made.

The winner is measured beside the runner-up and the answers that any configuration has to beat. Each figure has an
interval, and so has each difference, on the same rows. If a configuration was trained with several seeds, figures are
means over them and the intervals hold the noise of seeds too; otherwise they are about these very adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance

from loraloom.inference import intervals
from loraloom.inference.evaluation import Evaluator
from loraloom.inference.intervals import Difference, Interval, SeedNoise, Variance
from loraloom.inference.jackknife import error
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.training.setup import Setup
from loraloom.tuning.bar import CORRELATIONS, FROZEN, measure_bar
from loraloom.tuning.ranking import Score, goodness
from loraloom.tuning.state import TRIALS, damaged
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import name_of

#: Seed → the metric over all rows, and over all but each part of them.
Seeds = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Against:
    """Another configuration, or an answer in words, on the test rows, and how much better the winner is."""

    trial: int | None
    words: str
    figure: Interval
    better: Difference


@dataclass(frozen=True)
class FinalTest:
    """``figure`` is the winner's, the mean over its ``seeds``."""

    metric: str
    rows: int
    seeds: int
    figure: Interval
    against: list[Against]


def final_test(
    setup: Setup, metric: str, configurations: Sequence[Sequence[Trial]], scores: Mapping[int, Score], folder: Path
) -> FinalTest | None:
    """Measure the winner beside others; None without test rows, or if no adapter of the winner is whole.

    Args:
        configurations: the seeds of the winner, then those of the others.
        scores: what each configuration that learned something reached on the rows that chose.
        folder: of the search.
    """
    evaluator = setup.test_evaluator()
    if evaluator is None:
        return None
    seen = _figures(setup, evaluator, configurations, metric, folder)
    winner, *others = seen
    if not (mine := seen[winner]):
        return None
    # Seeds of the best were picked for being good, so they differ too little: the spread of all has a share.
    means = [score.mean for score in scores.values()]
    spread = variance(means) if len(means) > 1 else None
    noise = SeedNoise.pooled([list(one.values.values()) for one in scores.values()], spread)
    judge = _Judge(metric, _limits(metric, setup), evaluator, noise)
    against = [Against(n, "", judge.figure(seen[n]), judge.better(mine, seen[n])) for n in others if seen[n]]
    bar = measure_bar(setup, evaluator)
    frozen = bar.answers.pop(FROZEN, {})
    answers = [bar.best(metric), (FROZEN, frozen[metric]) if metric in frozen else None]
    for words, answer in filter(None, answers):
        against.append(Against(None, words, judge.figure([answer]), judge.better(mine, [answer], fixed=True)))
    return FinalTest(metric, judge.rows, len(mine), judge.figure(mine), against)


@dataclass(frozen=True)
class _Judge:
    """``limits`` are the least and the greatest value that the metric can have."""

    metric: str
    limits: tuple[float, float]
    evaluator: Evaluator
    noise: SeedNoise | None

    @property
    def rows(self) -> int:
        return self.evaluator.row_count

    def figure(self, seeds: Seeds) -> Interval:
        """The mean over seeds; of one adapter's accuracy the interval is exact."""
        mean = _mean(seeds)
        if self.metric == "accuracy" and len(seeds) == 1 and self.rows == len(self.evaluator.examples):
            return intervals.share(round(mean[0] * self.rows), self.rows)
        found = intervals.of_errors(mean[0], self._of_rows(mean), self._of_seeds(seeds), rows=self.rows)
        return Interval(found.value, max(found.low, self.limits[0]), min(found.high, self.limits[1]))

    def better(self, mine: Seeds, its: Seeds, fixed: bool = False) -> Difference:
        """How much better ``mine`` are than ``its``, which are ``fixed`` if no training made them."""
        above = [goodness(self.metric, a - b) for a, b in zip(_mean(mine), _mean(its), strict=True)]
        noises = [self._of_seeds(one) for one in ((mine,) if fixed else (mine, its))]
        noise = None
        if known := [one for one in noises if one is not None]:
            noise = (math.fsum(one for one, _ in known), known[0][1]) if len(known) == len(noises) else None
        seeds = min(len(mine), len(mine) if fixed else len(its)) if noise else 1
        return intervals.of_errors(above[0], self._of_rows(above), noise, rows=self.rows, seeds=seeds)

    def _of_rows(self, values: Sequence[float]) -> Variance:
        # One more row might have gone the other way: nothing is surer than that.
        least = abs(values[0]) / max(self.rows, 1)
        return max(error(values), least) ** 2, max(len(values) - 2, 1)

    def _of_seeds(self, seeds: Seeds) -> Variance | None:
        """Of the mean over these seeds; None if they are too few to claim anything of a configuration."""
        if self.noise is None or len(seeds) < 2:
            return None
        return self.noise.variance / len(seeds), self.noise.degrees


def _limits(metric: str, setup: Setup) -> tuple[float, float]:
    if metric not in (*setup.metrics.names, "loss"):  # a user's own
        return -math.inf, math.inf
    least = -1.0 if metric in CORRELATIONS else 0.0
    return least, 1.0 if greater_is_better(metric) else math.inf


def _mean(seeds: Seeds) -> list[float]:
    return [fmean(column) for column in zip(*seeds, strict=True)]


def _figures(
    setup: Setup, evaluator: Evaluator, configurations: Sequence[Sequence[Trial]], metric: str, folder: Path
) -> dict[int, Seeds]:
    """First trial → the metric of each seed's adapter on the test rows, in one pass. Damaged adapters are left out."""
    with setup.temporary_adapters() as model:
        names: dict[int, list[str]] = {group[0].number: [] for group in configurations}
        for group in configurations:
            for trial in group:
                name, path = name_of(trial.number), folder / TRIALS / name_of(trial.number)
                if trial.state != "finished" or damaged(path, trial.files):
                    continue
                if name not in model.peft_config:
                    model.load_adapter(path, name)
                names[group[0].number].append(name)
        every = [name for group in names.values() for name in group]
        found = dict(zip(every, evaluator.figures(every, evaluator.parts), strict=True)) if every else {}
    measured = {number: [found[name][metric] for name in group] for number, group in names.items()}
    return {number: [one for one in seeds if math.isfinite(one[0])] for number, seeds in measured.items()}
