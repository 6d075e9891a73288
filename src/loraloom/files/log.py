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
