"""From a JSON file to rows: an object on each line, or one array of objects. Does not know columns or tasks."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraloom.data.read.arrays import read_array
from loraloom.data.read.readers import ROW_LIMIT, StrictJson, checked_start, decoded, guarded, lines, open_file, report
from loraloom.data.rows import BadRow, OnBad, Row
from loraloom.errors import DataError


def read_json(path: Path, bad: OnBad | None = None) -> Iterator[Row]:
    """The rows of a JSON file: an object on each line, or one array of objects, which is detected.

    Blank lines are skipped but counted. Rows of an array are numbered from 1.
    """
    return read_array(path, bad) if _first_sign(path) == b"[" else _json_lines(path, bad)


def _first_sign(path: Path) -> bytes:
    """The first byte after a byte order mark and white space; empty if there is none."""
    with open_file(path) as file:
        start = guarded(file, path, 16)
        checked_start(start, path)
        start = start.removeprefix(codecs.BOM_UTF8)
        while not start.strip():
            start = guarded(file, path, 2**16)
            if not start:
                return b""
        return start.lstrip()[:1]


def _json_lines(path: Path, bad: OnBad | None) -> Iterator[Row]:
    strict, name = StrictJson(), str(path)
    first = True
    for line in lines(path):
        text = decoded(line, path)
        number = line.number
        if isinstance(text, BadRow):
            if first and line.cut and '"paragraphs"' in text.raw:
                raise DataError(f"{path}: {SQUAD}")
            report(bad, text)
            continue
        # Not text.strip(): a no-break space is no white space in JSON, and is an error.
        if not text.strip(" \t\r"):
            continue
        column = None
        try:
            value = strict.decode(text)
            reason = strict.wrong(value, "a JSON object is needed on every line")
        except json.JSONDecodeError as exc:
            reason, column = f"not JSON: {exc.msg} (character {exc.colno})", exc.colno
            strict.fault()  # of this line
            if first and (named := _whole_object(path)):
                raise DataError(f"{path}, line {number}: {named}") from None
        except (ValueError, RecursionError) as exc:
            reason = f"JSON that cannot be read: {exc}"
            strict.fault()
        if reason:
            report(bad, BadRow(name, number, reason, column, raw=text))
            continue
        if first and (named := other_form(value)):
            raise DataError(f"{path}: {named}")
        first = False
        yield Row(value, number, name)


# Files that are one object --------------------------------------------------------------

ROWS = "a file of JSON lines has a whole object on each line, and a .json file may also be one array of objects"
SQUAD = (
    "SQuAD's own form, with paragraphs in 'data' and questions in 'qas'; write a row for each question, with "
    "'question', 'context' and 'answers' ({'text': [...], 'answer_start': [...]}), as the dataset of the hub has them"
)
PANDAS = "as pandas' to_json can write it; write orient='records', lines=True"


def other_form(value: dict[str, Any]) -> str:
    """The form of an object that is a whole table, and what to do; empty for a row."""
    data = value.get("data")
    if isinstance(data, list) and data and all(isinstance(one, dict) and "paragraphs" in one for one in data[:10]):
        return SQUAD
    if isinstance(data, list) and (value.keys() == {"columns", "index", "data"} or value.keys() == {"schema", "data"}):
        return f"one object that is a whole table, {PANDAS}"
    parts = list(value.values())
    if parts and all(isinstance(part, dict) and part for part in parts):
        keys = parts[0].keys()
        if all(part.keys() == keys for part in parts):
            if all(map(str.isdecimal, keys)):
                return f"one object with a column under each key, {PANDAS}"
            if all(map(str.isdecimal, value)):
                return f"one object with a row under each number, {PANDAS}"
    return ""


def _whole_object(path: Path) -> str:
    """The form of a file that is one object over several lines, and what to do; empty if it is not."""
    with open_file(path) as file:
        text = guarded(file, path, ROW_LIMIT).removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    if not text.lstrip().startswith("{"):
        return ""
    try:
        value = StrictJson().decode(text)
    except json.JSONDecodeError:
        if text.lstrip().split("\n", 1)[0].strip() != "{":
            return ""
        return SQUAD if '"paragraphs"' in text[:4000] else f"an object over several lines; {ROWS}"
    except (ValueError, RecursionError):
        return ""
    return other_form(value) or f"one object over several lines; {ROWS}"
