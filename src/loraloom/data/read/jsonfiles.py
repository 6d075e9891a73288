"""From a JSON file to rows: an object on each line, or one array of objects. Does not know columns or tasks.

One row is in memory at a time. The standard library parses an array only as a whole, so its decoder gets a part of the
file, and a longer part if a value does not end in it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from loraloom.data.read.readers import ROW_LIMIT, StrictJson, checked_start, decoded, guarded, lines, open_file, report
from loraloom.data.rows import BadRow, OnBad, Row
from loraloom.errors import DataError

BLANKS = re.compile(r"[ \t\r\n]*")
CUT_SHORT = "the array is not closed; is the file cut short?"
#: Bytes read at a time.
STEP = 2**18


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


# One array of objects ------------------------------------------------------------------------------------------------


def read_array(path: Path, bad: OnBad | None = None) -> Iterator[Row]:
    """The objects of the array, numbered from 1.

    A value that is no object, or an object with a key twice, is a bad row. Rows after a syntax error cannot be found,
    so that is a ``DataError`` even if bad rows are skipped.
    """
    strict, name = StrictJson(), str(path)
    with open_file(path) as file:
        text = _Stretch(file, path)
        text.expect("[")
        for number in count(1):
            if number == 1 and text.peek() == "]":
                break
            value, raw = text.value(strict)
            if reason := strict.wrong(value, "an array of JSON objects is needed"):
                report(bad, BadRow(name, number, reason, raw=raw, unit="row"))
            else:
                yield Row(value, number, name, "row")
            if text.peek() == "]":
                break
            text.expect(",")
        text.expect("]")
        if text.peek():
            raise text.broken("there is more behind the array", text.at)


class _Stretch:
    """The text of a file around the current position ``at``; the rest is not in memory."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0
        # Position of the start of ``text`` in the file, from 1.
        self._line, self._column = 1, 1

    def more(self) -> bool:
        """Read the next part and drop the text before ``at``. False at the end of the file."""
        self._line, self._column = self._place(self.at)
        self.text, self.at = self.text[self.at :], 0
        # Double the text, so that a long value is decoded only a few times.
        raw = guarded(self._file, self._path, max(STEP, len(self.text)))
        try:
            self.text += self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as exc:
            self.text += exc.object[: exc.start].decode("utf-8")
            line, column = self._place(len(self.text))
            raise DataError(
                f"{self._path}, line {line}: not UTF-8: the byte behind character {column - 1} of the line is "
                f"0x{exc.object[exc.start]:02x}; save the file as UTF-8"
            ) from None
        return bool(raw)

    def _place(self, at: int) -> tuple[int, int]:
        """Line and character (from 1) of a position in ``text``."""
        newlines = self.text.count("\n", 0, at)
        if newlines:
            return self._line + newlines, at - self.text.rfind("\n", 0, at)
        return self._line, self._column + at

    def broken(self, message: str, at: int) -> DataError:
        line, column = self._place(at)
        return DataError(f"{self._path}, line {line}: not JSON: {message} (character {column})")

    def peek(self) -> str:
        """The next character after white space; empty at the end of the file."""
        while True:
            found = BLANKS.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def expect(self, sign: str) -> None:
        if (found := self.peek()) != sign:
            raise self.broken(f"Expecting {sign!r}" if found else CUT_SHORT, self.at)
        self.at += 1

    def value(self, strict: StrictJson) -> tuple[Any, str]:
        """The next value, and its text."""
        if not self.peek():
            raise self.broken(CUT_SHORT, self.at)
        too_large = f"a row of more than {ROW_LIMIT / 2**20:g} MiB"
        while True:
            try:
                value, end = strict.raw_decode(self.text, self.at)
            except json.JSONDecodeError as exc:
                strict.fault()
                past = exc.pos - self.at
                # The error of an incomplete value is near the end of the text, or in a string that is not closed.
                continues = exc.msg.startswith("Unterminated string") or exc.pos >= len(self.text) - 12
                if continues and len(self.text) - self.at > ROW_LIMIT:
                    message = f"{exc.msg}: {too_large}, or a double quote or brace that is not closed"
                    raise self.broken(message, exc.pos) from None
                if not continues or not self.more():
                    raise self.broken(exc.msg, self.at + past) from None
            except (ValueError, RecursionError) as exc:
                raise DataError(
                    f"{self._path}, line {self._place(self.at)[0]}: JSON that cannot be read: {exc}"
                ) from None
            else:
                raw, self.at = self.text[self.at : end], end
                if len(raw) > ROW_LIMIT:
                    raise DataError(f"{self._path}, line {self._place(end)[0]}: {too_large}")
                return value, raw
