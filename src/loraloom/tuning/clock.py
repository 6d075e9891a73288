"""The time that a search may take. When it runs out, trials that can still finish do so, and all others stop.

What the clock decides is an event of the state, so that a resumed search does the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraloom.errors import ConfigError
from loraloom.files.durations import short
from loraloom.tuning.ranking import goodness
from loraloom.tuning.state import State
from loraloom.tuning.trial import Trial

#: The time that trials need is estimated, so it runs out this much earlier; once it has, they may be this much late.
MARGIN, LATE = 1.1, 1.25
#: A look at the clock at least this often, in seconds.
LOOK = 30.0
#: A held-out row costs this share of a row trained on.
FORWARD = 0.4


def check_time(limit: float, steps: int, step: float, rows: float) -> None:
    """
    Args:
        step: seconds of a step.
        rows: held-out rows, in batches.

    Raises:
        ConfigError: one trial takes longer than ``limit`` seconds.
    """
    needed = (steps + FORWARD * rows) * step
    if needed * MARGIN > limit:
        least = short(needed * 1.25 + 1)
        raise ConfigError(
            f"max_time: one trial of {steps} steps takes about {short(needed)}, found {short(limit)}; give at least "
            f"{least}, or lower max_steps or epochs"
        )


@dataclass
class Clock:
    """``limit`` seconds for the search, or for its last extension; ``step``: seconds of a step of one trial alone."""

    limit: float
    step: float
    state: State
    finalists: int
    metric: str
    now: Callable[[], float] = time.monotonic
    _began: float = field(init=False)
    _first: int = field(init=False)
    _next: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        begun = self.state.begun
        before = 0.0 if begun is None else float(begun["seconds"])
        self._began, self._first = self.now() - (self.state.seconds - before), self.state.first

    @property
    def elapsed(self) -> float:
        if self._first != self.state.first:  # an extension began
            self._began, self._first, self._next = self.now(), self.state.first, 0.0
        return self.now() - self._began

    @property
    def left(self) -> float:
        return max(self.limit - self.elapsed, 0.0)

    def due(self) -> bool:
        """Whether to look at the trials."""
        return self.elapsed >= self._next

    def look(self, live: Sequence[Trial]) -> dict[str, Any] | None:
        """The event that ends the search for all but some of ``live``, the trials that train; None: not yet."""
        order = sorted(live, key=self._order)
        if self.state.over:
            chosen = list(order)
            while len(chosen) > self._at_least and self._need(chosen) > LATE * self.left + 1:
                chosen.pop()
            wait = LOOK if len(chosen) == len(order) else 0.0
        else:
            wait = self.left - MARGIN * self._need(order[: self.finalists])
            chosen = []
            for trial in order:
                if len(chosen) < self._at_least or self._need([*chosen, trial]) <= self.left:
                    chosen.append(trial)
        if wait > 0:
            self._next = self.elapsed + min(wait, LOOK)
            return None
        steps = sum(trial.step for trial in self.state.trials)
        finish = sorted(trial.number for trial in chosen)
        return {"kind": "clock", "first": self.state.first, "seconds": self.elapsed, "steps": steps, "finish": finish}

    @property
    def _at_least(self) -> int:
        """There is no verdict without a trial that finished."""
        return 0 if any(trial.state == "finished" for trial in self.state.trials) else 1

    def _need(self, trials: Sequence[Trial]) -> float:
        """Seconds until all of them have finished."""
        steps, done = [trial.steps - trial.step for trial in trials], sum(trial.step for trial in self.state.trials)
        each = self.state.seconds / done if done and self.state.seconds else self.step
        return max(sum(steps) * each, max(steps, default=0) * self.step)

    def _order(self, trial: Trial) -> tuple[float, float, int]:
        """The furthest first, among these the best."""
        value = trial.latest(self.metric)
        good = goodness(self.metric, math.nan if value is None else value)
        return -trial.step / trial.steps, -good if math.isfinite(good) else math.inf, trial.number
