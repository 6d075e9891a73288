"""Rows: one record of the user's data each, its place in a file, and its errors.

This file does not know file formats (``readers``), sources, columns (``shapes``), tokenizers or tensors.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from loraloom.errors import DataError, nearest

WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]*")

#: How a place in a file is counted: by line, or by record where a file has no lines of its own.
Unit = Literal["line", "row"]


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the data: its columns, and the line or row (from 1) on which it starts in its file."""

    fields: dict[str, Any]
    line: int
    file: str = ""
    unit: Unit = "line"

    @property
    def where(self) -> str:
        """``"chats.jsonl, line 7"``, or ``"chats.parquet, row 7"`` where a file has no lines."""
        return f"{self.file}, {self.unit} {self.line}" if self.file else f"{self.unit} {self.line}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: its place, the reason, and its contents.

    ``column`` is the character of the line (from 1) where that is known, ``field`` the user's name of the column
    at fault. ``raw`` is the row as text: the line itself, or JSON of the columns; its start where it is huge.
    """

    file: str
    line: int
    reason: str
    column: int | None = None
    field: str = ""
    raw: str = ""
    unit: Unit = "line"

    @property
    def message(self) -> str:
        """What an error says of it: file, line and reason."""
        where = f"{self.file}, {self.unit} {self.line}" if self.file else f"{self.unit} {self.line}"
        return f"{where}: {self.reason}"


#: What is told of each bad row where they are skipped; without it the first one is raised.
OnBad = Callable[[BadRow], None]


class RowError(DataError):
    """One row of the data is invalid, the others may be valid; ``bad`` has its place and the reason."""

    def __init__(self, bad: BadRow) -> None:
        super().__init__(bad.message)
        self.bad = bad

    def __reduce__(self) -> tuple[type[RowError], tuple[BadRow]]:
        # An exception is rebuilt from its message otherwise, and this one may come from a worker process.
        return type(self), (self.bad,)


def row_error(row: Row, reason: str, field: str = "") -> RowError:
    """The error that says ``reason`` of ``row``, with the row's columns as JSON beside it."""
    raw = json.dumps(row.fields, default=repr)
    return RowError(BadRow(row.file, row.line, reason, None, field, raw, row.unit))


def shown(value: object) -> str:
    """A value as errors show it, with its type and not at full length: ``int 3``, ``list [1, 2, ...]``, ``null``."""
    name = "int" if type(value).__name__ == "LongNumber" else type(value).__name__
    return "null" if value is None else f"{name} {reprlib.repr(value)}"


def unseen(what: str, name: str, known: Collection[str]) -> str:
    """The error of a class or tag ``name`` that is not among those of training."""
    return f"the {what} {name!r} is never seen in training, which has {len(known)} {what}s{nearest(name, known)}"


def ordered_labels(names: Iterable[str]) -> list[str]:
    """The classes in the order of their ids: by value where all are whole numbers, else by name; each once."""
    distinct = set(names)
    numbers = all(WHOLE_NUMBER.fullmatch(name) for name in distinct)
    return sorted(distinct, key=int) if numbers else sorted(distinct)
