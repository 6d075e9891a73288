"""Log lines: to Python's logger ``loraloom``, and to a program's callback if it has one.

Nothing is printed unless the program sets up logging or prints in its callback.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

LOGGER = logging.getLogger("loraloom")
LOGGER.addHandler(logging.NullHandler())

Log = Callable[[str], None]


def info(text: str) -> None:
    LOGGER.info("%s", text)


def warning(text: str) -> None:
    LOGGER.warning("%s", text)


def logged(log: Log) -> Log:
    """``log`` that also writes each line to the logger, with level WARNING if it begins with "warning"."""

    def both(text: str) -> None:
        rest = text.removeprefix("warning: ")
        (info if rest == text else warning)(rest)
        log(text)

    return info if log is info else both
