"""Rows find their slot and come back in their order, and what follows a route leaves no trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraloom.errors import AdapterError
from loraloom.lora.routing import BASE, Block, Route

NAMES = ["a", "b", "c", BASE]
VALUE = {"a": 1.0, "b": 10.0, "c": 100.0, BASE: 0.0}


def add(slot: str, rows: Tensor, where: slice | Tensor) -> Tensor:
    return rows + VALUE[slot]


@settings(max_examples=200, deadline=None)
@given(slots=st.lists(st.sampled_from(NAMES), min_size=2, max_size=9), times=st.integers(1, 3))
def test_every_row_goes_through_its_own_slot_and_stays_in_its_place(slots: list[str], times: int) -> None:
    route = Route.of_rows(slots)
    x = torch.arange(len(slots) * times * 2.0).view(-1, 2)
    if not route.blocks:
        assert len(set(slots)) == 1
        assert route.active == (() if slots[0] == BASE else (slots[0],))
        assert route.rows == len(slots)
        return
    wanted = x + torch.tensor([VALUE[slot] for slot in slots]).repeat_interleave(times)[:, None]
    assert torch.equal(route.apply(x, times, add), wanted)


@settings(max_examples=100, deadline=None)
@given(slots=st.lists(st.sampled_from(NAMES), min_size=2, max_size=9), times=st.integers(1, 3))
def test_where_says_which_rows_of_the_batch_a_slot_got(slots: list[str], times: int) -> None:
    route = Route.of_rows(slots)
    if not route.blocks:
        return
    x = torch.randn(len(slots) * times, 3)
    seen: list[str] = []

    def check(slot: str, rows: Tensor, where: slice | Tensor) -> Tensor:
        assert torch.equal(x[where], rows)
        seen.append(slot)
        return rows

    assert torch.equal(route.apply(x, times, check), x)
    assert sorted(seen) == sorted(set(slots)), "each slot is called once"


def test_the_blocks_tile_the_rows() -> None:
    route = Route.of_rows(["b", "a", "b", BASE])
    assert route.blocks == (Block("b", 0, 2), Block("a", 2, 3), Block(BASE, 3, 4))
    assert (route.rows, route.active) == (4, ())
    assert route.slots() == ("b", "a")
    assert torch.equal(route.order[route.inverse], torch.arange(4))


def test_rows_that_lie_slot_by_slot_are_not_moved() -> None:
    route = Route.of_rows(["b", "b", "a"])
    assert route.order is None
    assert route.inverse is None


def test_one_slot_for_all_rows_is_that_slot_active() -> None:
    assert Route.of_rows(["a", "a"]) == Route(active=("a",), rows=2)
    assert Route.of_rows([BASE, BASE]) == Route(rows=2)
    assert Route(active=("a", "b")).slots() == ("a", "b")


def test_no_rows_are_refused() -> None:
    with pytest.raises(AdapterError, match="adapter_names: found an empty list"):
        Route.of_rows([])


def test_routes_of_the_same_rows_in_another_order_are_not_equal() -> None:
    assert Route.of_rows(["a", "b", "a"]) == Route.of_rows(["a", "b", "a"])
    assert Route.of_rows(["a", "b", "a"]) != Route.of_rows(["a", "a", "b"])


def test_gradients_flow_back_to_each_row() -> None:
    x = torch.zeros(4, 1, requires_grad=True)
    Route.of_rows(["b", "a", BASE, "b"]).apply(x, 1, lambda slot, rows, where: rows * VALUE[slot]).sum().backward()
    assert x.grad.flatten().tolist() == [10.0, 1.0, 0.0, 10.0]


def test_a_nan_of_one_slot_never_touches_the_rows_of_another() -> None:
    x = torch.ones(3, 1, requires_grad=True)
    out = Route.of_rows(["a", "b", "a"]).apply(x, 1, lambda s, rows, where: rows * (torch.nan if s == "b" else 2.0))
    out.sum().backward()
    assert out[[0, 2]].flatten().tolist() == [2.0, 2.0]
    assert x.grad[[0, 2]].flatten().tolist() == [2.0, 2.0]
