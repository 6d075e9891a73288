"""The columns of one row under our names, with checks of their types.

This file maps our names of columns to the user's, and knows what a text, a list or a name of a class is. It does not
know which columns make a shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraloom.data.rows import Row, RowError, row_error, shown
from loraloom.errors import nearest

#: The value of a column that is missing.
ABSENT = object()
#: True and false as JSON has them.
JSON_NAMES = ("false", "true")


@dataclass(frozen=True)
class Labels:
    """The kind of seq-cls labels, by the first rows.

    ``problem`` is transformers' ``problem_type``. ``whole``: by the rows, not by an option, all are whole numbers, also
    as text. ``multi_hot``: the number of classes if labels are lists of 0 and 1, 0 if lists name the classes.
    """

    problem: str | None = None
    whole: bool = False
    multi_hot: int = 0


class Fields:
    """A row under our names. ``columns`` maps our names to the user's where they differ."""

    __slots__ = ("columns", "labels", "row")

    def __init__(self, row: Row, columns: Mapping[str, str], labels: Labels | None = None) -> None:
        self.row = row
        self.columns = columns
        self.labels = labels or Labels()

    def named(self, name: str) -> str:
        """The user's name of our column ``name``."""
        return self.columns.get(name, name)

    def found(self, name: str) -> Any:
        """The value of our column ``name``, or ``ABSENT``."""
        return lookup(self.row, self.named(name))

    def get(self, name: str) -> Any:
        """The value of our column ``name``; an error if it is missing."""
        value = self.found(name)
        if value is ABSENT:
            raise self.missing(name)
        return value

    def missing(self, name: str) -> RowError:
        """The error of a missing column ``name``, with the columns of the row."""
        wanted = self.named(name)
        there = ", ".join(map(repr, self.row.fields)) or "none"
        reason = f"no column {wanted!r}; the columns are {there}{nearest(wanted, self.row.fields)}"
        return row_error(self.row, reason, wanted)

    def wrong(self, name: str, reason: str) -> RowError:
        """The error ``reason`` of our column ``name``."""
        wanted = self.named(name)
        return row_error(self.row, f"{wanted!r} {reason}", wanted)

    def text(self, name: str, empty: bool = False) -> str:
        """A string that can be encoded as UTF-8 and, unless ``empty``, is not blank."""
        value = self.get(name)
        fault = text_fault(value, empty)
        if fault:
            raise self.wrong(name, fault)
        return value  # type: ignore[no-any-return]

    def text_or_none(self, name: str) -> str | None:
        """The same; None if the column is missing, null or blank."""
        value = self.found(name)
        if value is ABSENT or value is None or value == "":
            return None
        text = self.text(name, empty=True)
        return text if text.strip() else None

    def items(self, name: str) -> list[Any]:
        """A list, also as JSON in a string, as in CSV."""
        value: list[Any] = self.parsed(name, list, "a list")
        return value

    def objects(self, name: str) -> list[Any]:
        """A list of objects, also as an object of lists of one length, as ``datasets`` stores it."""
        value = self.parsed(name, list | dict, "a list")
        if isinstance(value, list):
            return value
        columns = list(value.values())
        if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            raise self.wrong(name, f"must be a list, or an object of lists of one length, found {shown(value)}")
        return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]

    def parsed(self, name: str, kind: Any, what: str) -> Any:
        """A value of type ``kind``, also as JSON in a string."""
        value = self.get(name)
        if isinstance(value, str) and (text := value) and (value := from_json(text)) is ABSENT:
            raise self.wrong(name, f"must be {what} (or JSON of one), found {shown(text)}")
        if not isinstance(value, kind):
            raise self.wrong(name, f"must be {what}, found {shown(value)}")
        return value


def from_json(text: str) -> Any:
    """The value that ``text`` is as JSON, or ``ABSENT``."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ABSENT


def lookup(row: Row, name: str) -> Any:
    """The row's column ``name``, or ``ABSENT``. ``a.b`` is the key b of the column a, unless a column is named a.b."""
    if name in row.fields:
        return row.fields[name]
    value: Any = row.fields
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return value


def text_fault(value: object, empty: bool = False) -> str:
    """Why a value is no text, to follow its name in a message; empty if it is one."""
    if not isinstance(value, str):
        return f"must be a string, found {shown(value)}"
    if not empty and not value.strip():
        return "is empty"
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as exc:
            return f"holds half of a surrogate pair (character {exc.start + 1})"
    return ""


def name_fault(value: object) -> str:
    """Why a value is no name of a class or tag (a string or a whole number); empty if it is one."""
    if isinstance(value, str):
        return text_fault(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return "" if whole else f"must be a string or a whole number, found {shown(value)}"
