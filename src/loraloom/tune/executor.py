"""Who trains for a search, and who is told how it goes: what the search asks of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from loraloom.tune.bar import Bar, set_bar
from loraloom.tune.concurrency import Slots, plan_slots
from loraloom.tune.trial import Trial
from loraloom.tune.worker import Report, TensorState, Worker


class Watcher(Protocol):
    """Who is told how it goes."""

    #: what trials are compared by, which may turn out once the rows are read
    metric: str

    def event(self, text: str) -> None: ...

    def update(
        self,
        running: Sequence[Trial],
        trials: Sequence[Trial],
        slots: int,
        tokens_per_second: float,
        seconds_left: float | None,
    ) -> None: ...


class Silent:
    metric = ""

    def event(self, text: str) -> None:
        pass

    def update(self, *args: Any) -> None:
        pass


class Executor(Protocol):
    """Workers by number, here or elsewhere. One trains from ``start`` until its report came."""

    count: int

    def plan(self, most: int) -> Slots:
        """How many trials each worker trains together, of ``most`` that there are for it."""

    def set_bar(self, known: Bar | None) -> Bar:
        """What trials have to beat, measured unless it is ``known``; all workers have it then."""

    def start(self, worker: int, enter: Sequence[tuple[Trial, TensorState]], leave: Sequence[int]) -> None: ...

    def wait(self) -> tuple[int, Report | None]:
        """The next worker to report. None in place of the report: it is gone, and a fresh one stands in its place."""

    def close(self) -> None: ...


class LocalExecutor:
    """The crew of a search in one process."""

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
