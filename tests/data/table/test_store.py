"""Promises of examples as arrays: what went in comes out, from memory and from disk, at any place and in any order."""

from __future__ import annotations

import itertools
import mmap
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.data.example import IGNORE, Example
from loraloom.data.table.cache import Memory, entry
from loraloom.data.table.store import (
    MERGED,
    OVERLONG,
    Examples,
    Packed,
    Table,
    Writer,
    lengths_of,
    pack,
)


@dataclass(frozen=True)
class Placement:
    line: int
    file: str = "a.jsonl"
    unit: Literal["line", "row"] = "line"


CALM = settings(max_examples=60, deadline=None)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6)


def written(chunks: list[Packed]) -> Table:
    memory = Memory()
    writer = Writer(memory)
    for chunk in chunks:
        writer.add(chunk)
    memory.info = writer.finish()
    return Table(memory)


NUMBERS = itertools.count()


def on_disk(chunks: list[Packed]) -> Table:
    def build(draft) -> dict:
        writer = Writer(draft)
        for chunk in chunks:
            writer.add(chunk)
        return writer.finish()

    made = entry("rows", f"k{next(NUMBERS)}", build)
    return Table(made)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows_of(count: int) -> list[Placement]:
    return [Placement(line) for line in range(1, count + 1)]


LABELS = {
    "class": st.integers(0, 2**31 - 1),
    "number": st.floats(allow_nan=False, allow_infinity=False),
    "classes": st.lists(st.integers(-100, 2**31 - 1), max_size=5),
    "numbers": st.lists(st.floats(allow_nan=False), min_size=3, max_size=3),
}


@CALM
@given(st.data(), st.sampled_from(sorted(LABELS)), st.booleans(), st.integers(1, 4))
def test_what_went_in_comes_out_whatever_the_labels_and_the_chunks(data, kind: str, segments: bool, size: int) -> None:
    def one() -> Example:
        ids = data.draw(IDS)
        types = [len(ids) % 2] * len(ids) if segments else None
        return Example(ids, data.draw(LABELS[kind]), token_type_ids=types)

    parts = [[one() for _ in range(data.draw(st.integers(0, 2)))] for _ in range(data.draw(st.integers(0, 5)))]
    places = rows_of(len(parts))
    cut = range(0, len(parts), size)
    chunks = [pack(places[i : i + size], parts[i : i + size], [0] * len(parts[i : i + size])) for i in cut]
    expected = [example for part in parts for example in part]
    for table in (written(chunks), on_disk(chunks)):
        found = list(Examples(table))
        assert [(e.input_ids, e.labels) for e in found] == [(e.input_ids, e.labels) for e in expected]
        assert [type(e.labels) for e in found] == [type(e.labels) for e in expected]
        if any(example.token_type_ids for example in expected):
            assert [e.token_type_ids for e in found] == [e.token_type_ids for e in expected]
        assert Examples(table).rows.tolist() == [row for row, part in enumerate(parts) for _ in part]
        assert table.rows == len(parts)


@pytest.fixture
def table() -> Table:
    parts = [[Example([i] * (i + 1), [IGNORE] * i + [i])] for i in range(10)]
    return written([pack(rows_of(10), parts, [OVERLONG * (i % 2) | MERGED * (i == 4) for i in range(10)])])


def test_a_view_is_in_the_order_asked_for_and_a_view_of_a_view_too(table: Table) -> None:
    view = Examples(table).view([7, 2, 2, 9])
    assert [example.input_ids[0] for example in view] == [7, 2, 2, 9]
    assert view.lengths.tolist() == [8, 3, 3, 10]
    assert view.tokens == 24
    assert [example.input_ids[0] for example in view.view(np.array([3, 0]))] == [9, 7]
    assert [example.input_ids[0] for example in view[1:]] == [2, 2, 9]
    assert (view[-1].labels, view[0].labels) == ([IGNORE] * 9 + [9], [IGNORE] * 7 + [7])
    assert [view.where(i) for i in (0, 3)] == ["a.jsonl, line 8", "a.jsonl, line 10"]
    with pytest.raises(IndexError, match="example 4 of 4"):
        view[4]
    with pytest.raises(IndexError):
        view[-5]


def test_marks_count_rows_and_not_examples(table: Table) -> None:
    view = Examples(table).view([1, 1, 3, 4])
    flags = table.row_flags[np.unique(view.rows)]
    assert (np.count_nonzero(flags & OVERLONG), np.count_nonzero(flags & MERGED)) == (2, 1)
    assert np.count_nonzero(table.row_flags[np.unique(Examples(table).rows)] & OVERLONG) == 5


def test_lists_are_plain_numbers_that_a_tensor_or_a_json_text_takes(table: Table) -> None:
    example = Examples(table)[3]
    assert {type(number) for number in (*example.input_ids, *example.labels)} == {int}


def test_the_same_ids_have_the_same_digest_and_others_another() -> None:
    ids = [[1, 2], [1, 2], [1], [2, 1], [1, 2, 0], []]
    found = Examples.of([Example(one, 0) for one in ids]).digests.tolist()
    assert found[0] == found[1]
    assert len(set(found)) == 5


def test_segments_that_come_late_leave_those_before_in_the_first() -> None:
    plain, pair = Example([1, 2], 0), Example([3, 4], 1, token_type_ids=[0, 1])
    chunks = [pack(rows_of(1), [[one]], [0]) for one in (plain, pair, plain)]
    expected = [[0, 0], [0, 1], [0, 0]]
    together = pack(rows_of(3), [[plain], [pair], [plain]], [0, 0, 0])
    for found in (written(chunks), written([together]), on_disk(chunks)):
        assert [example.token_type_ids for example in Examples(found)] == expected


def test_rows_of_several_files_know_theirs() -> None:
    one = [Example([1], 0)]
    chunks = [
        pack([Placement(1, "a"), Placement(2, "a"), Placement(1, "b")], [one] * 3, [0] * 3),
        pack([Placement(2, "b"), Placement(1, "c", "row")], [one] * 2, [0] * 2),
    ]
    for table in (written(chunks), on_disk(chunks)):
        found = [Examples(table).where(i) for i in range(5)]
        assert found == ["a, line 1", "a, line 2", "b, line 1", "b, line 2", "c, row 1"]


def test_nothing_at_all_is_a_table_too() -> None:
    for table in (written([]), on_disk([]), written([pack([], [], [])]), written([pack(rows_of(2), [[], []], [2, 0])])):
        assert list(Examples(table)) == []
        assert (table.largest, Examples(table).tokens) == (-1, 0)


def test_labels_of_two_kinds_are_refused() -> None:
    with pytest.raises(TypeError, match="several kinds"):
        pack(rows_of(2), [[Example([1], 0)], [Example([1], [0])]], [0, 0])
    with pytest.raises(TypeError, match="several kinds"):
        written([pack(rows_of(1), [[Example([1], 0)]], [0]), pack(rows_of(1), [[Example([1], 0.5)]], [0])])


def test_lengths_are_known_without_making_the_examples(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = list(Examples(table))
    monkeypatch.setattr(Table, "__getitem__", None)
    assert list(lengths_of(Examples(table))) == lengths_of(plain) == list(range(1, 11))
    assert table.largest == 9


def test_a_table_on_disk_stays_there() -> None:
    """The arrays are maps of the files: reading one example touches its pages and no more."""
    source = random.Random(0)
    parts = [[Example([source.randrange(9) for _ in range(50)], 1)] for _ in range(100)]
    table = on_disk([pack(rows_of(100), parts, [0] * 100)])
    base = table.ids
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, mmap.mmap)
    assert type(table.ids) is np.ndarray
    assert not table.ids.flags.writeable
    assert [table[i].input_ids for i in (99, 0, 50)] == [parts[i][0].input_ids for i in (99, 0, 50)]
