"""Rows: one record of the user's data each, where it stands, what may be wrong with it, and its label.

This file knows what a row is, the columns and labels of the two oldest tasks, and how to say where a row stands.
It does not know file formats (``readers``), sources, tokenizers or tensors.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loraloom.config import TaskType
from loraloom.data.holdout import held_out
from loraloom.errors import ConfigError, DataError, nearest

#: The columns that a task reads; where there are several forms, the first that fits the first row is taken.
FORMS: dict[TaskType, tuple[tuple[str, ...], ...]] = {
    TaskType.SEQ_CLS: (("text", "label"),),
    TaskType.CAUSAL_LM: (("prompt", "completion"), ("text",)),
}

#: The tasks that rows are read for, by their option.
ROW_TASKS = {
    "seq-cls": TaskType.SEQ_CLS,
    "causal-lm": TaskType.CAUSAL_LM,
    "token-cls": TaskType.TOKEN_CLS,
    "seq2seq-lm": TaskType.SEQ_2_SEQ_LM,
    "question-answering": TaskType.QUESTION_ANS,
}

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
    """A row that cannot be used: where it stands, why, and what was there.

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
    """One row of the data is wrong, and the others may be right; ``bad`` says which and why."""

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


def read_rows(path: str | Path) -> list[Row]:
    """All rows of one data file at once, as ``sources.resolve`` reads them."""
    # Inside, because sources stands above this file: goes when the last caller reads sources itself.
    from loraloom.data.sources import read_rows as read

    return read(path)


def data_hash(path: str | Path) -> str:
    """The SHA-256 of the file's bytes, in hexadecimal."""
    from loraloom.data.readers import file_hash

    return file_hash(path)


def as_task(task: TaskType | str) -> TaskType:
    """``"seq-cls"``, ``"SEQ_CLS"`` or the enum itself as a ``TaskType`` that rows can be read for."""
    if isinstance(task, str) and task in ROW_TASKS:
        return ROW_TASKS[task]
    name = (task.value if isinstance(task, TaskType) else str(task)).upper().replace("-", "_")
    known = {kind.value: kind for kind in ROW_TASKS.values()}
    if name not in known:
        raise ConfigError(f"task: {task!r} is not one of {', '.join(ROW_TASKS)}{nearest(str(task), ROW_TASKS)}")
    return known[name]


def task_option(task: TaskType) -> str:
    """The task by its option, as messages name it: ``"seq2seq-lm"``."""
    return next(option for option, kind in ROW_TASKS.items() if kind is task)


def check_columns(rows: Sequence[Row], task: TaskType | str, path: str | Path) -> tuple[str, ...]:
    """Check every row for the columns of ``task``, and return the columns that it reads.

    seq-cls reads ``text`` and ``label``; causal-lm reads ``prompt`` and ``completion``, or else ``text``.
    Other columns are ignored. Raises ``DataError`` for a missing column, a text that is not a string, is
    empty or cannot be written as UTF-8, and a label that is neither a string nor a whole number.
    """
    kind = as_task(task)
    if kind not in FORMS:
        raise ConfigError(f"{kind.value}: its rows are read by shapes.recognise")
    columns = _form(rows[0], kind)
    for row in rows:
        where = f"{path}, line {row.line}"
        for column in columns:
            if column not in row.fields:
                forms = ", or ".join(" and ".join(map(repr, form)) for form in FORMS[kind])
                found = ", ".join(map(repr, row.fields)) or "none"
                raise DataError(
                    f"{where}: no column {column!r} ({kind.value.lower().replace('_', '-')} reads {forms}); "
                    f"the columns are {found}{nearest(column, row.fields)}"
                )
            value = row.fields[column]
            if column == "label":
                _check_label(value, where)
            else:
                _check_text(column, value, where)
    return columns


def _form(row: Row, kind: TaskType) -> tuple[str, ...]:
    """The first form that the row has in full, else the one it has most of (to name what is missing)."""
    forms = FORMS[kind]
    whole = [form for form in forms if all(column in row.fields for column in form)]
    return whole[0] if whole else max(forms, key=lambda form: sum(column in row.fields for column in form))


def _check_text(column: str, value: object, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: {column!r} must be a string, found {shown(value)}")
    # An empty prompt is a row without one; an empty text or completion leaves nothing to learn.
    if column != "prompt" and not value.strip():
        raise DataError(f"{where}: {column!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise DataError(f"{where}: {column!r} holds half of a surrogate pair (character {exc.start + 1})") from None


def _check_label(value: object, where: str) -> None:
    whole = isinstance(value, (int, str)) or (isinstance(value, float) and value.is_integer())
    if not whole or isinstance(value, bool):
        raise DataError(f"{where}: 'label' must be a string or a whole number, found {shown(value)}")
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{where}: 'label' is empty")


def shown(value: object) -> str:
    """A value as errors show it, with its type and not at full length: ``int 3``, ``list [1, 2, ...]``, ``null``."""
    return "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def class_name(label: object) -> str:
    """A label as text: ``1``, ``1.0`` and ``"1"`` are one class, whichever format they came from."""
    return str(int(label)) if isinstance(label, float) else str(label)


def label_name(row: Row) -> str:
    """The row's class as text (see ``class_name``)."""
    return class_name(row.fields["label"])


def ordered_labels(names: Iterable[str]) -> list[str]:
    """The classes in the order of their ids: by value where all are whole numbers, else by name; each once."""
    distinct = set(names)
    numbers = all(WHOLE_NUMBER.fullmatch(name) for name in distinct)
    return sorted(distinct, key=int) if numbers else sorted(distinct)


def label_names(rows: Collection[Row], path: str | Path) -> list[str]:
    """The classes of ``rows`` in the order of their ids.

    Raises ``DataError`` when there are fewer than two.
    """
    names = {label_name(row) for row in rows}
    if len(names) < 2:
        only = next(iter(names), "none")
        raise DataError(f"{path}: a classifier needs two classes or more; all {len(rows)} rows are labelled {only!r}")
    return ordered_labels(names)


def label_ids(rows: Sequence[Row], labels: Sequence[str], path: str | Path) -> list[int]:
    """The place of each row's label in ``labels``; ``DataError`` for one that is not there."""
    ids = {name: number for number, name in enumerate(labels)}
    for row in rows:
        name = label_name(row)
        if name not in ids:
            raise DataError(
                f"{path}, line {row.line}: the label {name!r} is never seen in training, "
                f"which has {len(ids)} labels{nearest(name, ids)}"
            )
    return [ids[label_name(row)] for row in rows]


def check_labels(train: Sequence[Row], evaluation: Sequence[Row], path: str | Path) -> None:
    """Raise ``DataError`` when a label of ``evaluation``, which came from ``path``, is never in ``train``."""
    label_ids(evaluation, sorted({label_name(row) for row in train}), path)


def split(rows: Sequence[Row], amount: float, seed: int, keep_labels: bool = False) -> tuple[list[Row], list[Row]]:
    """Hold out rows at random: (training rows, evaluation rows), both in the order of the file.

    What ``holdout.held_out`` chooses, with the rows' labels where ``keep_labels`` is set.
    """
    held = held_out(len(rows), amount, seed, [label_name(row) for row in rows] if keep_labels else None)
    chosen = set(held)
    return [row for index, row in enumerate(rows) if index not in chosen], [rows[index] for index in held]
