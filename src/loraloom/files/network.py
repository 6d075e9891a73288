"""Whether the hub can be reached at all: asked once and briefly, so that a name that is wrong is refused in seconds.

The hub's libraries try a host that cannot be reached for half a minute, and print each try. Who looks for something
there asks here first, and where the hub cannot be reached, looks into the cache alone. This file does not know what is
looked for.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from typing import Any

from loraloom.errors import first_line

#: Seconds in which a connection must stand, and in which the first answer may come once it does.
CONNECT, READ = 3.0, 1.0
#: Seconds for all of it: names are looked up without a limit of their own.
PATIENCE = 4.0
#: A network that is busy may miss one try: so many are made, with so many seconds between.
TRIES, BETWEEN = 2, 0.5
#: Seconds after which it is asked again.
KNOWN = 60.0

#: What the libraries raise where there is no connection; other errors are an answer, or theirs to tell.
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ConnectionError"}


def unreachable() -> str:
    """Why the hub, or the mirror in ``HF_ENDPOINT``, cannot be reached; nothing where it can, or is not to be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ""
    return _asked(constants.ENDPOINT, int(time.monotonic() / KNOWN))


@functools.lru_cache(1)
def _asked(endpoint: str, when: int) -> str:
    """``unreachable`` at about the time ``when``."""
    answers: queue.Queue[str] = queue.Queue()
    # Nothing ends a look-up of a name that hangs: it is left behind.
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
            # As the library itself would: with its proxies and certificates. Any answer will do.
            limits: Any = (CONNECT, READ, READ, CONNECT)
            get_session().head(endpoint, timeout=limits, follow_redirects=False)
            return ""
        except Exception as error:
            if not _NO_CONNECTION & {kind.__name__ for kind in type(error).__mro__}:
                return ""
            said = first_line(error)
    return f"{endpoint} cannot be reached: {said}"
