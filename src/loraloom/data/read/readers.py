"""From the bytes of one file to lines and values, one at a time, and plain text to rows.

This file knows encodings, lines and JSON, and what can be wrong with them. ``jsonfiles`` and ``tables`` make rows of
them; columns and tasks are not known here. However large a file is, no more than one row is in memory, and
no row is larger than ``ROW_LIMIT``.
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

from loraloom.data.rows import BadRow, OnBad, Row, RowError, Unit
from loraloom.errors import DataError, nearest

#: The largest row that is read, in bytes: some four million tokens, more than any model takes.
ROW_LIMIT = 16 * 2**20

#: Characters kept of a row that is too large to show whole.
SHOWN = 1000

#: What a file starts with that is not text, and what it then is.
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
    """One line of a file: its number (from 1), its bytes, its end, and whether it went over the limit."""

    number: int
    raw: bytes
    end: str
    cut: bool


def report(bad: OnBad | None, row: BadRow) -> None:
    """Tell of a bad row where someone listens, raise it where nobody does."""
    if bad is None:
        raise RowError(row)
    bad(row)


def open_file(path: Path, unpack: bool = True) -> BinaryIO:
    """The file, open for reading bytes (unpacked, where its name ends in .gz and ``unpack`` is set)."""
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
    """Refuse what is no UTF-8 text by its first bytes."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8")
    for sign, what in SIGNS.items():
        if start.startswith(sign):
            raise DataError(f"{path}: the file is not text; it is {what}")
    if b"\0" in start[:4] and len(start) > 1:
        raise DataError(f"{path}: zero bytes at its start: the file is UTF-16 or not text at all; save it as UTF-8")


def lines(path: Path, limit: int | None = None) -> Iterator[Line]:
    """The lines of a file, ended by LF or CRLF, or all by CR, without a byte order mark at its start.

    A line longer than ``limit`` bytes (``ROW_LIMIT`` by default) is cut after ``SHOWN`` of them and marked so.
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
    """The line as text, or what is wrong with it: too long, not UTF-8, or with zero bytes in it."""
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
    """The bad row that is larger than ``ROW_LIMIT``, of which only the start is kept."""
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
    """Rows with the one column ``text``, of a plain text file.

    A row is a paragraph: the lines between blank lines, joined by LF, as they stand. With ``by="line"`` it is
    each line that is not blank, with ``by="file"`` the whole file. A row is known by its first line.
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
