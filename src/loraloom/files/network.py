"""Whether the hub can be reached at all: asked once and briefly, so that a name that is wrong is refused in seconds.

The hub's libraries try a host that cannot be reached for half a minute, and print each try. Where it cannot be, they
are told to look into their cache alone, by their own switch and for as long as they look. This file does not know what
is looked for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

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


@contextlib.contextmanager
def looking(name: str) -> Iterator[None]:
    """Within it the hub's libraries look for ``name`` on the hub, or in their cache alone where that cannot be reached.

    For a folder that is here nobody is asked.
    """
    if os.path.exists(name) or not unreachable():
        yield
        return
    switches = list(_switches())
    for module in switches:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module in switches:
            module.HF_HUB_OFFLINE = False


def _switches() -> Iterator[Any]:
    import datasets.config
    from huggingface_hub import constants

    yield from (module for module in (constants, datasets.config) if not module.HF_HUB_OFFLINE)


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
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{endpoint} cannot be reached: {said}"
