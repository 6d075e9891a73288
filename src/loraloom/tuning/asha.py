"""Successive halving with a gate, the rule of searches that began under format 1 of their state.

At the first rungs the trials that will learn often look worse than those that never move: a good rate disturbs a new
head first. So no trial is suspended before the first one has taken off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from loraloom.tuning.rungs import Decision, Rungs, Standing

#: A trial has taken off when its last training losses lie below the best constant answer's by this many standard
#: errors, and by this share of it. The last losses are those of a ninth of the steps, and of ``WINDOW`` steps at least.
ERRORS, SHARE = 4.0, 0.02
WINDOW, PART = 8, 9


def window(steps: int) -> int:
    """How many of its last losses say where a trial of ``steps`` steps is."""
    return max(WINDOW, steps // PART)


def taken_off(losses: list[float], base: float, steps: int) -> bool:
    """Whether a trial of ``steps`` steps in all has left the loss ``base`` of the best constant answer behind."""
    count = window(steps)
    last = losses[-count:]
    if len(last) < count or not all(map(math.isfinite, last)):
        return False
    gain = base - fmean(last)
    return gain > ERRORS * stdev(last) / math.sqrt(count) and gain > SHARE * abs(base)


@dataclass
class SuccessiveHalving(Rungs):
    """The best ``1 / reduction`` by the held-out loss continue, and the best by metric."""

    def decide(self, standings: Mapping[int, Standing], left: float = 0.0) -> Decision:
        """Of the trials at the open rung; those that do not continue are suspended."""

        def order(trial: int) -> tuple[bool, float, int]:
            mine = standings[trial]
            return not mine.off, mine.loss[0] if math.isfinite(mine.loss[0]) else math.inf, trial

        chosen = sorted(standings, key=order)[: self.quota(len(standings))]
        finite = [trial for trial in standings if math.isfinite(standings[trial].good[0])]
        if finite:
            chosen.append(min(finite, key=lambda trial: (-standings[trial].good[0], *order(trial))))
        self.sent[self.open] = sorted(set(chosen))
        return Decision(sorted(set(chosen)))
