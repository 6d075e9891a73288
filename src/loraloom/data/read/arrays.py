"""From one JSON array of objects to rows, of which only the present one is in memory.

The standard library reads a JSON file as a whole or not at all. Here its decoder is given a stretch of the file,
and a longer one where a value turns out to go on behind the stretch.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from loraloom.data.read.readers import ROW_LIMIT, StrictJson, guarded, open_file, report
from loraloom.data.rows import BadRow, OnBad, Row, shown
from loraloom.errors import DataError

BLANK = " \t\r\n"

#: Bytes taken in at a time.
STEP = 2**18


def read_array(path: Path, bad: OnBad | None = None) -> Iterator[Row]:
    """The objects of the array that the file is, counted from 1.

    A value that is no object, or one with a key twice, is a bad row. Where the array itself is broken no row
    behind that place can be told apart, so that is a ``DataError`` also where bad rows are skipped.
    """
    strict, name = StrictJson(), str(path)
    with open_file(path) as file:
        text = _Stretch(file, path)
        text.skip("[")
        number = 0
        while number or text.next_sign() != "]":
            number += 1
            text.next_sign()
            value, raw = text.value(strict)
            reason = strict.fault()
            if not reason and not isinstance(value, dict):
                reason = f"an array of JSON objects is needed, found {shown(value)}"
            if reason:
                report(bad, BadRow(name, number, reason, raw=raw, unit="row"))
            else:
                yield Row(value, number, name, "row")
            if text.next_sign() == "]":
                break
            text.skip(",")
        text.skip("]")
        text.end()


class _Stretch:
    """The text of a file of which only what is around the present place is in memory."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._whole = False
        self.text = ""
        self.at = 0
        # Where ``text`` starts in the file, from 1.
        self._line = 1
        self._column = 1

    def more(self) -> bool:
        """Take in another piece and let go of what was passed; False at the end of the file."""
        if self._whole:
            return False
        self._line, self._column = self._place(self.at)
        self.text, self.at = self.text[self.at :], 0
        # As much again as there is: a value of any size is decoded a few times at most.
        raw = guarded(self._file, self._path, max(STEP, len(self.text)))
        self._whole = not raw
        try:
            self.text += self._decode.decode(raw, final=self._whole)
        except UnicodeDecodeError as exc:
            self.text += exc.object[: exc.start].decode("utf-8")
            line, column = self._place(len(self.text))
            raise DataError(
                f"{self._path}, line {line}: not UTF-8: the byte behind character {column - 1} of the line is "
                f"0x{exc.object[exc.start]:02x}; save the file as UTF-8"
            ) from None
        return not self._whole

    def _place(self, at: int) -> tuple[int, int]:
        """Line and character (from 1) of a place in ``text``."""
        newlines = self.text.count("\n", 0, at)
        if newlines:
            return self._line + newlines, at - self.text.rfind("\n", 0, at)
        return self._line, self._column + at

    def _broken(self, message: str, at: int) -> DataError:
        line, column = self._place(at)
        return DataError(f"{self._path}, line {line}: not JSON: {message} (character {column})")

    def next_sign(self) -> str:
        """Go on to the next character that is no blank, and return it; an error where there is none."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in BLANK:
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                raise self._broken("the array is not closed; is the file cut short?", self.at)

    def skip(self, sign: str) -> None:
        if self.next_sign() != sign:
            raise self._broken(f"Expecting {sign!r}", self.at)
        self.at += 1

    def end(self) -> None:
        """Refuse anything but blanks behind the array."""
        while True:
            rest = self.text[self.at :].lstrip(BLANK)
            if rest:
                raise self._broken("there is more behind the array", len(self.text) - len(rest))
            self.at = len(self.text)
            if not self.more():
                return

    def value(self, strict: StrictJson) -> tuple[Any, str]:
        """The value that starts here, and its text."""
        while True:
            try:
                value, end = strict.decode_from(self.text, self.at)
            except json.JSONDecodeError as exc:
                strict.fault()
                past = exc.pos - self.at
                # A value that goes on behind this stretch fails near its end, or in a string without an end.
                resumes = exc.msg.startswith("Unterminated string") or exc.pos >= len(self.text) - 12
                if resumes and len(self.text) - self.at > ROW_LIMIT:
                    limit = f"{ROW_LIMIT / 2**20:g} MiB"
                    message = f"{exc.msg}: a row of more than {limit}, or a double quote or brace that is not closed"
                    raise self._broken(message, exc.pos) from None
                if not resumes or not self.more():
                    raise self._broken(exc.msg, self.at + past) from None
            except (ValueError, RecursionError) as exc:
                line, _ = self._place(self.at)
                raise DataError(f"{self._path}, line {line}: JSON that cannot be read: {exc}") from None
            else:
                raw = self.text[self.at : end]
                self.at = end
                if len(raw) > ROW_LIMIT:
                    line, _ = self._place(self.at)
                    raise DataError(f"{self._path}, line {line}: a row of more than {ROW_LIMIT / 2**20:g} MiB")
                return value, raw
