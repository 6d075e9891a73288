"""Ctrl-C and SIGTERM as a wish that a loop can ask for between its steps. Knows nothing of what the loop does."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop(threading.Event):
    """Set once the user, or the system, wants an end; ``by`` is then the signal's name."""

    by = ""


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """The first Ctrl-C and SIGTERM (what schedulers and ``kill`` send) ask for an end; a Ctrl-C after it ends at once.

    SIGTERM that comes again changes nothing: some send it more than once. Where it is ignored, it stays ignored.
    Outside the main thread, where Python has no signals, nothing is ever asked for.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        again = stop.is_set()
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if again:
            return
        stop.by = signal.Signals(number).name
        stop.set()
        why = "" if number == signal.SIGINT else f", as {stop.by} asks"
        # A handler runs between any two instructions, also within another print.
        with contextlib.suppress(RuntimeError, OSError):
            print(f"\nstopping after this step{why}; press Ctrl-C again to end at once", file=sys.stderr)

    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGTERM] in (signal.SIG_IGN, None):
        del before[signal.SIGTERM]
    if before[signal.SIGINT] is None:
        before[signal.SIGINT] = signal.default_int_handler
    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
