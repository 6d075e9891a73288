"""Who continues at a rung: nobody is paused by noise, or by what early losses say wrongly.

1. The gate. Until the first trial has taken off, all continue: at the first rungs the trials that will learn often look
   worse than those that never move.
2. From then on the best ``1 / reduction`` continue from a rung, as many as there are finalists at least. If
   ``1 / reduction²`` of them have taken off, as is soon so where learning is smooth, those below that place continue
   only if they cannot be told apart from the finalists.
3. Trials are compared by paired differences on the same held-out rows, with a threshold that holds at every look. Those
   that cannot be told apart from the finalists are measured on more rows, up to all. If that does not decide, they
   continue while the budget lasts, the largest adapters first: a large one can be cut to a lower rank afterwards.
4. The best by the metric continues, and so does the one that would be best if the training losses fell on as they do
   now: a slow starter.
5. At the end the search looks back: if the winner was overtaken on its way, what was paused by the same figures gets
   another chance, while the budget lasts.

Numbers in, numbers out: trials are known by number, and nothing depends on which came first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loraloom.inference.jackknife import error
from loraloom.tuning.rungs import Decision, Rungs, Standing

#: Chance that a trial which is no worse than the cut is ever taken for worse.
ALPHA = 0.1
#: Those that cannot be told apart are measured on this many times as many rows.
MORE = 4


def behind(one: Sequence[float], other: Sequence[float]) -> float:
    """Standard errors by which ``one`` is less than ``other``, of figures on the same rows; 0 if that is not known."""
    gap = [theirs - mine for mine, theirs in zip(one, other, strict=True)]
    spread = error(gap)
    if not math.isfinite(spread):
        return 0.0
    return gap[0] / spread if spread else math.copysign(math.inf, gap[0]) if gap[0] else 0.0


def threshold(looks: float) -> float:
    """Standard errors that are enough at any of many looks; the last has ``looks`` times the rows of the first.

    The mixture boundary of Robbins (1970), which luck alone crosses at any look with a chance of ``ALPHA`` at most.
    """
    return math.sqrt((1 + 1 / looks) * math.log((1 + looks) / ALPHA**2))


@dataclass(frozen=True)
class LookBack:
    """At ``rung`` the ``winner`` was surely worse than the ``leader``; ``paused`` were no further behind the winner.

    ``resumed`` are those of them that the budget lets train to their end.
    """

    rung: int
    winner: int
    leader: int
    paused: list[int]
    resumed: list[int]


@dataclass
class Race(Rungs):
    """``shares`` of the steps at which the rungs lie; a search may cost ``budget``, over that of training all."""

    shares: list[float] = field(default_factory=list)
    budget: float = 1 / 3
    #: whether the search has looked back, and the fields of the ``LookBack`` if it found something
    looked: bool = False
    misled: dict[str, Any] | None = None

    def quota(self, count: int, off: int = 0) -> int:
        hard = max(math.ceil(count / self.reduction**2), min(self.least, count))
        return hard if off >= hard else super().quota(count)

    def ask(self, standings: Mapping[int, Standing], rows: int) -> dict[int, int]:
        """Trial → how many of ``rows`` held-out rows it is to be measured on; empty if that would decide nothing."""
        most = max(one.rows for one in standings.values())
        if most >= rows:
            return {}
        unsure = self._unsure(standings)
        quota = self.quota(len(standings), sum(one.off for one in standings.values()))
        return dict.fromkeys(unsure, min(rows, MORE * most)) if len(unsure) > quota else {}

    def decide(self, standings: Mapping[int, Standing], left: float = 0.0) -> Decision:
        """Of the trials at the open rung; those that do not continue are suspended.

        ``left`` is the budget that is left, in trainings of one trial.
        """
        last = _last_look(standings)
        order, cut, unsure = _order(last), self._cut(standings), self._unsure(standings)
        chosen = order[: order.index(cut) + 1]
        chosen += [number for number in order[len(chosen) : super().quota(len(standings))] if number in unsure]
        chosen += [number for number in dict.fromkeys((_best(last), self._fastest(last))) if number not in chosen]
        unsure = [number for number in unsure if number not in chosen and last[number].off]
        undecided = list[int]()
        for number in sorted(unsure, key=lambda one: (-last[one].parameters, one)):
            if self._ahead(len(chosen) + len(undecided) + 1) <= left:
                undecided.append(number)
        promoted = sorted([*chosen, *undecided])
        self.sent[self.open] = promoted
        return Decision(promoted, sorted(undecided))

    def look_back(
        self, past: Sequence[Mapping[int, Standing]], ends: Mapping[int, Standing], left: float
    ) -> LookBack | None:
        """Whether the figures that paused trials misled: the winner was surely worse than another, and now is better.

        Args:
            past: of each rung the trials that were measured there.
            ends: the trials that finished, at their end.
            left: the budget that is left, in trainings of one trial.
        """
        self.looked = True
        held = self.suspended(past[0] if past else ())
        if not ends:
            return None
        winner = _best(ends)
        for rung in sorted(set(held.values())):
            there = past[rung]
            led = [one for one in there if one in ends and _overtaken(there, ends, one, winner)]
            if not led:
                continue
            leader = min(led, key=lambda one: (there[one].loss[0], one))
            gap = there[winner].loss[0] - there[leader].loss[0]
            behind_winner = {n: there[n].loss[0] - there[winner].loss[0] for n, at in held.items() if at == rung}
            paused = sorted((n for n, one in behind_winner.items() if one <= gap), key=lambda n: (behind_winner[n], n))
            affordable = max(int(left / (1 - self.shares[rung]) + 1e-9), 0)
            self.resumed += paused[:affordable]
            found = LookBack(rung, winner, leader, paused, paused[:affordable])
            self.misled = asdict(found)
            return found
        return None

    def _cut(self, standings: Mapping[int, Standing]) -> int:
        """The last of those that continue in any case."""
        order = _order(_last_look(standings))
        return order[min(self.quota(len(standings), sum(one.off for one in standings.values())), len(order)) - 1]

    def _unsure(self, standings: Mapping[int, Standing]) -> list[int]:
        """All but those that are surely worse than the last that would be a finalist by now."""
        last = _last_look(standings)
        looks = max(one.rows for one in standings.values()) / max(min(one.rows for one in standings.values()), 1)
        finalist = last[_order(last)[min(self.least, len(last)) - 1]]
        return [number for number, one in last.items() if _worse(one, finalist) < threshold(looks)]

    def _fastest(self, standings: Mapping[int, Standing]) -> int:
        """The trial with the lowest loss at the end, if the training losses fell on as they do now."""
        left = 1 - self.shares[self.open]
        return min(standings, key=lambda one: (standings[one].loss[0] - left * standings[one].fall, one))

    def _ahead(self, count: int) -> float:
        """Trainings that ``count`` trials cost from the open rung on, if the least continue at each later one."""
        total, at = 0.0, self.shares[self.open]
        for share in [*self.shares[self.open + 1 :], 1.0]:
            total, at = total + count * (share - at), share
            count = self.quota(count)
        return total


def _last_look(standings: Mapping[int, Standing]) -> dict[int, Standing]:
    """Those measured on the most rows: the others were found to be worse on fewer."""
    most = max(one.rows for one in standings.values())
    return {number: one for number, one in standings.items() if one.rows == most}


def _order(standings: Mapping[int, Standing]) -> list[int]:
    """First those that have taken off; among these by the mean of their places by loss and by metric."""
    by_loss = _places({number: -one.loss[0] for number, one in standings.items()})
    by_metric = _places({number: one.good[0] for number, one in standings.items()})

    def key(number: int) -> tuple[bool, int, int, int]:
        return not standings[number].off, by_loss[number] + by_metric[number], by_loss[number], number

    return sorted(standings, key=key)


def _places(values: Mapping[int, float]) -> dict[int, int]:
    """Number → how many are better."""
    finite = {number: value if math.isfinite(value) else -math.inf for number, value in values.items()}
    return {number: sum(other > value for other in finite.values()) for number, value in finite.items()}


def _worse(one: Standing, other: Standing) -> float:
    """Standard errors by which ``one`` is worse, by the mean of loss and metric."""
    if one.off != other.off:
        return math.inf if other.off else -math.inf
    return (behind([-value for value in one.loss], [-value for value in other.loss]) + behind(one.good, other.good)) / 2


def _overtaken(there: Mapping[int, Standing], ends: Mapping[int, Standing], one: int, winner: int) -> bool:
    """Whether ``winner`` was surely worse than ``one`` at a rung, and is surely better at the end."""
    if winner not in there or there[one].rows != there[winner].rows:
        return False
    enough = threshold(1)
    return _worse(there[winner], there[one]) > enough and _worse(ends[one], ends[winner]) > enough


def _best(standings: Mapping[int, Standing]) -> int:
    """By the metric."""
    return min(standings, key=lambda one: (-standings[one].good[0], standings[one].loss[0], one))
