"""Examples as flat arrays, on disk or in memory: written sequentially, read at any position.

This file knows ids, labels and the offsets of examples, not texts, tokenizers or tasks. A million examples are a few
memory-mapped files; an ``Example`` is created on access. Small data are the same arrays in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from loraloom.data.example import Example
from loraloom.data.rows import Row, Unit
from loraloom.data.table.cache import Draft, Entry, Memory

Array = npt.NDArray[Any]

#: Flags of a row: over length; a token spans trained and other text; no trained token; the chat template omits a part.
OVERLONG, MERGED, UNTRAINED, LEFT_OUT = 1, 2, 4, 8

#: Arrays with one number for each token, example or row. Little-endian whatever the machine is.
DTYPES: dict[str, str] = {
    "ids": "<i4",
    "types": "|u1",
    "labels": "<i4",
    "lengths": "<i4",
    "label_lengths": "<i4",
    "example_rows": "<i4",
    "digests": "<u8",
    "row_flags": "|u1",
    "row_files": "<i4",
    "row_lines": "<i8",
}
#: ``labels`` of an example: a whole number, a number, or a list of them.
KINDS = {"class": "<i4", "number": "<f8", "classes": "<i4", "numbers": "<f8"}
SINGLE, LISTS = ("class", "number"), ("classes", "numbers")


@dataclass
class Packed:
    """Some rows and their examples, as arrays. ``example_rows`` are relative to the first of these rows."""

    columns: dict[str, Array]
    kind: str
    #: the files that ``row_files`` refers to, each with its unit of position
    files: list[tuple[str, Unit]]

    @property
    def rows(self) -> int:
        return len(self.columns["row_flags"])


def pack(rows: Sequence[Row], examples: Sequence[Sequence[Example]], flags: Sequence[int]) -> Packed:
    """Arrays of ``rows``; ``examples[i]`` and ``flags[i]`` belong to row ``i``."""
    flat = list(chain.from_iterable(examples))
    lengths = np.fromiter((len(e.input_ids) for e in flat), "<i4", len(flat))
    ids = np.fromiter(chain.from_iterable(e.input_ids for e in flat), "<i4", int(lengths.sum()))
    names = list(dict.fromkeys((row.file, row.unit) for row in rows))
    number = {name: i for i, name in enumerate(names)}
    columns: dict[str, Array] = {
        "ids": ids,
        "lengths": lengths,
        "example_rows": np.repeat(np.arange(len(rows), dtype="<i4"), [len(part) for part in examples]),
        "digests": _digests(ids, lengths),
        "row_flags": np.array(flags, "|u1"),
        "row_files": np.fromiter((number[row.file, row.unit] for row in rows), "<i4", len(rows)),
        "row_lines": np.fromiter((row.line for row in rows), "<i8", len(rows)),
    }
    kind = _kind(flat)
    if kind in LISTS:
        lists: list[list[Any]] = [e.labels for e in flat]  # type: ignore[misc]
        columns["label_lengths"] = np.fromiter((len(one) for one in lists), "<i4", len(lists))
        columns["labels"] = np.fromiter(chain.from_iterable(lists), KINDS[kind])
    elif flat:
        columns["labels"] = np.array([e.labels for e in flat], KINDS[kind])
    if any(types := [e.token_type_ids for e in flat]):
        parts = (one or [0] * len(e.input_ids) for one, e in zip(types, flat, strict=True))
        columns["types"] = np.fromiter(chain.from_iterable(parts), "|u1", len(ids))
    return Packed(columns, kind, names)


def _kind(examples: Sequence[Example]) -> str:
    """The kind of the labels, a key of ``KINDS``. Empty lists are of any kind."""
    # All items of a list are of one type.
    samples = [(e.labels[:1], LISTS) if isinstance(e.labels, list) else ([e.labels], SINGLE) for e in examples]
    kinds = {names[isinstance(first[0], float)] for first, names in samples if first}
    if kinds == {*LISTS}:
        return "numbers"
    if len(kinds) > 1:
        raise TypeError(f"labels of several kinds in one set of examples: {', '.join(sorted(kinds))}")
    return kinds.pop() if kinds else ("classes" if examples else "")


def _digests(ids: Array, lengths: Array) -> Array:
    """A hash of each example's ids: equal for rows that the model cannot distinguish."""
    data, ends = memoryview(ids.tobytes()), [0, *accumulate(int(n) * 4 for n in lengths)]
    pieces = (hashlib.blake2b(data[start:end], digest_size=8).digest() for start, end in pairwise(ends))
    return np.frombuffer(b"".join(pieces), "<u8")


class Writer:
    """Writes packed rows sequentially. ``finish`` returns the info of the table."""

    def __init__(self, folder: Draft | Memory) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._sizes: dict[str, int] = {}
        self._names: dict[tuple[str, Unit], int] = {}
        self.kind = ""
        self.rows, self.largest = 0, -1

    def add(self, packed: Packed) -> None:
        columns = dict(packed.columns)
        if packed.kind:
            if self.kind and self.kind != packed.kind:
                raise TypeError(f"labels of several kinds in one set of examples: {self.kind} and {packed.kind}")
            self.kind = packed.kind
        numbers = np.array([self._names.setdefault(name, len(self._names)) for name in packed.files], "<i4")
        columns["row_files"] = numbers[columns["row_files"]] if len(numbers) else columns["row_files"]
        columns["example_rows"] = columns["example_rows"] + np.int32(self.rows)
        if "types" in columns or "types" in self._files:
            # Examples without segments are in the first one.
            missing = self._sizes.get("ids", 0) - self._sizes.get("types", 0)
            self._write("types", np.zeros(missing, "|u1"))
            columns.setdefault("types", np.zeros(len(columns["ids"]), "|u1"))
        for name, array in columns.items():
            self._write(name, array)
        self.rows += packed.rows
        if len(columns["ids"]):
            self.largest = max(self.largest, int(columns["ids"].max()))

    def _write(self, name: str, array: Array) -> None:
        if name not in self._files:
            self._files[name] = self._folder.file(f"{name}.bin")
        dtype = KINDS[self.kind] if name == "labels" else DTYPES[name]
        self._files[name].write(np.ascontiguousarray(array, dtype).tobytes())
        self._sizes[name] = self._sizes.get(name, 0) + len(array)

    def finish(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "columns": list(self._sizes),
            "files": list(self._names),
            "rows": self.rows,
            "largest": self.largest,
        }


class Table:
    """All examples of one reading, in the order of the rows. The info of ``store`` is what the ``Writer`` returned."""

    def __init__(self, store: Entry | Memory) -> None:
        self._store = store  # in use as long as the table is
        info = store.info
        self.kind: str = info["kind"]
        self.files: list[tuple[str, Unit]] = info["files"]
        self.rows: int = info["rows"]
        #: the greatest id, or -1
        self.largest: int = info["largest"]

        def column(name: str) -> Array:
            dtype = KINDS[self.kind] if name == "labels" and self.kind else DTYPES[name]
            return store.array(f"{name}.bin", dtype) if name in info["columns"] else np.zeros(0, dtype)

        self.ids, self.labels, self.lengths = column("ids"), column("labels"), column("lengths")
        self.types = column("types") if "types" in info["columns"] else None
        self.example_rows, self.digests = column("example_rows"), column("digests")
        self.row_flags, self.row_files, self.row_lines = column("row_flags"), column("row_files"), column("row_lines")
        self._starts = _starts(self.lengths)
        self._label_starts = _starts(column("label_lengths")) if self.kind in LISTS else self._starts

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Example:
        span = slice(self._starts[number], self._starts[number + 1])
        labels: Any
        if self.kind in LISTS:
            labels = self.labels[self._label_starts[number] : self._label_starts[number + 1]].tolist()
        else:
            labels = self.labels[number].item()
        if self.types is None:
            return Example(self.ids[span].tolist(), labels)
        return Example(self.ids[span].tolist(), labels, token_type_ids=self.types[span].tolist())

    def where(self, row: int) -> str:
        """The file and line of a row, for messages."""
        file, unit = self.files[self.row_files[row]]
        return Row({}, int(self.row_lines[row]), file, unit).where


def _starts(lengths: Array) -> Array:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


class Examples(Sequence[Example]):
    """Examples of a table, in any order and with repetitions; by default all of them once, in order."""

    def __init__(self, table: Table, index: Array | None = None) -> None:
        self.table = table
        self._index = index
        #: tokens of each
        self.lengths = self._of(table.lengths)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """The given examples, one row each."""
        parts = [[example] for example in examples]
        rows = [Row({}, line) for line in range(1, len(parts) + 1)]
        memory = Memory()
        writer = Writer(memory)
        writer.add(pack(rows, parts, [0] * len(parts)))
        memory.info = writer.finish()
        return cls(Table(memory))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> Examples: ...
    def __getitem__(self, number: int | slice) -> Example | Examples:
        if isinstance(number, slice):
            return self.view(np.arange(len(self))[number])
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} of {len(self)}")
        return self.table[number if self._index is None else int(self._index[number])]

    def __iter__(self) -> Iterator[Example]:
        return (self[number] for number in range(len(self)))

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def rows(self) -> Array:
        """The number of each example's row, from 0 in the order of reading."""
        return self._of(self.table.example_rows)

    @property
    def digests(self) -> Array:
        """A hash of each example's ids."""
        return self._of(self.table.digests)

    def _of(self, column: Array) -> Array:
        return column if self._index is None else column[self._index]

    def view(self, indices: Any) -> Examples:
        """The examples at ``indices``, in that order. Copies only the numbers."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Examples(self.table, chosen if self._index is None else self._index[chosen])

    def where(self, number: int) -> str:
        """The file and line of example ``number``, for messages."""
        at = number if self._index is None else self._index[number]
        return self.table.where(int(self.table.example_rows[at]))


def lengths_of(examples: Sequence[Example]) -> Sequence[int]:
    """Tokens of each example; those of a table are not created for it."""
    if isinstance(examples, Examples):
        return examples.lengths  # type: ignore[return-value] # an array of whole numbers serves as a sequence of them
    return [len(example.input_ids) for example in examples]
