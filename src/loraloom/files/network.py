"""Whether the hub can be reached: checked once with a short timeout, so that a wrong name is refused within seconds.

The hub's libraries retry an unreachable host for half a minute and print each try. Callers check here first, and use
only the cache if the hub cannot be reached.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from typing import Any

from loraloom.errors import first_line

#: Timeouts in seconds, of the connection and of the response.
CONNECT, READ = 3.0, 1.0
#: Timeout in seconds of the whole check: the name lookup has none.
PATIENCE = 4.0
#: Number of tries and seconds between them: a busy network may fail once.
TRIES, BETWEEN = 2, 0.5
#: Seconds after which the check is repeated.
KNOWN = 60.0

#: Exceptions of the libraries without a connection; other errors mean that the host responded.
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ConnectionError"}


def unreachable() -> str:
    """Why the hub, or the mirror in ``HF_ENDPOINT``, cannot be reached; empty if it can, or in offline mode."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ""
    return _asked(constants.ENDPOINT, int(time.monotonic() / KNOWN))


@functools.lru_cache(1)
def _asked(endpoint: str, when: int) -> str:
    """``unreachable`` at about the time ``when``."""
    answers: queue.Queue[str] = queue.Queue()
    # A name lookup that hangs cannot be interrupted: its thread is abandoned.
    threading.Thread(target=lambda: answers.put(_ask(endpoint)), daemon=True).start()
    with contextlib.suppress(queue.Empty):
        return answers.get(timeout=PATIENCE)
    return f"{endpoint} cannot be reached: no answer within {PATIENCE:g} seconds"


def _ask(endpoint: str) -> str:
    from huggingface_hub import get_session

    said = ""
    for again in range(TRIES):
        if again:
            time.sleep(BETWEEN)
        try:
            # With the library's own proxies and certificates. Any response counts.
            limits: Any = (CONNECT, READ, READ, CONNECT)
            get_session().head(endpoint, timeout=limits, follow_redirects=False)
            return ""
        except Exception as error:
            if not _NO_CONNECTION & {kind.__name__ for kind in type(error).__mro__}:
                return ""
            said = first_line(error)
    return f"{endpoint} cannot be reached: {said}"
