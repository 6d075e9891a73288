"""Map a function over many items in several processes: ordered results, with only a few items in flight.

This file knows processes and pipes, not the work. A worker is a fresh interpreter that runs only this package: no fork
of a process with threads (which tokenizers do not support), and no second run of the user's script (as with
``concurrent.futures`` if the script has no ``__main__`` guard). Data in the pipes are pickled.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from loraloom.errors import FailureError, LoraloomError, brief

A = TypeVar("A")
B = TypeVar("B")

#: Maximum number of items in flight per worker: one in work, one waiting.
AHEAD = 2
#: Default maximum number of workers: one process reads for all of them.
MOST = 16


def mapped(
    make: Callable[..., Callable[[A], B]], arguments: tuple[Any, ...], items: Iterable[A], workers: int = 1
) -> Iterator[B]:
    """``make(*arguments)(item)`` for each item, in order; with ``workers`` above 1, in that many processes.

    ``make`` is a module-level function, called once in each worker. Its exceptions are raised here. The workers end
    with this iterator: after its last item, an error or Ctrl-C.

    Raises:
        FailureError: a worker died, or raised an exception that is not loraloom's.
    """
    if workers <= 1:
        work = make(*arguments)
        for item in items:
            yield work(item)
        return
    opening = pickle.dumps((make, arguments), pickle.HIGHEST_PROTOCOL)
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    crew: list[_Worker] = []
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loraloom-rows")

    def ask(item: A) -> B:
        worker = idle.get()
        try:
            return worker.ask(item)  # type: ignore[no-any-return]
        finally:
            idle.put(worker)

    under_way: deque[Future[B]] = deque()
    futures = (pool.submit(ask, item) for item in items)
    try:
        for _ in range(workers):
            crew.append(_Worker(opening))
            idle.put(crew[-1])
        under_way.extend(itertools.islice(futures, AHEAD * workers))
        while under_way:
            result = under_way.popleft().result()
            under_way.extend(itertools.islice(futures, 1))
            yield result
    finally:
        for future in under_way:
            future.cancel()
        for worker in crew:
            worker.end()  # threads that wait for a worker see the end of its pipe
        pool.shutdown()


class _Worker:
    """One process, which handles one request at a time."""

    def __init__(self, opening: bytes) -> None:
        # The path of this process: the environment alone may not be enough to find the package.
        code = f"import sys; sys.path[:] = {sys.path!r}; from loraloom.data.table.workers import serve; serve()"
        quiet = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **quiet},
        )
        self._opening = opening

    def ask(self, item: Any) -> Any:
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None
        assert answers is not None
        try:
            questions.write(self._opening + pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
            questions.flush()
            self._opening = b""
            right, value = pickle.load(answers)
        except (OSError, EOFError, pickle.UnpicklingError):  # the worker's end of the pipe is closed
            raise FailureError(
                f"a process that tokenises died (exit status {self._process.wait()}); if memory ran out, lower "
                "data_workers"
            ) from None
        if not right:
            raise value
        return value

    def end(self) -> None:
        # It has nothing to save, and may be busy with a long text.
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.communicate()


def serve() -> None:
    """Main loop of a worker: create the function, and handle requests until the pipe closes."""
    # Ctrl-C reaches all processes of a terminal; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    questions: Any = sys.stdin.buffer
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries must not mix with the answers
    work: Callable[[Any], Any] | None = None
    while questions.peek(1):  # empty: the pipe is closed
        try:
            if work is None:
                make, arguments = pickle.load(questions)
                work = make(*arguments)
            answer: tuple[bool, Any] = (True, work(pickle.load(questions)))
        except LoraloomError as error:
            answer = (False, _picklable(error))
        except Exception as error:
            answer = (False, FailureError(f"a process that tokenises failed: {brief(error)}"))
        try:
            answers.write(pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
            answers.flush()
        except OSError:  # the parent is gone
            return


def _picklable(error: LoraloomError) -> LoraloomError:
    """The error itself, or one of loraloom's with the same message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        own = next(kind for kind in type(error).__mro__ if kind.__module__ == LoraloomError.__module__)
        return own(str(error))  # type: ignore[no-any-return]
    return error
