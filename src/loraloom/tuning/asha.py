"""Successive halving with a gate: which trials continue from a rung, and which are suspended.

At the first rungs the trials that will learn often look worse than those that never move: a good rate disturbs a new
head first. So no trial is suspended before the first one has taken off. A rung is decided once all that can reach it
stand there, so that no decision depends on which came first. Knows trials by number only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev

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
class SuccessiveHalving:
    """``rungs`` places from which the best ``1 / reduction`` continue, at least ``least``, and the best by metric."""

    rungs: int
    reduction: int
    least: int = 1
    #: rung → trials that continue from it; None before it is decided
    sent: list[list[int] | None] = field(default_factory=list)
    #: suspended trials that train to their end after all, because none of the others learned
    resumed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sent = self.sent or [None] * self.rungs

    @property
    def open(self) -> int:
        """The first rung that is not decided; ``rungs`` where none is."""
        return next((rung for rung, sent in enumerate(self.sent) if sent is None), self.rungs)

    def members(self, rung: int, trials: Iterable[int]) -> list[int]:
        """Those that come to ``rung``, of all ``trials``."""
        sent = self.sent[rung - 1] if rung else None
        return sorted(trials) if rung == 0 else sorted(sent or [])

    def quota(self, count: int) -> int:
        return max(math.ceil(count / self.reduction), min(self.least, count))

    def pass_all(self, trials: Iterable[int]) -> None:
        """Let all trials pass the open rung."""
        self.sent[self.open] = sorted(trials)

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

    def suspended(self, trials: Iterable[int]) -> dict[int, int]:
        """Trial → the rung at which it is suspended."""
        found: dict[int, int] = {}
        for rung in range(self.open):
            on = self.sent[rung]
            found |= {t: rung for t in self.members(rung, trials) if t not in (on or []) and t not in self.resumed}
        return found

    def resume(self, trials: Iterable[int]) -> list[int]:
        """Those suspended at the furthest rung train to their end; empty if none is suspended."""
        held = self.suspended(trials)
        furthest = max(held.values(), default=0)
        chosen = sorted(trial for trial, rung in held.items() if rung == furthest)
        self.resumed += chosen
        return chosen
