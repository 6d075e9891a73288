"""From the bytes of one table to rows, one at a time: CSV, TSV and Parquet.

This file knows how tables are written, and what can be wrong with them. The columns that a task needs are not
known here. The values of CSV and TSV are all strings; Parquet has types.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.data.read.readers import ROW_LIMIT, Line, decoded, lines, open_file, report
from loraloom.data.rows import BadRow, OnBad, Row
from loraloom.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

#: Names of classes by number; of an object, by its keys.
Names = list[str] | dict[str, Any]

#: Rows of a Parquet file that are Python objects at once.
CHUNK = 256


def read_table(path: Path, bad: OnBad | None = None, delimiter: str = ",") -> Iterator[Row]:
    """The rows of a CSV file, or of a TSV file, which is the same with tabs.

    The first line that is not blank names the columns. A field with the delimiter, a double quote or a line break
    in it stands in double quotes, and a double quote in it is doubled. Blank lines are skipped and still counted.
    A row is known by the line on which it starts.
    """
    # The limit is one for all of Python; it is only ever raised, so that nobody's files are read differently.
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
            # What broke the record may be its first line alone: the lines behind it are read afresh.
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
    """The lines of a table, with what is wrong with those of the present record, and a way back into it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._source = lines(path)
        self._ahead: deque[Line] = deque()
        self._taken: list[Line] = []
        self._size = 0
        #: what the reader was given for the present record
        self.record: list[str] = []
        self.wrong: BadRow | None = None

    def open_record(self) -> None:
        self._taken, self.record, self.wrong, self._size = [], [], None, 0

    @property
    def start(self) -> int:
        """The line on which the present record starts."""
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
            # Its quotes still count, so that the record ends where it should.
            self.wrong = self.wrong or text
            text = text.raw.replace("\0", " ")
        text += line.end
        self._size += len(text)
        self.record.append(text)
        return text


# Parquet --------------------------------------------------------------------------------------------------


def read_parquet(path: Path, bad: OnBad | None = None) -> Iterator[Row]:
    """The rows of a Parquet file, counted from 1; whatever is wrong there is wrong with the whole file.

    Classes that ``datasets`` named when it wrote the file come as these names.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with open_file(path) as handle, pq.ParquetFile(handle) as file:
            classes = _classes_in(file.schema_arrow)
            for batch in file.iter_batches(batch_size=CHUNK):
                for fields in records(batch):
                    number += 1
                    for name, names in classes.items():
                        fields[name] = named(fields[name], names)
                    yield Row(fields, number, str(path), "row")
    except (pa.ArrowException, OSError) as exc:
        raise DataError(f"{path}: not a Parquet file that can be read: {exc}") from exc


def records(batch: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """The rows of an Arrow batch as Python values.

    Arrow gives all structs of a column the same keys and fills those that a row did not have with null; such keys are
    left out again, or every tool would seem to have the parameters of every other. A key that is null in every row was
    meant: it stays where nothing else beside it is null.
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


# Classes that datasets names ------------------------------------------------------------------------------


def _classes_in(schema: pa.Schema) -> dict[str, Names]:
    """Column → the names of its classes, as ``datasets`` writes its features into the schema."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"]
        found = {name: class_names(features.get(name)) for name in schema.names}
    except (ValueError, KeyError, TypeError, AttributeError):  # none of theirs, or none that can be read
        return {}
    return {name: names for name, names in found.items() if names}


def class_names(feature: Any) -> Names:
    """The names of the classes of a feature as JSON: a class, a list of classes, or an object with such in it."""
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
    """The names of classes; None stands for -1, by which ``datasets`` means that there is no label."""
    if isinstance(value, list):
        return [named(part, names) for part in value]
    if isinstance(names, dict):
        if not isinstance(value, dict):
            return value
        return {key: named(part, names[key]) if key in names else part for key, part in value.items()}
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None if value == -1 else value
