"""The first pass over the rows: each is read and checked, none is tokenised.

It finds the number of rows, their classes, and the bad rows. This file knows sources, shapes and labels, not tokenizers
or models. Small data are kept in memory, so that they are read once; of large data only numbers are kept, in the cache.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from loraloom.data.read.source import Source
from loraloom.data.records import Record
from loraloom.data.rows import BadRow, Row, RowError, ordered_labels, row_error
from loraloom.data.shape.labels import NUMBER, SEVERAL
from loraloom.data.shape.shapes import Shape, recognise
from loraloom.data.table import cache
from loraloom.data.task import RowTask
from loraloom.errors import DataError, nearest
from loraloom.files.log import Log, info

#: Up to so many rows, of so many bytes, stay in memory. That is tokenised in a few seconds: no cache is touched.
SMALL_ROWS, SMALL_BYTES = 5000, 16 * 2**20
#: Rows by which a shape is recognised.
LOOK = 100
#: Bad rows are kept in memory up to so many bytes.
SPOOL = 16 * 2**20

#: Of its entries in the cache; and rows after which somebody is told.
KIND, STEP = "surveys", 10_000
_NONE = np.zeros(0, "<i4")

Array = npt.NDArray[Any]
OnProgress = Callable[[str, int, int | None], None]


@dataclass
class Survey:
    """What the first pass found. Rows are numbered from 0 through all sources, bad ones left out."""

    sources: list[Source]
    #: of each source
    shapes: list[Shape]
    counts: list[int]
    #: the classes or tags in the order of their numbers; none where there are no classes
    names: list[str]
    #: what a seq-cls label is: transformers' ``problem_type``
    problem: str | None
    #: the numbers of the classes of each row, one after the other, and how many of them each row has
    label_ids: Array
    label_counts: Array
    bad: int
    hashes: dict[str, str]
    #: size and time of each file, from before it was hashed
    stamps: dict[Path, tuple[int, int]]
    #: all rows, by source, where they are few
    kept: list[list[Row]] | None
    _bad_lines: IO[bytes] | Path | None = None
    _keep: Any = None

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def read(self, skip: bool) -> Iterator[tuple[int, Row]]:
        """The rows again, with the number of their source. With ``skip``, what cannot be read is passed over."""
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
        """Raise ``DataError`` if a file is not as it was when it was hashed: what follows would go by a wrong name."""
        for path, stamp in self.stamps.items():
            if _stamp(path) != stamp:
                raise DataError(f"{path}: changed while it was read; begin again once it is whole")

    def classes(self) -> list[str] | list[list[str]] | None:
        """The names of the classes of each row, for holding out rows; None where there are no classes."""
        if not self.names:
            return None
        ids, names = self.label_ids.tolist(), self.names
        if (self.label_counts == 1).all():
            return [names[i] for i in ids]
        ends = np.cumsum(self.label_counts).tolist()
        starts = [0, *ends[:-1]] if ends else []
        return [[names[i] for i in ids[start:end]] for start, end in zip(starts, ends, strict=True)]

    def bad_lines(self) -> Iterator[bytes]:
        """A line of JSON for each bad row: file, line, reason and the row itself."""
        if isinstance(self._bad_lines, Path):
            with open(self._bad_lines, "rb") as file:
                yield from file
        elif self._bad_lines is not None:
            self._bad_lines.seek(0)
            yield from self._bad_lines


def bad_line(row: BadRow) -> bytes:
    """A bad row as a line of JSON: its place by ``line``, or by ``number`` where a file has no lines."""
    # "row" is what stands there.
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


def survey(
    sources: Sequence[Source],
    task: RowTask,
    *,
    format: str | None = None,
    columns: dict[str, str] | None = None,
    problem: str | None = None,
    skip: bool = False,
    known: Survey | None = None,
    log: Log = info,
    watch: OnProgress = lambda what, done, total: None,
) -> Survey:
    """Read and check all rows of ``sources``.

    Args:
        problem: what the labels of seq-cls are, where it is not to be recognised.
        skip: a bad row is noted and left out, instead of raised.
        known: the rows of training, where these are for validation: their classes are those, and the others bad.
        say: told what the user should know.
        watch: told now and then what is done, how many rows of it, and of how many.

    Raises:
        DataError: a source that cannot be read, a bad row, a label never seen in training, classes too few to tell
            apart.
    """
    on_bad = _pass_over if skip else None
    problem = known.problem if known else problem
    shapes = [recognise(source.first(LOOK, on_bad), task, format, columns, problem, skip) for source in sources]
    _check_alike(sources, shapes)
    # What was found of the first rows holds for those of the other sources, and for those of validation.
    whole, multi_hot = all(shape.whole for shape in shapes), shapes[0].multi_hot
    if known is not None:
        whole, multi_hot = known.shapes[0].whole, known.shapes[0].multi_hot
    shapes = [replace(shape, whole=whole, multi_hot=multi_hot) for shape in shapes]
    stamps = {path: _stamp(path) for source in sources for path in source.files}
    hashes = {name: value for source in sources for name, value in source.hashes().items()}
    made = Survey(list(sources), shapes, [], [], None, _NONE, _NONE, 0, hashes, stamps, None)
    key = cache.key_of(
        {
            "code": cache.code_hash(),
            "files": list(hashes.items()),
            "text": [source.text_by for source in sources],
            "shapes": [shape.plain() | {"task": task.name} for shape in shapes],
            "skip": skip,
            "known": known and known.names,
        }
    )
    found = cache.find(KIND, key)
    if found is not None:
        return _opened(made, found)
    tally = _Tally(task, shapes[0].problem_type, known)
    with_bad = tempfile.SpooledTemporaryFile(SPOOL)  # noqa: SIM115 - the survey keeps it
    kept: list[list[Row]] | None = [[] for _ in sources]
    if sum(size for size, _ in stamps.values()) > SMALL_BYTES:
        kept = None

    def note(row: BadRow) -> None:
        made.bad += 1
        with_bad.write(bad_line(row))

    total = 0
    for number, (source, shape) in enumerate(zip(sources, shapes, strict=True)):
        before, first = total, ""
        for row in source.read(note if skip else None):
            try:
                tally.add(row, shape.read(row), skip)
            except RowError as error:
                if not skip:
                    raise
                note(error.bad)
                first = first or str(error)
                continue
            total += 1
            if kept is not None:
                kept[number].append(row)
                if total > SMALL_ROWS:
                    kept = None
            if total % STEP == 0:
                watch("rows read", total, None)
        made.counts.append(total - before)
        if total == before:
            raise DataError(f"{source.name}: no row is left; the first bad one is {first}")
    made.check_unchanged()
    tally.finish(made, ", ".join(source.name for source in sources))
    made.kept, made._bad_lines = kept, with_bad
    if kept is None:
        entry = cache.entry(KIND, key, lambda draft: _write(made, draft), log)
        with_bad.close()
        return _opened(made, entry)
    return made


def _check_alike(sources: Sequence[Source], shapes: Sequence[Shape]) -> None:
    for source, shape in zip(sources, shapes, strict=True):
        if shape.problem_type != shapes[0].problem_type:
            raise DataError(
                f"{source.name}: its labels are those of {shape.problem_type}, and those of {sources[0].name} of "
                f"{shapes[0].problem_type}; say with problem_type what they are"
            )
        if shape.multi_hot != shapes[0].multi_hot:
            raise DataError(
                f"{source.name}: its labels are {_lists(shape)}, and those of {sources[0].name} {_lists(shapes[0])}; "
                "write them in one way"
            )


def _lists(shape: Shape) -> str:
    return f"multi-hot lists of {shape.multi_hot} classes" if shape.multi_hot else "lists of the classes' names"


def _write(made: Survey, draft: cache.Draft) -> dict[str, Any]:
    draft.file("label_ids.bin").write(made.label_ids.tobytes())
    draft.file("label_counts.bin").write(made.label_counts.tobytes())
    lines = draft.file("bad.jsonl")
    for line in made.bad_lines():
        lines.write(line)
    return {"counts": made.counts, "names": made.names, "problem": made.problem, "bad": made.bad}


def _opened(made: Survey, entry: cache.Entry) -> Survey:
    info = entry.info
    made.counts, made.names, made.problem, made.bad = info["counts"], info["names"], info["problem"], info["bad"]
    made.label_ids = np.fromfile(entry.folder / "label_ids.bin", "<i4")
    made.label_counts = np.fromfile(entry.folder / "label_counts.bin", "<i4")
    made._bad_lines, made._keep = entry.folder / "bad.jsonl", entry
    return made


class _Tally:
    """The classes of the rows, as they come."""

    def __init__(self, task: RowTask, problem: str | None, known: Survey | None) -> None:
        self.task, self.problem, self.known = task, problem, known
        self.has_classes = bool(task.class_word) and problem != NUMBER
        self.numbers: dict[str, int] = {name: i for i, name in enumerate(known.names)} if known else {}
        self.ids, self.counts = array("i"), array("i")

    def add(self, row: Row, record: Record, skip: bool) -> None:
        if not self.has_classes:
            return
        names = dict.fromkeys(self.task.class_names(record))
        if self.known is not None:
            self._check(row, names, skip)
            return
        self.ids.extend([self.numbers.setdefault(name, len(self.numbers)) for name in names])
        self.counts.append(len(names))

    def _check(self, row: Row, names: Iterable[str], skip: bool) -> None:
        """A class that training does not have. Where bad rows are skipped, the encoder finds it again and notes it."""
        for name in names:
            if name not in self.numbers and not skip:
                what = self.task.class_word
                raise row_error(
                    row,
                    f"the {what} {name!r} is never seen in training, which has {len(self.numbers)} {what}s"
                    f"{nearest(name, self.numbers)}",
                )

    def finish(self, made: Survey, source: str) -> None:
        """Number the classes in their order.

        Raises:
            DataError: there are too few to tell apart.
        """
        made.problem = self.problem
        if self.known is not None:
            made.names = self.known.names
            return
        if not self.has_classes:
            return
        made.names = ordered_labels(self.numbers)
        if len(made.names) < (1 if made.problem == SEVERAL else 2):
            only = made.names[0] if made.names else "none"
            raise DataError(f"{source}: {self.task.one_class.format(rows=made.rows, only=repr(only))}")
        places = {name: place for place, name in enumerate(made.names)}
        order = np.array([places[name] for name in self.numbers], "<i4")  # a dict keeps the order of first sight
        made.label_ids = order[np.frombuffer(self.ids, np.intc)] if self.ids else _NONE
        made.label_counts = np.array(self.counts, "<i4")


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def _pass_over(row: BadRow) -> None:
    pass
