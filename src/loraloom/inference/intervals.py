"""How sure a figure is: intervals of shares of rows, and of differences between adapters on the same rows.

A difference has two sources of noise: the held-out rows are a sample, and so are the seeds of a training. An interval
that claims something of configurations has both; with one seed each, it is about these very adapters alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

from loraloom.inference.jackknife import error

LEVEL = 0.95

#: A configuration's figures of one metric, seed by seed: over all rows, then without each part (`inference.jackknife`).
Seeds = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Interval:
    """``value``, and the range that holds the true one in ``level`` of all cases."""

    value: float
    low: float
    high: float
    level: float = LEVEL


@dataclass(frozen=True)
class Difference(Interval):
    """How much better one is than another, on ``rows`` that both answered.

    ``seeds`` is how many trainings of each the claim rests on: 1 where it is about these very adapters alone.
    ``rows_needed`` is how many rows would tell the two apart, were the difference what it seems; 0 where these do, None
    where no number of rows would, because the seeds differ too much.
    """

    rows: int = 0
    seeds: int = 1
    rows_needed: int | None = 0

    @property
    def clear(self) -> bool:
        """Whether the two can be told apart."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class SeedNoise:
    """The variance of a figure between seeds of one configuration, and the degrees of freedom it was estimated with."""

    variance: float
    degrees: float

    @classmethod
    def pooled(
        cls, figures: Sequence[Sequence[float]], spread: float | None = None, weight: float = 1.0
    ) -> SeedNoise | None:
        """From the figures of several configurations, each with its seeds. None where none has two.

        ``spread``, the variance between the configurations that were picked among, adds ``weight`` degrees of freedom:
        seeds of the best are picked for being good, and differ less than they should.
        """
        several = [list(one) for one in figures if len(one) > 1]
        degrees = float(sum(len(one) - 1 for one in several))
        if not degrees:
            return None
        squares = math.fsum(statistics.variance(one) * (len(one) - 1) for one in several)
        if spread is not None:
            squares, degrees = squares + weight * spread, degrees + weight
        return cls(squares / degrees, degrees)


def share(hits: int, rows: int, level: float = LEVEL) -> Interval:
    """Of a share of rows: exact, also near 0 and 1 (Clopper and Pearson 1934)."""
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else _root(lambda p: beta_cdf(p, hits, rows - hits + 1) - tail, 0, 1)
    high = 1.0 if hits == rows else _root(lambda p: beta_cdf(p, hits + 1, rows - hits) - (1 - tail), 0, 1)
    return Interval(hits / rows, low, high, level)


def figure(seeds: Seeds, noise: SeedNoise | None = None, *, rows: int, unit: float = 0.0) -> Difference:
    """The mean over ``seeds``. The arguments are those of ``compare``."""
    return compare(seeds, [[0.0] * len(seeds[0])], noise, rows=rows, unit=unit, fixed=True)


def compare(
    mine: Seeds,
    its: Seeds,
    noise: SeedNoise | None = None,
    *,
    rows: int,
    greater_is_better: bool = True,
    fixed: bool = False,
    unit: float = 0.0,
) -> Difference:
    """How much better the configuration ``mine`` is than ``its``, on the same rows: means over the seeds of each.

    With two seeds of both and a ``noise``, the interval is about the configurations: the variances of rows, paired,
    and of seeds add up. Otherwise it is about these very adapters.

    Args:
        noise: of one seed, in this metric.
        rows: held-out rows that the figures are of.
        fixed: ``its`` is one answer that no training made.
        unit: how much one row can change the metric's sum over rows: 1 for shares, 0 if that is unknown.
    """
    sign = 1.0 if greater_is_better else -1.0
    above = [sign * (a - b) for a, b in zip(_mean(mine), _mean(its), strict=True)]
    counts = [len(mine)] if fixed else [len(mine), len(its)]
    of_seeds = None
    if noise is not None and min(counts) > 1:
        of_seeds = noise.variance * math.fsum(1 / count for count in counts), noise.degrees
    # One more row might have gone the other way: nothing is surer than that.
    least = max(abs(above[0]), unit) / max(rows, 1)
    of_rows = max(error(above), least) ** 2, max(len(above) - 2.0, 1.0)
    return of_errors(above[0], of_rows, of_seeds, rows=rows, seeds=min(counts) if of_seeds else 1)


def _mean(seeds: Seeds) -> list[float]:
    return [fmean(column) for column in zip(*seeds, strict=True)]


#: A variance, and the degrees of freedom that it was estimated with.
Variance = tuple[float, float]


def of_errors(
    value: float,
    of_rows: Variance,
    of_seeds: Variance | None = None,
    *,
    rows: int,
    seeds: int = 1,
    level: float = LEVEL,
) -> Difference:
    """A difference from the variance that the rows give it, and the one of the seeds."""
    variances = [of_rows, *([of_seeds] if of_seeds else [])]
    variance = math.fsum(one for one, _ in variances)
    # Welch 1947 and Satterthwaite 1946: degrees of freedom of a sum of variances.
    parts = math.fsum(one**2 / max(degrees, 1) for one, degrees in variances)
    degrees = variance**2 / parts if parts and math.isfinite(variance) else max(of_rows[1], 1.0)
    margin = t_quantile(1 - (1 - level) / 2, degrees) * math.sqrt(variance)
    needed: int | None = 0
    if abs(value) <= margin:
        left = (abs(value) * math.sqrt(variance) / margin) ** 2 - (variance - of_rows[0]) if margin else 0.0
        needed = math.ceil(rows * of_rows[0] / left) if left > 0 else None
    return Difference(value, value - margin, value + margin, level, rows, seeds, needed)


@lru_cache(maxsize=1024)
def t_quantile(probability: float, degrees: float) -> float:
    """Of Student's t."""
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)

    def below(t: float) -> float:
        return 1 - beta_cdf(degrees / (degrees + t * t), degrees / 2, 0.5) / 2 - probability

    high = 2.0
    while below(high) < 0:
        high *= 2
    return _root(below, 0, high)


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (Press et al. 2007, section 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - beta_cdf(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    ) / a  # fmt: skip
    tiny = 1e-300
    found, c, d = 1.0, 1.0, 0.0
    for step in range(1000):
        half = step // 2
        if step == 0:
            term = 1.0
        elif step % 2:
            term = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            term = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        found *= c * d
        if step and abs(c * d - 1) < 1e-14:
            break
    return front * (found - 1)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising or falling ``function`` is zero, by bisection."""
    falling = function(low) > 0
    for _ in range(80):
        middle = (low + high) / 2
        if (function(middle) > 0) != falling:
            high = middle
        else:
            low = middle
    return (low + high) / 2
