"""JSON with numbers that are not finite.

State that loraloom reads again stores them as ``{"number": "nan"}`` (``exact`` and ``restored``); records for any
program have null instead (``plain``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from loraloom.errors import FormatError

#: Exceptions of reading JSON with an unexpected structure, including deep nesting and huge numbers.
MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)


def check_format(found: int, known: int, where: str) -> None:
    """
    Raises:
        FormatError: ``found`` is the format of a later version of loraloom than that of ``known``.
    """
    if found > known:
        raise FormatError(
            f"{where} is of format {found}, and this version of loraloom reads {known}; update loraloom, or choose "
            "another folder"
        )


def plain(value: Any, limit: Callable[[float], Any] = lambda number: None) -> Any:
    """``value`` in JSON's types. ``limit`` replaces a number that is not finite, by default with null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, limit) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item, limit) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item, limit) for item in value]
    if isinstance(value, Enum):
        return plain(value.value, limit)
    if isinstance(value, Path):
        return str(value)
    if type(value) is float and not math.isfinite(value):
        return limit(value)
    if value is None or isinstance(value, bool | str):
        return value
    if hasattr(value, "item"):  # a number of numpy or torch
        return plain(value.item(), limit)
    return value if isinstance(value, int | float) else str(value)


def exact(value: Any) -> Any:
    """``value`` in JSON's types, from which ``restored`` recovers every number."""
    return plain(value, lambda number: {"number": str(number)})


def restored(value: Any) -> Any:
    """The inverse of ``exact``, after a round trip through JSON.

    Raises:
        ValueError: an invalid replacement of a number.
    """
    if isinstance(value, dict):
        if value.keys() == {"number"} and isinstance(value["number"], str):
            return float(value["number"])
        return {key: restored(item) for key, item in value.items()}
    return [restored(item) for item in value] if isinstance(value, list) else value
