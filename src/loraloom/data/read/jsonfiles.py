"""From a JSON file to rows: an object on each line, or one array of objects. Knows nothing of columns and tasks."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

from loraloom.data.read.arrays import read_array
from loraloom.data.read.readers import StrictJson, checked_start, decoded, guarded, lines, open_file, report
from loraloom.data.rows import BadRow, OnBad, Row, shown
from loraloom.errors import DataError


def read_json(path: Path, bad: OnBad | None = None) -> Iterator[Row]:
    """The rows of a JSON file: an object on each line, or one array of objects, whichever it is.

    Blank lines are skipped and still counted. In an array, rows are counted from 1.
    """
    return read_array(path, bad) if _first_sign(path) == b"[" else _json_lines(path, bad)


def _first_sign(path: Path) -> bytes:
    """The first byte that is no blank and no byte order mark; empty where there is none."""
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
            report(bad, text)
            continue
        # Not text.strip(): a no-break space is no blank of JSON's, and is said to be wrong.
        if not text.strip(" \t\r"):
            continue
        column = None
        try:
            value = strict.decode(text)
        except json.JSONDecodeError as exc:
            reason, column = f"not JSON: {exc.msg} (character {exc.colno})", exc.colno
            if first and text.strip() == "{":
                raise DataError(
                    f"{path}, line {number}: an object over several lines; a file of JSON lines has a whole object "
                    f"on each line, and a .json file may also be one array of objects"
                ) from None
        except (ValueError, RecursionError) as exc:
            reason = f"JSON that cannot be read: {exc}"
        else:
            reason = strict.fault()
            if not reason and not isinstance(value, dict):
                reason = f"a JSON object is needed on every line, found {shown(value)}"
            if not reason:
                first = False
                yield Row(value, number, name)
                continue
        strict.fault()
        report(bad, BadRow(name, number, reason, column, raw=text))
