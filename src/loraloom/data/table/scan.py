"""The first pass over the rows: all are read and checked, none is tokenised.

It finds the number of rows, their classes, duplicates, and bad rows. This file knows sources, shapes and labels, not
tokenizers or models. Small data stay in memory, so that they are read once; of large data only numbers are kept, in the
cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loraloom.data.read.source import Source
from loraloom.data.records import Chat, Record, inputs
from loraloom.data.rows import BadRow, Row, RowError, ordered_labels, row_error, unseen
from loraloom.data.shape.fields import ABSENT, lookup
from loraloom.data.shape.labels import NUMBER, SEVERAL
from loraloom.data.shape.shapes import GROUP, Shape, recognise
from loraloom.data.table import cache
from loraloom.data.task import RowTask
from loraloom.errors import DataError
from loraloom.files.log import Log, info

#: Maximum rows and bytes of data that stay in memory. They are tokenised in a few seconds, without the cache.
SMALL_ROWS, SMALL_BYTES = 5000, 16 * 2**20
#: Number of rows that decide the shape.
LOOK = 100

#: The kind of its entries in the cache; and rows between two calls of ``on_progress``.
KIND, STEP = "surveys", 10_000
BAD = "bad.jsonl"
#: ``label_ids``: the numbers of the classes of each row, one row after the other; ``label_counts``: how many classes
#: each row has; ``digests``: a hash of what the model reads of each row; ``groups``: of its group, 0 without a group.
ARRAYS = {"label_ids": "<i4", "label_counts": "<i4", "digests": "<u8", "groups": "<u8"}

Array = npt.NDArray[Any]
OnProgress = Callable[[str, int, int | None], None]


def silent(what: str, done: int, total: int | None) -> None:
    """An ``on_progress`` that does nothing."""


@dataclass
class Scan:
    """The results of the first pass. Rows are numbered from 0 through all sources, without bad rows."""

    sources: list[Source]
    #: of each source
    shapes: list[Shape]
    hashes: dict[str, str]
    #: size and time of each file, from before it was hashed
    stamps: dict[Path, tuple[int, int]]
    #: of each source
    counts: list[int] = field(default_factory=list)
    #: the classes or tags in the order of their numbers; empty for tasks without classes
    names: list[str] = field(default_factory=list)
    #: the kind of seq-cls labels: transformers' ``problem_type``
    problem: str | None = None
    #: whether some rows are conversations
    chats: bool = False
    bad: int = 0
    #: all rows of each source, if there are few
    kept: list[list[Row]] | None = None
    #: ``ARRAYS``, and a line of JSON for each bad row: file, line, reason and the row itself
    store: cache.Entry | cache.Memory = field(default_factory=cache.Memory)

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def array(self, name: str) -> Array:
        """One of ``ARRAYS``."""
        return self.store.array(f"{name}.bin", ARRAYS[name])

    def bad_lines(self) -> Iterator[bytes]:
        return self.store.lines(BAD)

    @property
    def described(self) -> list[str]:
        """Each source and its shape in a few words."""
        return [f"{one.describe()}: {shape.describe()}" for one, shape in zip(self.sources, self.shapes, strict=True)]

    def origin(self, task: RowTask, skip: bool) -> dict[str, Any]:
        """Plain values that identify the rows and the code that reads them: the first part of every cache key."""
        return {
            "code": cache.code_hash(),
            "files": list(self.hashes.items()),
            "text": [source.text_by for source in self.sources],
            "shapes": [shape.plain() | {"task": task.name} for shape in self.shapes],
            "skip": skip,
        }

    def read(self, skip: bool) -> Iterator[tuple[int, Row]]:
        """The rows again, with the number of their source. ``skip``: rows that cannot be read are skipped."""
        if self.kept is not None:
            yield from ((number, row) for number, rows in enumerate(self.kept) for row in rows)
            return
        for number, source in enumerate(self.sources):
            yield from ((number, row) for row in source.read(_pass_over if skip else None))

    def good(self, skip: bool) -> Iterator[Row]:
        """The rows again, in the order of their numbers."""
        for number, row in self.read(skip):
            if skip and self.kept is None:
                try:
                    self.shapes[number].read(row)
                except RowError:
                    continue
            yield row

    def record(self, number: int, row: Row) -> Record:
        """The record of row ``number``."""
        return self.shapes[int(np.searchsorted(np.cumsum(self.counts), number, "right"))].read(row)

    def check_unchanged(self) -> None:
        """Raise ``DataError`` if a file has changed since it was hashed: cache entries would get a wrong key."""
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise DataError(f"{path}: changed while it was read; begin again once it is whole")

    def classes(self) -> list[list[str]] | None:
        """The names of the classes of each row, for holding out rows; None without classes."""
        if not self.names:
            return None
        ids, counts = self.array("label_ids").tolist(), self.array("label_counts")
        spans = zip((np.cumsum(counts) - counts).tolist(), counts.tolist(), strict=True)
        return [[self.names[i] for i in ids[start : start + count]] for start, count in spans]


def scan(
    sources: Sequence[Source],
    task: RowTask,
    *,
    format: str | None = None,
    columns: dict[str, str] | None = None,
    problem: str | None = None,
    skip: bool = False,
    known: Scan | None = None,
    log: Log = info,
    on_progress: OnProgress = silent,
) -> Scan:
    """Read and check all rows of ``sources``.

    Args:
        problem: the kind of seq-cls labels; by default it is recognised.
        skip: bad rows are recorded and skipped instead of raised.
        known: the rows of training, if these are for evaluation: rows with other classes are bad.
        log: called with messages for the user.
        on_progress: called repeatedly with the activity, the number of rows done, and their total if known.

    Raises:
        DataError: a source cannot be read, a row is bad, a label is not in training, or there are too few classes.
    """
    problem, on_bad = known.problem if known else problem, _pass_over if skip else None
    shapes = [recognise(source.first(LOOK, on_bad), task, format, columns, problem, skip) for source in sources]
    stamps = {path: _stamp(path) for source in sources for path in source.files}
    hashes = {name: value for source in sources for name, value in source.hashes().items()}
    made = Scan(list(sources), _agreed(sources, shapes, known), hashes, stamps)
    key = cache.key_of(made.origin(task, skip) | {"known": known and known.names})
    store: cache.Entry | cache.Memory | None = cache.find(KIND, key)
    if store is None:
        store = memory = _read(made, _Tally(task, shapes[0].problem_type, known), skip, on_progress)
        if made.kept is None:
            store = cache.entry(KIND, key, memory.copy_to, log)
    return replace(made, **store.info, store=store)


def _agreed(sources: Sequence[Source], shapes: list[Shape], known: Scan | None) -> list[Shape]:
    """The shapes of all sources, with the kind of labels that the first rows of training have.

    Raises:
        DataError: they differ in a way that gives their labels different meanings.
    """
    first, where = (known.shapes[0], known.sources[0].name) if known else (shapes[0], sources[0].name)
    for source, shape in zip(sources, shapes, strict=True):
        if shape.form.problem and shape.name != first.name:
            raise DataError(
                f"{source.name}: its rows are of the shape {shape.name}, and those of {where} of {first.name}; give "
                "rows of one shape (format chooses one that fits all)"
            )
        if shape.problem_type != shapes[0].problem_type:
            raise DataError(
                f"{source.name}: its labels are those of {shape.problem_type}, and those of {sources[0].name} of "
                f"{shapes[0].problem_type}; say with problem_type what they are"
            )
        if shape.labels.multi_hot != shapes[0].labels.multi_hot:
            raise DataError(
                f"{source.name}: its labels are {_lists(shape)}, and those of {sources[0].name} {_lists(shapes[0])}; "
                "write them in one way"
            )
    whole = first.labels.whole if known else all(shape.labels.whole for shape in shapes)
    return [
        replace(shape, labels=replace(shape.labels, whole=whole, multi_hot=first.labels.multi_hot)) for shape in shapes
    ]


def _lists(shape: Shape) -> str:
    classes = shape.labels.multi_hot
    return f"multi-hot lists of {classes} classes" if classes else "lists of the classes' names"


def _read(made: Scan, tally: _Tally, skip: bool, on_progress: OnProgress) -> cache.Memory:
    """Read all rows. The result has the arrays, the bad rows and, as ``info``, the other fields of the scan."""
    memory, bad = cache.Memory(), 0
    bad_rows = memory.file(BAD)
    few = sum(size for size, _ in made.stamps.values()) <= SMALL_BYTES
    made.kept = [[] for _ in made.sources] if few else None

    def note(row: BadRow) -> None:
        nonlocal bad
        bad += 1
        bad_rows.write(bad_line(row))

    for number, (source, shape) in enumerate(zip(made.sources, made.shapes, strict=True)):
        made.counts.append(0)
        before, first = made.rows, ""
        for row in source.read(note if skip else None):
            try:
                tally.add(row, shape, skip)
            except RowError as error:
                if not skip:
                    raise
                note(error.bad)
                first = first or str(error)
                continue
            made.counts[-1] += 1
            total = before + made.counts[-1]
            if total > SMALL_ROWS:
                made.kept = None
            elif made.kept is not None:
                made.kept[number].append(row)
            if total % STEP == 0:
                on_progress("rows read", total, None)
        if not made.counts[-1]:
            raise DataError(f"{source.name}: no row is left; the first bad one is {first}")
    made.check_unchanged()
    memory.info = {"counts": made.counts, "bad": bad, **tally.finish(made, memory)}
    return memory


def bad_line(row: BadRow) -> bytes:
    """A bad row as a line of JSON: its position as ``line``, or as ``number`` for a file without lines."""
    fields = {
        "line" if row.unit == "line" else "number": row.line,
        "file": row.file,
        "reason": row.reason,
        "row": row.raw,
    }
    if row.column is not None:
        fields["column"] = row.column
    if row.field:
        fields["field"] = row.field
    return json.dumps(fields, sort_keys=True).encode() + b"\n"


class _Tally:
    """Collects the classes, digests and groups of rows."""

    def __init__(self, task: RowTask, problem: str | None, known: Scan | None) -> None:
        self.task, self.problem, self.known = task, problem, known
        self.has_classes = bool(task.class_word) and problem != NUMBER
        self.numbers: dict[str, int] = {name: i for i, name in enumerate(known.names)} if known else {}
        self.arrays = {name: array("Q" if dtype == "<u8" else "i") for name, dtype in ARRAYS.items()}
        self.chats = False

    def add(self, row: Row, shape: Shape, skip: bool) -> None:
        record = shape.read(row)
        if self.has_classes:
            self._add_classes(row, list(dict.fromkeys(self.task.class_names(record))), skip)
        self.chats = self.chats or isinstance(record, Chat)
        self.arrays["digests"].append(_digest(inputs(record)))
        group = lookup(row, shape.columns[GROUP]) if GROUP in shape.columns else None
        self.arrays["groups"].append(0 if group in (None, ABSENT) else _digest(str(group)))

    def _add_classes(self, row: Row, names: list[str], skip: bool) -> None:
        """Record the classes of a row. With ``skip``, the encoder finds classes that are not in training."""
        if self.known is None:
            self.arrays["label_ids"].extend([self.numbers.setdefault(name, len(self.numbers)) for name in names])
            self.arrays["label_counts"].append(len(names))
        elif new := [name for name in names if name not in self.numbers and not skip]:
            raise row_error(row, unseen(self.task.class_word, new[0], self.numbers))

    def finish(self, made: Scan, memory: cache.Memory) -> dict[str, Any]:
        """Number the classes in their order and write the arrays. Returns fields of the scan.

        Raises:
            DataError: there are too few classes to tell apart.
        """
        names = self.known.names if self.known else ordered_labels(self.numbers)
        arrays = {name: np.array(values, ARRAYS[name]) for name, values in self.arrays.items()}
        if self.has_classes and self.known is None:
            if len(names) < (1 if self.problem == SEVERAL else 2):
                only = repr(names[0] if names else "none")
                sources = ", ".join(source.name for source in made.sources)
                raise DataError(f"{sources}: {self.task.one_class.format(rows=made.rows, only=only)}")
            places = {name: place for place, name in enumerate(names)}
            order = np.array([places[name] for name in self.numbers], "<i4")  # in the order of first occurrence
            arrays["label_ids"] = order[arrays["label_ids"]]
        for name, values in arrays.items():
            memory.file(f"{name}.bin").write(values.tobytes())
        return {"names": names, "problem": self.problem, "chats": self.chats}


def _digest(value: Any) -> int:
    """A hash of a plain value, above 0."""
    text = repr(value).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def _pass_over(row: BadRow) -> None:
    pass
