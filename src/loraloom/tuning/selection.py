"""Which configuration wins: the best by the metric, or a smaller or faster one that is as good; and the Pareto front.

By default the one-standard-error rule (Breiman et al. 1984, *Classification and Regression Trees*, 3.4.3) decides ties:
among configurations whose difference from the best is smaller than the standard error of that difference between seeds,
the one with the fewest parameters wins. A user may prefer otherwise (``Balance``).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loraloom.inference.intervals import Difference, SeedNoise, Seeds
from loraloom.messages import Message
from loraloom.tuning.bar import Bar, learned
from loraloom.tuning.head_baseline import HEAD
from loraloom.tuning.judge import Judge, outcomes, seed_noise
from loraloom.tuning.ranking import Score, goodness, originals, ranking, scores
from loraloom.tuning.trial import Trial


@dataclass(frozen=True)
class Balance:
    """What a user wants beside quality.

    ``prefer``: "quality" takes the best figure; "balanced" the smallest adapter of those tied with it; "small" the
    smallest, and "fast" the one with the least training, of those that the held-out rows cannot tell from the best.
    With ``within`` all that are at most that far from the best count as equal to it. ``max_size``: of the adapter, in
    bytes.
    """

    prefer: str = "balanced"
    within: float | None = None
    max_size: int | None = None


@dataclass(frozen=True)
class Selection:
    """What a search comes to, as numbers of configurations. ``pool`` are those that ``winner`` was chosen from."""

    scores: dict[int, Score]
    ranked: list[int]
    pool: list[int]
    winner: int
    why: Message
    notes: list[Message]
    #: of ``pool``, those that learned something; if none did, none is recommended
    able: list[int]
    #: False if a new head on the frozen model was measured and ``winner`` is not clearly better
    above_head: bool = True
    #: first trial → what each of its finished seeds reached on the rows that chose
    seeds: dict[int, Seeds] = field(default_factory=dict)
    #: of one seed, among those that learned something
    noise: SeedNoise | None = None
    #: with this noise
    judge: Judge | None = None

    @property
    def runner_up(self) -> int | None:
        return next((n for n in self.pool if n != self.winner), None)


def select(
    trials: Sequence[Trial],
    metric: str,
    bar: Bar | None,
    lost: Collection[int] = (),
    judge: Judge | None = None,
    balance: Balance | None = None,
) -> Selection | None:
    """Choose a configuration; None where none was measured. The arguments are those of ``verdict``."""
    balance, known, groups = balance or Balance(), scores(trials, metric), originals(trials)
    ranked = ranking(trials, metric, known)
    pool, notes = candidates(ranked, known)
    if not pool:
        return None
    pool = [n for n in pool if n not in lost] or pool
    able = pool
    if bar is not None:
        able = [n for n in pool if learned(bar, finished(groups[n]), metric, len(groups))]
    pool = able or pool
    seeds = {n: figures_of(groups[n], metric) for n in pool}
    noise = seed_noise((known[n] for n in able), outcomes(trials, metric, bar))
    judge = None if judge is None else replace(judge, noise=noise)
    above = [n for n in able if _above_head(n, bar, seeds, judge)]
    pool, more = _small_enough(above or pool, {n: groups[n][0].bytes for n in groups}, balance.max_size)
    winner, why = choose(pool, known, {n: group[0] for n, group in groups.items()}, metric, balance, judge, seeds)
    return Selection(known, ranked, pool, winner, why, notes + more, able, bool(above), seeds, noise, judge)


def figures_of(group: Sequence[Trial], metric: str) -> Seeds:
    """What each finished seed of a configuration reached, over all rows and all but each part of them."""
    return [trial.parts[metric] for trial in finished(group) if trial.parts.get(metric)]


def _above_head(number: int, bar: Bar | None, seeds: Mapping[int, Seeds], judge: Judge | None) -> bool:
    """False if the rows cannot tell it from a new head on the frozen model, or it is worse."""
    head = bar.head.get(judge.metric) if bar is not None and judge is not None else None
    if judge is None or not head or not seeds[number]:
        return True
    return all(one.better.low > 0 for one in judge.against(seeds[number], {}, [(HEAD, head)]))


def _small_enough(pool: Sequence[int], sizes: Mapping[int, int], most: int | None) -> tuple[list[int], list[Message]]:
    """Those of ``pool`` whose adapter is small enough, or the smallest with a note."""
    fit = [n for n in pool if most is None or sizes[n] <= most]
    if fit or most is None:
        return fit, []
    smallest = min(pool, key=lambda n: sizes[n])
    return [smallest], [Message("none_fits", max_size=most, trial=smallest, bytes=sizes[smallest])]


def finalists(trials: Iterable[Trial], metric: str, count: int) -> list[Trial]:
    """The best ``count`` of ``trials`` by their last figure, to be trained again with other seeds."""

    def order(trial: Trial) -> tuple[float, int, int]:
        value = trial.latest(metric)
        good = math.nan if value is None else goodness(metric, value)
        return -good if math.isfinite(good) else math.inf, trial.parameters, trial.number

    return sorted(trials, key=order)[:count]


def finished(group: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in group if trial.state == "finished"]


def candidates(ranked: Sequence[int], known: Mapping[int, Score]) -> tuple[list[int], list[Message]]:
    """Those of ``ranked`` that may win, and what to keep in mind about how they were measured."""
    tier = min((known[n].tier for n in ranked), default=3)
    pool = [n for n in ranked if known[n].tier == tier < 3]
    notes = []
    if pool and tier == 2:
        furthest = max(known[n].share for n in pool)
        pool = [n for n in pool if known[n].share >= furthest - 1e-9]
        notes.append(Message("none_finished", compared=len(pool), share=furthest))
    repeated = [n for n in pool if len(known[n].values) > 1]
    if len(repeated) > 1:
        pool = repeated
    if pool and all(score.noise is None for score in known.values()):
        notes.append(Message("one_seed"))
    return pool, notes


def choose(
    pool: Sequence[int],
    known: Mapping[int, Score],
    firsts: Mapping[int, Trial],
    metric: str,
    balance: Balance = Balance(),
    judge: Judge | None = None,
    seeds: Mapping[int, Seeds] | None = None,
) -> tuple[int, Message]:
    """The winner of ``pool``, whose first is the best by the metric, and what decided."""
    top = pool[0]
    if len(pool) == 1:
        return top, Message("only_one")

    def as_good(number: int) -> bool:
        if balance.within is not None:
            return abs(known[top].mean - known[number].mean) <= balance.within * (1 + 1e-9)
        if balance.prefer == "balanced" or judge is None or seeds is None:
            return balance.prefer != "quality" and tied(known[top], known[number])
        return balance.prefer != "quality" and not clearly_better(judge, seeds[top], seeds[number])

    def price(number: int) -> tuple[float, ...]:
        training = (rows_trained(firsts[number]),) if balance.prefer == "fast" else ()
        return (*training, firsts[number].parameters, -goodness(metric, known[number].mean), number)

    # No tie is won by one trained once if the top was trained several times, or by one whose noise is all its own.
    least = min(2, len(known[top].values))
    ties = [n for n in pool if n == top or (as_good(n) and len(known[n].values) >= least and not known[n].unstable)]
    winner = min(ties, key=price)
    if winner == top:
        return winner, Message("best", metric=metric, tied=len(ties))
    figures = {"top": top, "winner": winner, "gap": abs(known[top].mean - known[winner].mean), "metric": metric}
    figures |= {"parameters": firsts[winner].parameters, "top_parameters": firsts[top].parameters}
    if balance.prefer == "balanced" and balance.within is None:
        return winner, Message("tie", **figures, noise=difference(known[top], known[winner]))
    rows = {"rows": rows_trained(firsts[winner]), "top_rows": rows_trained(firsts[top])}
    return winner, Message("preferred", **figures, **rows, prefer=balance.prefer, within=balance.within)


def clearly_better(judge: Judge, mine: Seeds, its: Seeds) -> bool:
    """Whether the rows (and seeds) show that ``mine`` is better; what has no figures is not as good as the best."""
    found: Difference | None = judge.better(mine, its) if mine and its and len(mine[0]) == len(its[0]) else None
    return found is None or found.low > 0


def rows_trained(trial: Trial) -> int:
    """Rows that its whole training reads: the part of its time that does not depend on the machine."""
    options = trial.options
    return trial.steps * options.batch_size * options.gradient_accumulation_steps


def difference(one: Score, other: Score) -> float:
    """The standard error of the difference of two means; 0 if the noise is not known."""
    return math.hypot(one.noise or 0.0, other.noise or 0.0)


def tied(one: Score, other: Score) -> bool:
    return abs(one.mean - other.mean) <= difference(one, other)


def pareto(points: Mapping[int, tuple[float, float]]) -> list[int]:
    """Of number → (parameters, goodness), those that no other beats in one without losing in the other."""
    return front({n: (size, -good) for n, (size, good) in points.items()})


def front(points: Mapping[int, tuple[float, ...]]) -> list[int]:
    """Those of number → figures, of which less is better, that no other beats in one without losing in another.

    In the order of the first figure.
    """

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(all(map(operator.le, one, mine)) and one != mine for one in points.values())

    return sorted((n for n, mine in points.items() if not beaten(mine)), key=lambda n: (points[n][0], n))
