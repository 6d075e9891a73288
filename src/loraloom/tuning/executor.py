"""Where the trials of a search train, in this process or elsewhere, and the status that callbacks get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loraloom.tuning.bar import Bar, set_bar
from loraloom.tuning.concurrency import Slots, plan_slots
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import Report, TensorState, Worker


@dataclass(frozen=True)
class SearchStatus:
    """Where a search stands after a step. ``slots`` are all there are, ``running`` the trials in them."""

    running: Sequence[Trial]
    trials: Sequence[Trial]
    #: the one that trials are compared by
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

    def set_bar(self, known: Bar | None) -> Bar:
        """Give all workers the bar that trials have to beat, measured unless it is ``known``."""

    def start(self, worker: int, enter: Sequence[tuple[Trial, TensorState]], leave: Sequence[int]) -> None: ...

    def wait(self) -> tuple[int, Report | None]:
        """The next worker to report. None as the report: the worker died and was replaced."""

    def close(self) -> None: ...


class LocalExecutor:
    """One worker, in this process."""

    count = 1

    def __init__(self, worker: Worker, tell: Callable[[list[Trial], float], None], stop: Callable[[], bool]) -> None:
        self._worker, self._tell, self._stop = worker, tell, stop
        self._next: tuple[Sequence[tuple[Trial, TensorState]], Sequence[int]] = ((), ())

    def plan(self, most: int) -> Slots:
        factory, options = self._worker.factory, self._worker.options
        largest = max(factory.largest(), key=lambda one: factory.plan(one).parameters)
        return plan_slots(
            self._worker.pack, self._worker.factory.widest(), largest, most, options.memory, options.slots
        )

    def set_bar(self, known: Bar | None) -> Bar:
        self._worker.bar = known or set_bar(self._worker.setup, self._worker.model)
        return self._worker.bar

    def start(self, worker: int, enter: Sequence[tuple[Trial, TensorState]], leave: Sequence[int]) -> None:
        self._next = enter, leave

    def wait(self) -> tuple[int, Report | None]:
        return 0, self._worker.run(*self._next, self._tell, self._stop)

    def close(self) -> None:
        pass
