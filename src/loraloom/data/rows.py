"""From a JSONL or CSV file to checked rows, each with its line number.

This file knows file formats, the columns that each task needs, and labels. It does not know tokenizers or
tensors. Everything that is wrong with the user's file is found here and named by file and line.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import random
import re
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraloom.config import TaskType
from loraloom.errors import ConfigError, DataError, nearest

#: The columns that a task reads; where there are several forms, the first that fits the first row is taken.
FORMS: dict[TaskType, tuple[tuple[str, ...], ...]] = {
    TaskType.SEQ_CLS: (("text", "label"),),
    TaskType.CAUSAL_LM: (("prompt", "completion"), ("text",)),
}

WHOLE_NUMBER = re.compile(r"0|-?[1-9][0-9]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a data file: its columns, and the line (from 1) on which it starts."""

    fields: dict[str, Any]
    line: int


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a ``.jsonl`` or ``.csv`` file (UTF-8, with or without a byte order mark).

    Blank lines are skipped and still counted. The values of a CSV file are all strings. Raises ``DataError``,
    with file and line, for whatever cannot be read as it stands; nothing is repaired or left out in silence.
    """
    path = _file(path)
    readers = {".jsonl": _jsonl, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        found = f"the suffix {path.suffix!r}" if path.suffix else "no suffix"
        raise DataError(f"{path}: {found}; a data file is .jsonl (one JSON object per line) or .csv")
    rows = list(reader(_decode(_bytes(path), path), path))
    if not rows:
        raise DataError(f"{path}: the file is empty: no rows were found")
    return rows


def data_hash(path: str | Path) -> str:
    """The SHA-256 of the file's bytes, in hexadecimal."""
    return hashlib.sha256(_bytes(_file(path))).hexdigest()


def _file(path: str | Path) -> Path:
    # Not Path.is_dir(): it raises for a name that the system cannot hold.
    if os.path.isdir(path):
        raise DataError(f"{path}: a directory, where a data file (.jsonl or .csv) is needed")
    return Path(path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        siblings = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
        raise DataError(f"{path}: no such file{nearest(path.name, siblings)}") from None
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from exc


def _decode(raw: bytes, path: Path) -> str:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        byte = exc.start - raw.rfind(b"\n", 0, exc.start)
        raise DataError(
            f"{path}, line {line}: not UTF-8: byte {byte} of the line is 0x{raw[exc.start]:02x}; save the file as UTF-8"
        ) from None


def _jsonl(text: str, path: Path) -> Iterator[Row]:
    # Not splitlines(): it also breaks at U+2028 and its like, which are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as exc:
            raise DataError(f"{path}, line {number}: not JSON: {exc.msg} (character {exc.colno})") from None
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{path}, line {number}: JSON that cannot be read: {exc}") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: a JSON object is needed on every line, found {_shown(value)}")
        yield Row(value, number)


def _csv(text: str, path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if len(cells) <= 1 and not "".join(cells).strip():
                continue
            if header is None:
                header = cells
                twice = sorted({name for name in cells if cells.count(name) > 1})
                if twice:
                    raise DataError(f"{path}, line {line}: the column {twice[0]!r} is there twice")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(cells)} fields, where the header has {len(header)}; "
                    f"a field with a comma, a quote or a line break in it must stand in double quotes"
                )
            yield Row(dict(zip(header, cells, strict=True)), line)
    except csv.Error as exc:
        raise DataError(f"{path}, line {start}: not CSV: {exc}; is a double quote not closed?") from None


def as_task(task: TaskType | str) -> TaskType:
    """``"seq-cls"``, ``"SEQ_CLS"`` or the enum itself as a ``TaskType`` that rows can be read for."""
    name = (task.value if isinstance(task, TaskType) else str(task)).upper().replace("-", "_")
    known = {kind.value: kind for kind in FORMS}
    if name not in known:
        options = [value.lower().replace("_", "-") for value in known]
        raise ConfigError(f"task: {task!r} is not one of {', '.join(options)}{nearest(str(task), options)}")
    return known[name]


def check_columns(rows: Sequence[Row], task: TaskType | str, path: str | Path) -> tuple[str, ...]:
    """Check every row for the columns of ``task``, and return the columns that it reads.

    seq-cls reads ``text`` and ``label``; causal-lm reads ``prompt`` and ``completion``, or else ``text``.
    Other columns are ignored. Raises ``DataError`` for a missing column, a text that is not a string, is
    empty or cannot be written as UTF-8, and a label that is neither a string nor a whole number.
    """
    kind = as_task(task)
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
        raise DataError(f"{where}: {column!r} must be a string, found {_shown(value)}")
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
        raise DataError(f"{where}: 'label' must be a string or a whole number, found {_shown(value)}")
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{where}: 'label' is empty")


def _shown(value: object) -> str:
    return "null" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"


def label_name(row: Row) -> str:
    """The row's class as text: ``1``, ``1.0`` and ``"1"`` are one class, whichever format they came from."""
    value = row.fields["label"]
    return str(int(value)) if isinstance(value, float) else str(value)


def label_names(rows: Sequence[Row], path: str | Path) -> list[str]:
    """The classes in the order of their ids: by value where all are whole numbers, else by name.

    Raises ``DataError`` when there are fewer than two.
    """
    names = {label_name(row) for row in rows}
    if len(names) < 2:
        only = next(iter(names), "none")
        raise DataError(f"{path}: a classifier needs two classes or more; all {len(rows)} rows are labelled {only!r}")
    numbers = all(WHOLE_NUMBER.fullmatch(name) for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


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

    ``amount`` is a share (a float between 0 and 1, at least one row) or a number of rows (an int). The choice
    depends on ``seed`` and on nothing else. With ``keep_labels``, training keeps at least one row of every
    label, so that no label is held out altogether. Raises ``ConfigError`` for an amount out of range and
    ``DataError`` when there are too few rows.
    """
    if isinstance(amount, bool) or not (
        0 < amount < 1 if isinstance(amount, float) else isinstance(amount, int) and amount >= 1
    ):
        raise ConfigError(f"rows to hold out: a share between 0 and 1 or a whole number of rows, not {amount!r}")
    count = max(1, round(amount * len(rows))) if isinstance(amount, float) else amount
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    kept: set[str] = set()
    free = []
    for index in order:
        name = label_name(rows[index]) if keep_labels else ""
        if name in kept:
            free.append(index)
        kept.add(name)
    if count > len(free):
        reason = f" with one row of each of {len(kept)} labels kept for training" if keep_labels else ""
        raise DataError(f"{count} of {len(rows)} rows cannot be held out{reason}; give more rows or hold out fewer")
    held = set(free[:count])
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [rows[index] for index in sorted(held)]
