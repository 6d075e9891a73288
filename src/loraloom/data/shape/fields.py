"""The columns of one row as a shape asks for them, under the shape's names, checked for being what is needed.

This file knows how the user's names map to ours and what a text, a list or a whole number is. It does not know
which columns make a shape.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraloom.data.rows import Row, RowError, row_error, shown
from loraloom.errors import nearest

#: What ``found`` gives where there is nothing.
ABSENT = object()
#: True and false as JSON has them.
JSON_NAMES = ("false", "true")


@dataclass(frozen=True)
class Labels:
    """What the labels of seq-cls are, as the first rows have them.

    ``problem`` is transformers' ``problem_type``. ``whole``: nobody said so, and all are whole numbers, also as text.
    ``multi_hot``: how many classes lists of 0 and 1 are of, one place for each; 0 where lists name the classes.
    """

    problem: str | None = None
    whole: bool = False
    multi_hot: int = 0


class Fields:
    """A row seen through ``columns``, which maps our names to the user's where they differ."""

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
        """The value of our column ``name``; an error where there is no such column."""
        value = self.found(name)
        if value is ABSENT:
            raise self.missing(name)
        return value

    def missing(self, name: str) -> RowError:
        """The error that there is no column ``name``, with the columns that there are."""
        wanted = self.named(name)
        there = ", ".join(map(repr, self.row.fields)) or "none"
        reason = f"no column {wanted!r}; the columns are {there}{nearest(wanted, self.row.fields)}"
        return row_error(self.row, reason, wanted)

    def wrong(self, name: str, reason: str) -> RowError:
        """The error that says ``reason`` of our column ``name``."""
        wanted = self.named(name)
        return row_error(self.row, f"{wanted!r} {reason}", wanted)

    def text(self, name: str, empty: bool = False) -> str:
        """A string that can be written as UTF-8 and, unless ``empty``, has more than blanks in it."""
        value = self.get(name)
        fault = text_fault(value, empty)
        if fault:
            raise self.wrong(name, fault)
        return value  # type: ignore[no-any-return]

    def text_or_none(self, name: str) -> str | None:
        """The same, or None where there is no such column, or null or nothing but blanks in it."""
        value = self.found(name)
        if value is ABSENT or value is None or value == "":
            return None
        text = self.text(name, empty=True)
        return text if text.strip() else None

    def items(self, name: str) -> list[Any]:
        """A list; also one that is written as JSON in a string, which is how CSV has lists."""
        value: list[Any] = self.parsed(name, list, "a list")
        return value

    def objects(self, name: str) -> list[Any]:
        """A list of objects; also an object of lists of one length, as ``datasets`` makes of such a list."""
        value = self.parsed(name, list | dict, "a list")
        if isinstance(value, list):
            return value
        columns = list(value.values())
        if not columns or not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            raise self.wrong(name, f"must be a list, or an object of lists of one length, found {shown(value)}")
        return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]

    def parsed(self, name: str, kind: Any, what: str) -> Any:
        """A value of type ``kind``, or a string with JSON of one."""
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
    """The row's column ``name``, or ``ABSENT``; ``a.b`` is the key b of the column a, where none is called a.b."""
    if name in row.fields:
        return row.fields[name]
    value: Any = row.fields
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return value


def text_fault(value: object, empty: bool = False) -> str:
    """What is wrong with a value where a text is needed, to be said behind its name; or the empty string."""
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
    """What is wrong with the name of a class or a tag, a string or a whole number; or the empty string."""
    if isinstance(value, str):
        return text_fault(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return "" if whole else f"must be a string or a whole number, found {shown(value)}"
