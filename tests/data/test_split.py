"""Rows that belong together are held out together, and the others as ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.data.split import held_out, units_of
from loraloom.errors import DataError

CALM = settings(max_examples=60, deadline=None)  # two cores are shared: a slow example is no failure


@CALM
@given(st.lists(st.integers(0, 30), min_size=30, max_size=60), st.integers(1, 12), st.integers(0, 5))
def test_rows_of_one_unit_are_on_one_side(units: list[int], count: int, seed: int) -> None:
    labels = [str(unit % 3) for unit in units]
    try:
        chosen = held_out(len(units), count, seed, labels, units)
    except DataError:
        return
    out, left = {units[i] for i in chosen}, {units[i] for i in range(len(units)) if i not in set(chosen)}
    assert not out & left
    assert count / 2 <= len(chosen) <= count
    assert {labels[i] for i in range(len(units)) if i not in set(chosen)} == set(labels)


@CALM
@given(st.integers(2, 50), st.integers(0, 5), st.data())
def test_rows_that_all_differ_are_held_out_as_without_units(rows: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows - 1))
    assert held_out(rows, count, seed, units=list(range(rows, 0, -1))) == held_out(rows, count, seed)


def test_which_rows_are_held_out_is_file_format() -> None:
    """Runs of earlier versions are resumed: of rows that all differ the same ones must be held out."""
    assert held_out(20, 0.2, 3) == [3, 5, 6, 15]
    assert held_out(12, 4, 7, ["a", "b", "a"] * 4) == [3, 4, 8, 10]


def test_units_that_leave_nothing_to_hold_out_are_an_error() -> None:
    with pytest.raises(DataError, match="2 of 10 rows cannot be held out and 2 groups of rows kept together"):
        held_out(10, 2, 0, units=[0] * 5 + [1] * 5)


def test_rows_are_of_one_unit_by_what_they_hold_by_group_and_through_others() -> None:
    digests = np.array([7, 8, 7, 9, 10, 11, 12], np.uint64)
    none = np.zeros(7, np.uint64)

    def together(groups: np.ndarray) -> set[frozenset[int]]:
        units = units_of(digests, groups).tolist()
        return {frozenset(i for i in range(7) if units[i] == unit) for unit in units}

    assert together(none) == {frozenset(one) for one in ([0, 2], [1], [3], [4], [5], [6])}
    # Rows 1 and 2 are of one group, and row 2 is the same as row 0; rows 3 and 5 are of another one.
    groups = np.array([0, 5, 5, 6, 0, 6, 0], np.uint64)
    assert together(groups) == {frozenset(one) for one in ([0, 1, 2], [3, 5], [4], [6])}
