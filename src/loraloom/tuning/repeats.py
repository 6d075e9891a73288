"""Further seeds, which show the noise: of which configurations, and when they start.

They start when the last rung is decided, beside the trials that train to their end, so that slots do not stay empty.
Which they are depends on figures at that rung alone, never on which trial ended first. When all have ended, those that
turn out to be no finalists lose their repeats, and finalists without repeats get them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraloom.messages import Message, OnEvent
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.selection import finalists
from loraloom.tuning.state import State
from loraloom.tuning.trial import Trial


@dataclass
class Repeats:
    """The repeats of the search in ``state``. ``add(values, seed, number)`` adds a trial that repeats ``number``."""

    options: TuneConfig
    state: State
    add: Callable[[Mapping[str, Any], int, int], Trial]
    on_event: OnEvent

    def begin(self, competing: Sequence[Trial]) -> bool:
        """Once the last rung is decided: repeat the trials that train to their end, if they are no more than finalists.

        Of more, those that lead at their last measurement are repeated.
        """
        known = competing if len(competing) <= self.options.finalists else [t for t in competing if t.measured]
        leaders = self._best(known)
        self.state.leaders = [trial.number for trial in leaders]
        self._add(leaders, lambda **figures: Message("leaders", **figures))
        return True

    def settle(self, learned: Sequence[Trial]) -> bool:
        """Once all have ended: repeat the best of those that ``learned``. True if that changed anything."""
        best = self._best(learned)
        numbers = {trial.number for trial in best}
        dropped = [n for n in self.state.leaders or [] if n not in numbers]
        for trial in self.state.trials:
            if trial.repeats in dropped:
                trial.drop(f"trial {trial.repeats} is no finalist")
        self.state.leaders = []
        if dropped and self.options.seeds:
            self.on_event(Message("repeats_dropped", trials=dropped))
        return self._add(best, lambda **figures: Message("finalists", **figures)) or bool(dropped)

    def _best(self, trials: Sequence[Trial]) -> list[Trial]:
        return finalists(trials, self.options.metric, self.options.finalists)

    def _add(self, chosen: Sequence[Trial], message: Callable[..., Message]) -> bool:
        """Add the repeats that are missing, and say so in the ``message`` of their figures."""
        there = {(trial.repeats, trial.options.seed) for trial in self.state.trials if not trial.dropped}
        seeds = [self.options.train.seed + further for further in range(1, self.options.seeds + 1)]
        missing = [(trial, seed) for seed in seeds for trial in chosen if (trial.number, seed) not in there]
        for trial, seed in missing:
            self.add(trial.values, seed, trial.number)
        if missing:
            numbers = list(dict.fromkeys(trial.number for trial, _ in missing))
            self.on_event(message(trials=numbers, seeds=self.options.seeds))
        return bool(missing)
