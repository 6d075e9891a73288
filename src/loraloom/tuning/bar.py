"""What a configuration has to beat before it may be recommended, and whether it does.

The bar is the best answer that does not look at the row, and the frozen model's own where its head is not a new one.
A configuration has learned something where it lies above that by more than its standard error, and by more than the
luck of the best of all that were tried explains: by the metric, or by the loss, on the same held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean
from typing import Any

from loraloom.inference.jackknife import Figures, error
from loraloom.lora.routing import BASE
from loraloom.training.setup import Setup
from loraloom.tuning.asha import taken_off
from loraloom.tuning.constant import constant, measure, training_loss
from loraloom.tuning.ranking import goodness
from loraloom.tuning.trial import Trial

#: One chance in twenty that nothing but luck passes, over all configurations together.
LUCK = 0.05
#: A loss is better only from this share on: differences of a thousandth can be certain, and are of no use.
SHARE = 0.02
#: Training losses that say where a trial began, where no constant answer does.
FIRST = 4
#: Metrics that no constant answer has: it goes along with nothing.
_CORRELATIONS = ("pearson", "spearman")


@dataclass
class Bar:
    """``answers`` are figures in words → metric → over all held-out rows, and over all but each part of them.

    ``base`` is the training loss of the best constant answer, None where there is none. ``begins`` says whether a
    trial's own first losses count as well, because its head has learned before.
    """

    rows: int
    base: float | None = None
    begins: bool = True
    answers: dict[str, Figures] = field(default_factory=dict)

    def best(self, metric: str) -> tuple[str, list[float]] | None:
        """The hardest to beat, in words, and its figures."""
        found = [(words, one[metric]) for words, one in self.answers.items() if metric in one]
        finite = [(words, values) for words, values in found if math.isfinite(values[0])]
        if not finite:
            return None
        return max(finite, key=lambda pair: goodness(metric, pair[1][0]))

    def figures(self, metric: str) -> dict[str, Any]:
        """What a message tells of the bar."""
        best = self.best(metric)
        return {"metric": metric, "bar_words": best and best[0], "bar": best and best[1][0]}

    @property
    def parts(self) -> int:
        """Parts that the held-out rows are divided into."""
        return max((len(values) - 1 for one in self.answers.values() for values in one.values()), default=0)

    def has_taken_off(self, losses: list[float], steps: int) -> bool:
        """Whether a trial of ``steps`` steps with these training losses has left where it began."""
        base = self.starting_loss(losses)
        return base is not None and taken_off(losses, base, steps)

    def starting_loss(self, losses: Sequence[float]) -> float | None:
        """The training loss that a trial with these ``losses`` must leave behind; None while that is not known."""
        first = fmean(losses[:FIRST]) if len(losses) >= FIRST else None
        if not self.begins:
            return self.base
        return first if self.base is None else self.base if first is None else min(first, self.base)


@dataclass(frozen=True)
class Gain:
    """How far above the bar: ``gain`` with its standard error, and the standard error of the figure itself."""

    metric: str
    bar: float
    bar_words: str
    figure: float
    gain: float
    error: float
    own_error: float
    sure: bool


def set_bar(setup: Setup) -> Bar:
    """Measure the bar on the held-out rows of ``setup``."""
    bar = Bar(len(setup.data.validation_rows))
    if (found := constant(setup)) is not None:
        bar.base, bar.answers = training_loss(found, setup), measure(found, setup)
    bar.begins = not (setup.new_modules and setup.task.class_word)  # a new head for classes is of no use untrained
    if bar.begins:
        (bar.answers["the frozen model"],) = setup.evaluator().figures([BASE], setup.parts)
    return bar


def gain(bar: Bar, trials: Sequence[Trial], metric: str, tried: int) -> Gain | None:
    """How far a configuration, trained with one seed or several, lies above the bar; None where that is not known."""
    seeds = [trial.parts[metric] for trial in trials if trial.parts.get(metric)]
    best = bar.best(metric)
    words, values = best if best is not None else ("no correlation", [])
    if best is None and metric in _CORRELATIONS and seeds:
        values = [0.0] * len(seeds[0])
    if not seeds or not values or any(len(seed) != len(values) for seed in seeds):
        return None
    mean = [fmean(column) for column in zip(*seeds, strict=True)]
    above = [goodness(metric, one - other) for one, other in zip(mean, values, strict=True)]
    # One more row might have gone the other way: no difference is surer than that.
    least = abs(above[0]) / max(bar.rows, 1)
    spread, own = max(error(above), least), max(error(mean), least)
    least_share = SHARE * abs(values[0]) if metric == "loss" else 0.0
    sure = above[0] > least_share and above[0] > needed(len(values) - 1, tried) * spread
    return Gain(metric, values[0], words, mean[0], above[0], spread, own, sure)


def learned(bar: Bar, trials: Sequence[Trial], metric: str, tried: int) -> bool:
    """Whether the configuration of ``trials`` (its seeds) is above the bar, of ``tried`` configurations."""
    by_metric = gain(bar, trials, metric, tried)
    by_loss = gain(bar, trials, "loss", tried)
    if by_metric is None:  # a metric that no answer but the trials' has: the loss alone decides
        return by_loss is not None and by_loss.sure
    return by_metric.gain > by_metric.own_error and (by_metric.sure or (by_loss is not None and by_loss.sure))


def needed(parts: int, tried: int) -> float:
    """Standard errors that the best of ``tried`` must lie above the bar: Student's t, with Bonferroni's correction."""
    freedom = parts - 1
    if freedom < 1:
        return math.inf
    z = NormalDist().inv_cdf(1 - LUCK / max(tried, 1))
    # Abramowitz and Stegun 1964, 26.7.5.
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))
