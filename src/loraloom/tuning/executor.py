"""Where the trials of a search train, in this process or elsewhere, and the status that callbacks get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loraloom.engine.slot_state import SlotState
from loraloom.tuning.bar import Bar, set_bar
from loraloom.tuning.concurrency import Slots, plan_slots, seconds_of_step
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import Report, Worker

#: Called after each step with the trials under way and the tokens of a second.
OnTrials = Callable[[list[Trial], float], None]
#: Trials that enter a worker, with the states of their slots; None for a trial that begins, or is there already.
Enter = Sequence[tuple[Trial, SlotState | None]]


@dataclass(frozen=True)
class SearchStatus:
    """Where a search stands after a step. ``slots`` are all there are, ``running`` the trials in them."""

    running: Sequence[Trial]
    trials: Sequence[Trial]
    #: the metric by which trials are compared
    metric: str
    slots: int
    tokens_per_second: float
    seconds_left: float | None
    format: int = 1


class Executor(Protocol):
    """Workers by number, here or elsewhere. One trains from ``start`` until its report came."""

    count: int

    def plan(self, most: int) -> Slots:
        """How many trials each worker trains together, ``most`` at most."""

    def seconds_of_step(self) -> float:
        """Seconds that one trial alone takes for a step."""

    def set_bar(self, known: Bar | None) -> Bar:
        """Give all workers the bar that trials have to beat, measured unless it is ``known``."""

    def start(self, worker: int, enter: Enter, leave: Sequence[int]) -> None: ...

    def wait(self) -> tuple[int, Report | None]:
        """The next worker to report. None as the report: the worker died and was replaced."""

    def close(self) -> None: ...


def plan(worker: Worker, most: int, neighbours: int = 1) -> Slots:
    """Slots for ``worker``, one of ``neighbours`` on its machine; its share of the memory that the user gave."""
    factory, options = worker.factory, worker.options
    largest = max(factory.largest(), key=lambda one: factory.plan(one).parameters)
    memory = options.memory and options.memory // options.workers
    return plan_slots(worker.pack, factory.widest(), largest, most, memory, options.slots, neighbours)


def measure_step(worker: Worker) -> float:
    """Seconds of a step of the largest adapter of the search."""
    largest = max(worker.factory.largest(), key=lambda one: worker.factory.plan(one).parameters)
    return seconds_of_step(worker.pack, worker.factory.widest(), largest)


def measure_bar(worker: Worker) -> Bar:
    """What trials have to beat."""
    return set_bar(worker.setup)


class LocalExecutor:
    """One worker, in this process."""

    count = 1

    def __init__(self, worker: Worker, on_trials: OnTrials, stop: Callable[[], bool]) -> None:
        self._worker, self._on_trials, self._stop = worker, on_trials, stop
        self._next: tuple[Enter, Sequence[int]] = ((), ())

    def plan(self, most: int) -> Slots:
        return plan(self._worker, most)

    def seconds_of_step(self) -> float:
        return measure_step(self._worker)

    def set_bar(self, known: Bar | None) -> Bar:
        self._worker.bar = known or measure_bar(self._worker)
        return self._worker.bar

    def start(self, worker: int, enter: Enter, leave: Sequence[int]) -> None:
        self._next = enter, leave

    def wait(self) -> tuple[int, Report | None]:
        return 0, self._worker.run(*self._next, self._on_trials, self._stop)

    def close(self) -> None:
        pass
