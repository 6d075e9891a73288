"""From the bytes of a file to lines and JSON values, one at a time, and from plain text to rows.

This file knows encodings, lines and JSON, and their errors. ``jsonfiles`` and ``tables`` make rows of them. It does not
know columns or tasks. One row is in memory at a time, and none is larger than ``ROW_LIMIT``.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from loraloom.data.rows import BadRow, OnBad, Row, RowError, Unit, shown
from loraloom.errors import DataError, nearest

#: Maximum bytes of a row: about four million tokens, more than any model takes.
ROW_LIMIT = 16 * 2**20

#: Characters kept of a row that is too large.
SHOWN = 1000

#: First bytes of files that are not text → what they are.
SIGNS = {
    b"PAR1": "Parquet: name it .parquet",
    b"\x1f\x8b": "compressed with gzip: name it .gz as well, or unpack it",
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"BZh": "compressed with bzip2: unpack it",
    b"\xfd7zXZ": "compressed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"ARROW1": "Arrow: save it as Parquet, or name the folder that save_to_disk wrote",
    b"%PDF": "a PDF: take the text out of it first",
}


class Line(NamedTuple):
    """One line of a file: its number (from 1), its bytes, its line end, and whether it was cut at the limit."""

    number: int
    raw: bytes
    end: str
    cut: bool


def report(bad: OnBad | None, row: BadRow) -> None:
    """Pass a bad row to ``bad``, or raise it if that is None."""
    if bad is None:
        raise RowError(row)
    bad(row)


def open_file(path: Path, unpack: bool = True) -> BinaryIO:
    """The file, open for reading bytes; ``unpack``: decompressed if its name ends in .gz."""
    try:
        # Not Path.is_dir(): it raises for a name that the system cannot hold.
        if os.path.isdir(path):
            raise DataError(f"{path}: a directory, where a data file is needed")
        if unpack and path.suffix.lower() == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        return open(path, "rb")
    except FileNotFoundError:
        siblings = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
        raise DataError(f"{path}: no such file{nearest(path.name, siblings)}") from None
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from exc


def guarded(file: BinaryIO, path: Path, size: int, line: bool = False) -> bytes:
    """``file.read(size)`` or ``file.readline(size)``; errors name the file."""
    try:
        return file.readline(size) if line else file.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise DataError(f"{path}: the gzip file is damaged or cut short: {exc}") from exc
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def checked_start(start: bytes, path: Path) -> None:
    """Raise ``DataError`` if the first bytes of a file are not those of UTF-8 text."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8")
    for sign, what in SIGNS.items():
        if start.startswith(sign):
            raise DataError(f"{path}: the file is not text; it is {what}")
    if b"\0" in start[:4] and len(start) > 1:
        raise DataError(f"{path}: zero bytes at its start: the file is UTF-16 or not text at all; save it as UTF-8")


def lines(path: Path, limit: int | None = None) -> Iterator[Line]:
    """The lines of a file, without a byte order mark. Lines end in LF or CRLF, or all in CR.

    A line of more than ``limit`` bytes (by default ``ROW_LIMIT``) is cut after ``SHOWN`` bytes and marked as cut.
    """
    limit = ROW_LIMIT if limit is None else limit
    number = 0
    only_cr = _ends_in_cr(path)
    with open_file(path) as opened:
        file = cast(BinaryIO, _CrLines(opened, "latin-1", newline="\r")) if only_cr else opened
        while raw := guarded(file, path, limit + 1, line=True):
            number += 1
            if number == 1:
                checked_start(raw[:16], path)
                raw = raw.removeprefix(codecs.BOM_UTF8)
            cut = len(raw) > limit
            if cut:
                rest = raw
                while rest and not rest.endswith(b"\n"):
                    rest = guarded(file, path, limit, line=True)
                raw = raw[:SHOWN]
            end = "\r\n" if raw.endswith(b"\r\n") else "\n" if raw.endswith(b"\n") else ""
            yield Line(number, raw[: len(raw) - len(end)], end, cut)


def _ends_in_cr(path: Path) -> bool:
    """Whether the lines of a file end in CR, as those of old Macs and some spreadsheets do."""
    with open_file(path) as file:
        start = guarded(file, path, 2**16)
    return b"\r" in start[:-1] and b"\n" not in start


class _CrLines(io.TextIOWrapper):
    """Bytes with LF for CR, by way of an encoding with one character for each byte."""

    def readline(self, size: int = -1) -> bytes:  # type: ignore[override]
        return super().readline(size).encode("latin-1").replace(b"\r", b"\n")


def decoded(line: Line, path: Path) -> str | BadRow:
    """The line as text, or as a bad row: too long, not UTF-8, or with zero bytes."""
    number, raw, _, cut = line
    if cut:
        return too_large(path, number, raw.decode("utf-8", "replace"))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        reason = f"not UTF-8: byte {exc.start + 1} of the line is 0x{raw[exc.start]:02x}; save the file as UTF-8"
        shown_text = raw.decode("utf-8", "backslashreplace")
        column = len(raw[: exc.start].decode("utf-8")) + 1
        return BadRow(str(path), number, reason, column, raw=shown_text)
    if "\0" in text:
        column = text.index("\0") + 1
        reason = f"a zero byte (character {column}): the file is UTF-16, damaged, or not text"
        return BadRow(str(path), number, reason, column, raw=text)
    return text


def too_large(path: Path, number: int, start: str, unit: Unit = "line") -> BadRow:
    """The bad row for a row above ``ROW_LIMIT``. Only its start is kept."""
    limit = f"{ROW_LIMIT / 2**20:g} MiB"
    return BadRow(str(path), number, f"a row of more than {limit}; cut it into several rows", raw=start, unit=unit)


# JSON -----------------------------------------------------------------------------------------------------


class StrictJson(json.JSONDecoder):
    """JSON objects as the standard defines them: no key twice, no NaN or Infinity.

    Such a fault is noted and not raised, so that the end of the value is still found: call ``fault`` after each value.
    """

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant, parse_int=LongNumber.read)
        self._fault = ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self._fault = self._fault or f"the key {twice!r} is there twice in one object"
        return fields

    def _constant(self, name: str) -> None:
        self._fault = self._fault or f"{name} is not JSON; a number that is missing is null"

    def fault(self) -> str:
        """The first fault since the last call, or the empty string."""
        fault, self._fault = self._fault, ""
        return fault

    def wrong(self, value: Any, needed: str) -> str:
        """The fault of a value that was decoded, or ``needed`` if it is no object; the empty string for a row."""
        return self.fault() or ("" if isinstance(value, dict) else f"{needed}, found {shown(value)}")


class LongNumber:
    """A whole number of more digits than Python reads. It is no error in a column that is not read."""

    def __init__(self, digits: int) -> None:
        self.digits = digits

    def __repr__(self) -> str:
        return f"of {self.digits:,} digits"

    @classmethod
    def read(cls, text: str) -> int | LongNumber:
        try:
            return int(text)
        except ValueError:
            return cls(len(text.removeprefix("-")))


# Plain text -----------------------------------------------------------------------------------------------


def read_text(path: Path, bad: OnBad | None = None, by: str = "paragraph") -> Iterator[Row]:
    """Rows of a plain text file, with the one column ``text``.

    A row is a paragraph: the lines between blank lines, unchanged, joined by LF. With ``by="line"`` a row is a line
    that is not blank, with ``by="file"`` the whole file. The line of a row is its first one.
    """
    parts: list[str] = []
    start, size = 1, 0
    wrong: BadRow | None = None
    for line in chain(lines(path), [None]):
        text = "" if line is None else decoded(line, path)
        blank = isinstance(text, str) and not text.strip()
        ends = line is None or (by == "line" or (by == "paragraph" and blank))
        if not blank or (parts and not ends):
            if not parts:
                start = line.number if line else start
            if isinstance(text, BadRow):
                wrong, text = wrong or text, text.raw
            size += len(text) + 1
            if size > ROW_LIMIT:
                wrong = wrong or too_large(path, start, "")
                text = ""
            parts.append(text[:SHOWN] if wrong else text)
        if ends and parts:
            whole = "\n".join(parts)
            if wrong is None:
                yield Row({"text": whole.rstrip("\n")}, start, str(path))
            else:
                report(bad, replace(wrong, raw=whole[:ROW_LIMIT]))
            parts, size, wrong = [], 0, None
