"""From a table to rows, one at a time: CSV, TSV and Parquet.

This file knows the formats of tables and their errors, not the columns that a task needs. All values of CSV and TSV are
strings; Parquet has types.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.data.read.readers import ROW_LIMIT, Line, decoded, lines, open_file, report
from loraloom.data.rows import BadRow, OnBad, Row
from loraloom.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

#: Names of classes by number; for an object, by its keys.
Names = list[str] | dict[str, Any]

#: Rows of a Parquet file that are Python objects at once.
CHUNK = 256


def read_table(path: Path, bad: OnBad | None = None, delimiter: str = ",") -> Iterator[Row]:
    """The rows of a CSV file, or of a TSV file with tabs as delimiters.

    The first line that is not blank is the header. A field that contains the delimiter, a double quote or a line break
    is enclosed in double quotes, and its double quotes are doubled. Blank lines are skipped but counted. The line of a
    row is its first one.
    """
    # A limit of the whole process: it is only raised, so that other code still reads its files.
    csv.field_size_limit(max(csv.field_size_limit(), ROW_LIMIT))
    text = _Lines(path)
    kind = "CSV" if delimiter == "," else "TSV"
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        text.open_record()
        reason = ""
        cells: list[str] = []
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as exc:
            why = "is a double quote not closed?"
            if "new-line character" in str(exc):
                exc, why = csv.Error("a carriage return (CR) in a field"), "are the line ends of one kind?"
            reason = f"not {kind}: {exc}; {why}"
        wrong = text.wrong
        if not reason and wrong is None:
            if len(cells) <= 1 and not "".join(cells).strip():
                continue
            if header is None:
                header = _header(cells, path, text.start, delimiter)
                continue
            if len(cells) == len(header):
                yield Row(dict(zip(header, cells, strict=True)), text.start, str(path))
                continue
            reason = (
                f"{len(cells)} fields, where the header has {len(header)}; a field with a "
                f"{'comma' if kind == 'CSV' else 'tab'}, a quote or a line break in it must stand in double quotes"
            )
        row = wrong or BadRow(str(path), text.start, reason, raw="".join(text.record))
        report(None if header is None else bad, row)
        if wrong is None and not cells:
            # The error may be in the first line only: the lines after it are read again.
            text.back_to_second_line()


def _header(cells: list[str], path: Path, line: int, delimiter: str) -> list[str]:
    twice = sorted({name for name in cells if cells.count(name) > 1})
    if twice:
        raise DataError(f"{path}, line {line}: the column {twice[0]!r} is there twice")
    others = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
    found = [name for sign, name in others.items() if sign != delimiter and cells[0].count(sign)]
    if len(cells) == 1 and found:
        raise DataError(
            f"{path}, line {line}: one column, {cells[0]!r}: its fields are parted by a {found[0]}, where "
            f"{'.csv has commas' if delimiter == ',' else '.tsv has tabs'}"
        )
    return cells


class _Lines:
    """The lines of a table, with the first error in those of the current record. Lines can be read again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._source = lines(path)
        self._ahead: deque[Line] = deque()
        self._taken: list[Line] = []
        self._size = 0
        #: the lines of the current record
        self.record: list[str] = []
        self.wrong: BadRow | None = None

    def open_record(self) -> None:
        self._taken, self.record, self.wrong, self._size = [], [], None, 0

    @property
    def start(self) -> int:
        """The first line of the current record."""
        return self._taken[0].number if self._taken else 1

    def back_to_second_line(self) -> None:
        self._ahead.extendleft(reversed(self._taken[1:]))

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._size > ROW_LIMIT:
            raise csv.Error(f"a row of more than {ROW_LIMIT / 2**20:g} MiB")
        line = self._ahead.popleft() if self._ahead else next(self._source)
        self._taken.append(line)
        text = decoded(line, self._path)
        if isinstance(text, BadRow):
            # Its quotes still count, so that the end of the record is found.
            self.wrong = self.wrong or text
            text = text.raw.replace("\0", " ")
        text += line.end
        self._size += len(text)
        self.record.append(text)
        return text


# Parquet --------------------------------------------------------------------------------------------------


def read_parquet(path: Path, bad: OnBad | None = None) -> Iterator[Row]:
    """The rows of a Parquet file, numbered from 1. Any error concerns the whole file.

    Classes that ``datasets`` named in the file are read as their names.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_file(path) as handle, pq.ParquetFile(handle) as file:
            yield from arrow_rows(file.iter_batches(batch_size=CHUNK), _classes_in(file.schema_arrow), str(path))
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"{path}: not a Parquet file that can be read: {exc}") from exc


def arrow_rows(batches: Iterable[pa.RecordBatch | pa.Table], classes: dict[str, Names], name: str) -> Iterator[Row]:
    """The rows of Arrow batches, numbered from 1. ``classes``: column → names for its numbers."""
    for number, fields in enumerate(chain.from_iterable(map(_records, batches)), start=1):
        fields |= {column: named(fields[column], names) for column, names in classes.items()}
        yield Row(fields, number, name, "row")


def _records(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """The rows of an Arrow batch as Python values.

    Arrow gives all structs of a column the same keys, with null for those that a row did not have. Such keys are
    removed, otherwise every tool would have the parameters of all others. A key that is null in every row is kept if no
    other key of its struct is null.
    """
    import pyarrow as pa

    nested = [field for field in batch.schema if pa.types.is_nested(field.type)]
    rows: list[dict[str, Any]] = batch.to_pylist()
    for field in nested:
        for row in rows:
            row[field.name] = _without_nulls(row[field.name], field.type)
    return rows


def _without_nulls(value: Any, kind: pa.DataType) -> Any:
    import pyarrow as pa

    if isinstance(value, dict) and pa.types.is_struct(kind):
        empty = {key for key, part in value.items() if part is None}
        if all(pa.types.is_null(kind.field(key).type) for key in empty):
            empty = set()
        return {key: _without_nulls(part, kind.field(key).type) for key, part in value.items() if key not in empty}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_without_nulls(part, kind.value_type) for part in value]
    return value


# Names of classes, as datasets stores them ---------------------------------------------------------------


def _classes_in(schema: pa.Schema) -> dict[str, Names]:
    """Column → the names of its classes, which ``datasets`` writes into the schema."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"]
        found = {name: class_names(features.get(name)) for name in schema.names}
    except (ValueError, KeyError, TypeError, AttributeError):  # not written by datasets, or not readable
        return {}
    return {name: names for name, names in found.items() if names}


def class_names(feature: Any) -> Names:
    """The names of classes in a feature as JSON: a class, a list of classes, or an object with classes."""
    if isinstance(feature, list):
        return class_names(feature[0]) if feature else []
    if not isinstance(feature, dict):
        return []
    if isinstance(feature.get("_type"), str):
        if feature["_type"] == "ClassLabel":
            return [str(name) for name in feature.get("names") or ()]
        return class_names(feature.get("feature"))
    inside = {key: class_names(part) for key, part in feature.items()}
    return {key: names for key, names in inside.items() if names}


def named(value: Any, names: Names) -> Any:
    """The names of classes for their numbers; None for -1, which means no label in ``datasets``."""
    if isinstance(value, list):
        return [named(part, names) for part in value]
    if isinstance(names, dict):
        if not isinstance(value, dict):
            return value
        return {key: named(part, names[key]) if key in names else part for key, part in value.items()}
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None if value == -1 else value
