"""Asynchronous successive halving (Li et al. 2020): who of the trials that reached a rung goes on to the next.

Knows numbers of trials and how good they were; what a trial is, is others' business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Halving:
    """``rungs`` places on the way at which one of ``reduction`` trials goes on.

    While more trials can reach a rung, one in ``reduction`` of those seen goes on, rounded down, so that the first to
    come is not carried through for coming first; once no more can, rounded up, and at least ``least``. One that was not
    finite somewhere never goes on, and one that reached two rungs in one step goes on from the further one alone.
    """

    rungs: int
    reduction: int
    least: int = 1
    #: rung → trial → how good it was there, compared number by number, greater being better
    seen: list[dict[int, list[float]]] = field(default_factory=list)
    #: rung → trials that were sent on
    sent: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.seen = self.seen or [{} for _ in range(self.rungs)]
        self.sent = self.sent or [[] for _ in range(self.rungs)]

    def reach(self, trial: int, rung: int, *goodness: float) -> None:
        self.seen[rung][trial] = [good if math.isfinite(good) else -math.inf for good in goodness]

    def next(self, new: bool, heading: Iterable[int]) -> int | None:
        """A trial that is to go on, of those at the furthest rung; None if none is.

        Args:
            new: whether there are trials to come that have not begun.
            heading: the rung that each running trial will reach next, ``rungs`` for those past the last.
        """
        heading = list(heading)
        waiting: list[list[int]] = []
        more = new
        for rung in range(self.rungs):
            more = more or any(target <= rung for target in heading)
            ranked = sorted(sorted(self.seen[rung]), key=lambda trial: self.seen[rung][trial], reverse=True)
            share = len(ranked) / self.reduction
            quota = math.floor(share) if more else max(math.ceil(share), self.least)
            beyond = self.seen[rung + 1] if rung + 1 < self.rungs else {}
            waiting.append(
                [
                    trial
                    for trial in ranked[:quota]
                    if trial not in self.sent[rung] and trial not in beyond and -math.inf not in self.seen[rung][trial]
                ]
            )
            more = more or bool(waiting[-1])
        for rung in reversed(range(self.rungs)):
            if waiting[rung]:
                chosen = waiting[rung][0]
                self.sent[rung].append(chosen)
                return chosen
        return None
