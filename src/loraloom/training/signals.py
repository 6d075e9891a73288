"""Ctrl-C and SIGTERM as a flag that a loop reads between its steps."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop(threading.Event):
    """Set once the user or the system asks to stop; ``by`` is then the signal's name."""

    by = ""


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """Context in which the first Ctrl-C or SIGTERM sets the flag. A Ctrl-C after it raises ``KeyboardInterrupt``.

    Further SIGTERMs change nothing, as schedulers may send several. A process that ignores SIGTERM keeps ignoring it.
    Outside the main thread, where Python handles no signals, the flag is never set.
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
