"""JSON of any value, numbers that are not finite included, for which JSON has no words.

A state that is read again keeps them as ``{"number": "nan"}`` (``exact`` and ``restored``); a record that any program
may read has null in their place (``plain``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

#: What reading JSON of another shape than was written raises, deep nesting and huge numbers included.
MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)


def plain(value: Any, limit: Callable[[float], Any] = lambda number: None) -> Any:
    """``value`` in JSON's own types. ``limit`` gives what stands for a number that is not finite, by default null."""
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
    """``value`` in JSON's own types, from which ``restored`` gives every number back."""
    return plain(value, lambda number: {"number": str(number)})


def restored(value: Any) -> Any:
    """What ``exact`` was given, from what JSON made of it.

    Raises:
        ValueError: what stands for a number is none.
    """
    if isinstance(value, dict):
        if value.keys() == {"number"} and isinstance(value["number"], str):
            return float(value["number"])
        return {key: restored(item) for key, item in value.items()}
    return [restored(item) for item in value] if isinstance(value, list) else value
