"""Which configuration wins: the best by the metric, or the cheapest of those tied with it; and the Pareto front.

The one-standard-error rule (Breiman et al. 1984, *Classification and Regression Trees*, 3.4.3) decides ties: among
configurations whose difference from the best is smaller than the standard error of that difference, the one with the
fewest parameters wins.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from loraloom.messages import Message
from loraloom.tuning.bar import Bar, learned
from loraloom.tuning.ranking import Score, goodness, originals, ranking, scores
from loraloom.tuning.trial import Trial


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

    @property
    def runner_up(self) -> int | None:
        return next((n for n in self.pool if n != self.winner), None)


def select(trials: Sequence[Trial], metric: str, bar: Bar | None, lost: Collection[int] = ()) -> Selection | None:
    """Choose a configuration; None where none was measured. The arguments are those of ``verdict``."""
    known = scores(trials, metric)
    ranked = ranking(trials, metric, known)
    pool, notes = candidates(ranked, known)
    if not pool:
        return None
    groups = originals(trials)
    pool = [n for n in pool if n not in lost] or pool
    able = pool
    if bar is not None:
        able = [n for n in pool if learned(bar, finished(groups[n]), metric, len(groups))]
    pool = able or pool
    winner, why = choose(pool, known, {n: group[0].parameters for n, group in groups.items()}, metric)
    return Selection(known, ranked, pool, winner, why, notes, able)


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
    pool: Sequence[int], known: Mapping[int, Score], parameters: Mapping[int, int], metric: str
) -> tuple[int, Message]:
    """The winner of ``pool``, whose first is the best by the metric, and what decided."""
    top = pool[0]
    if len(pool) == 1:
        return top, Message("only_one")
    ties = [n for n in pool if tied(known[top], known[n])]
    # No tie is won by one trained once if the top was trained several times, or by one whose noise is all its own.
    seeds = min(2, len(known[top].values))
    ties = [n for n in ties if n == top or (len(known[n].values) >= seeds and not known[n].unstable)]
    winner = min(ties, key=lambda n: (parameters[n], -goodness(metric, known[n].mean), n))
    if winner == top:
        return winner, Message("best", metric=metric, tied=len(ties))
    gap, noise = abs(known[top].mean - known[winner].mean), difference(known[top], known[winner])
    figures = {"top": top, "winner": winner, "gap": gap, "noise": noise, "metric": metric}
    return winner, Message("tie", **figures, parameters=parameters[winner], top_parameters=parameters[top])


def difference(one: Score, other: Score) -> float:
    """The standard error of the difference of two means; 0 if the noise is not known."""
    return math.hypot(one.noise or 0.0, other.noise or 0.0)


def tied(one: Score, other: Score) -> bool:
    return abs(one.mean - other.mean) <= difference(one, other)


def pareto(points: Mapping[int, tuple[float, float]]) -> list[int]:
    """Of number → (parameters, goodness), those that no other beats in one without losing in the other."""
    front = [
        n
        for n, (size, good) in points.items()
        if not any(s <= size and g >= good and (s < size or g > good) for s, g in points.values())
    ]
    return sorted(front, key=lambda n: (points[n][0], n))
