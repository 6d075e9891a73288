"""Rows: each is one record of the user's data, with its position in a file. And the errors of rows.

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

#: Unit of a position in a file: lines, or rows for a file without lines.
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
        """``"chats.jsonl, line 7"``, or ``"chats.parquet, row 7"`` for a file without lines."""
        return f"{self.file}, {self.unit} {self.line}" if self.file else f"{self.unit} {self.line}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: its position, the reason, and its contents.

    ``column`` is the character of the line (from 1) if known, ``field`` the user's name of the column with the error.
    ``raw`` is the row as text: the line itself, or JSON of the columns, cut if it is very long.
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
        """The message of an error: file, line and reason."""
        where = f"{self.file}, {self.unit} {self.line}" if self.file else f"{self.unit} {self.line}"
        return f"{where}: {self.reason}"


#: Called with each bad row if bad rows are skipped; without it the first one is raised.
OnBad = Callable[[BadRow], None]


class RowError(DataError):
    """One row of the data is invalid, the others may be valid; ``bad`` has its place and the reason."""

    def __init__(self, bad: BadRow) -> None:
        super().__init__(bad.message)
        self.bad = bad

    def __reduce__(self) -> tuple[type[RowError], tuple[BadRow]]:
        # By default an exception is unpickled from its message; this one may come from a worker process.
        return type(self), (self.bad,)


def row_error(row: Row, reason: str, field: str = "") -> RowError:
    """The error ``reason`` of ``row``, with the row's columns as JSON."""
    raw = json.dumps(row.fields, default=repr)
    return RowError(BadRow(row.file, row.line, reason, None, field, raw, row.unit))


def shown(value: object) -> str:
    """A value in an error: its type and a short representation, ``int 3``, ``list [1, 2, ...]``, ``null``."""
    name = "int" if type(value).__name__ == "LongNumber" else type(value).__name__
    return "null" if value is None else f"{name} {reprlib.repr(value)}"


def unseen(what: str, name: str, known: Collection[str]) -> str:
    """The error of a class or tag ``name`` that is not among those of training."""
    return f"the {what} {name!r} is never seen in training, which has {len(known)} {what}s{nearest(name, known)}"


def ordered_labels(names: Iterable[str]) -> list[str]:
    """The distinct classes in the order of their ids: by value if all are whole numbers, otherwise by name."""
    distinct = set(names)
    numbers = all(WHOLE_NUMBER.fullmatch(name) for name in distinct)
    return sorted(distinct, key=int) if numbers else sorted(distinct)
