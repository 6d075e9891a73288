"""Rungs: steps at which trials are compared, and who was promoted from each. Knows trials by number alone.

A rung is decided once all that can reach it stand there, so that no decision depends on which came first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Standing:
    """A trial at a rung.

    ``loss`` and ``good`` (the metric, greater being better) are over the ``rows`` held-out rows that it was measured
    on, then without each part of them; trials measured on as many were measured on the same. ``parameters`` are the
    trained numbers. ``fall``: how far the training loss would fall in a whole training at its present slope.
    """

    off: bool
    loss: list[float]
    good: list[float]
    rows: int = 0
    parameters: int = 0
    fall: float = 0.0


@dataclass(frozen=True)
class Decision:
    """Trials that continue from a rung; ``undecided`` are those of them that are not among the best."""

    promoted: list[int]
    undecided: list[int] = field(default_factory=list)


@dataclass
class Rungs:
    """``rungs`` places from which the best ``1 / reduction`` continue, at least ``least``."""

    rungs: int
    reduction: int
    least: int = 1
    #: rung → trials that continue from it; None before it is decided
    sent: list[list[int] | None] = field(default_factory=list)
    #: suspended trials that train to their end after all
    resumed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sent = self.sent or [None] * self.rungs

    @property
    def open(self) -> int:
        """The first rung that is not decided; ``rungs`` if all are."""
        return next((rung for rung, sent in enumerate(self.sent) if sent is None), self.rungs)

    def members(self, rung: int, trials: Iterable[int]) -> list[int]:
        """Those that come to ``rung``, of all ``trials``."""
        sent = self.sent[rung - 1] if rung else None
        return sorted(trials) if rung == 0 else sorted(sent or [])

    def quota(self, count: int, off: int = 0) -> int:
        """The least number of trials that continue, of ``count`` at a rung of which ``off`` have taken off."""
        return max(math.ceil(count / self.reduction), min(self.least, count))

    def pass_all(self, trials: Iterable[int]) -> None:
        """Let all trials pass the open rung."""
        self.sent[self.open] = sorted(trials)

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
