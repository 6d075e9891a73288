"""Successive halving with a gate, the rule of searches that began under format 1 of their state.

At the first rungs the trials that will learn often look worse than those that never move: a good rate disturbs a new
head first. So no trial is suspended before the first one has taken off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from loraloom.tuning.rungs import Rungs

#: A trial has taken off when its last training losses lie below the best constant answer's by this many standard
#: errors, and by this share of it. The last losses are those of a ninth of the steps, and of ``WINDOW`` steps at least.
ERRORS, SHARE = 4.0, 0.02
WINDOW, PART = 8, 9


def taken_off(losses: list[float], base: float, steps: int) -> bool:
    """Whether a trial of ``steps`` steps in all has left the loss ``base`` of the best constant answer behind."""
    count = max(WINDOW, steps // PART)
    last = losses[-count:]
    if len(last) < count or not all(map(math.isfinite, last)):
        return False
    gain = base - fmean(last)
    return gain > ERRORS * stdev(last) / math.sqrt(count) and gain > SHARE * abs(base)


@dataclass(frozen=True)
class Standing:
    """A trial at a rung: has it taken off, its held-out loss, and its metric, greater being better."""

    off: bool
    loss: float
    good: float


@dataclass
class SuccessiveHalving(Rungs):
    """The best ``1 / reduction`` by the held-out loss continue, and the best by metric."""

    def decide(self, standings: Mapping[int, Standing]) -> list[int]:
        """The trials at the open rung that continue; the others are suspended."""

        def order(trial: int) -> tuple[bool, float, int]:
            mine = standings[trial]
            return not mine.off, mine.loss if math.isfinite(mine.loss) else math.inf, trial

        chosen = sorted(standings, key=order)[: self.quota(len(standings))]
        finite = [trial for trial in standings if math.isfinite(standings[trial].good)]
        if finite:
            chosen.append(min(finite, key=lambda trial: (-standings[trial].good, *order(trial))))
        self.sent[self.open] = sorted(set(chosen))
        return sorted(set(chosen))
