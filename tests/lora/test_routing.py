"""Rows find their slot and come back in their order, and what follows a route leaves no trace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from loraloom.errors import AdapterError
from loraloom.lora.routing import BASE, Batch, Block, Route, RowProbe, rows_of

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


# -- whose rows a tensor holds: known by its shape, proven, or unknown -------------------------------------------


def batch(*shapes: tuple[int, ...], rows: int = 4) -> Batch:
    found = Batch(rows)
    found.note(torch.zeros(shape, dtype=torch.long) for shape in shapes)
    return found


@pytest.mark.parametrize(
    ("leading", "certain"),
    [
        ((4, 7), True),
        ((4, 7, 3), True),
        ((4, 5), False),  # another length
        ((7, 4), False),  # tokens first
        ((28,), False),  # flattened: rows or tokens first
        ((4,), False),  # one for each row, or four that a router chose
        ((1, 7), False),  # shared
        ((8, 7), False),
    ],
)
def test_rows_and_length_of_an_argument_say_by_themselves_that_rows_come_first(leading, certain) -> None:
    assert batch((4, 7)).certain(torch.Size(leading)) is certain


def test_as_many_rows_as_tokens_say_nothing() -> None:
    assert not batch((4, 4)).certain(torch.Size((4, 4)))


def test_rows_that_beams_or_choices_repeat_count_as_the_batchs() -> None:
    assert batch((12, 7)).certain(torch.Size((12, 7)))


def test_a_layer_that_was_proven_may_have_any_length_but_no_count_that_only_happens_to_divide() -> None:
    known = batch((4, 7))
    assert known.plausible(28, per_row=5)
    assert known.plausible(4, per_row=1)
    assert not known.plausible(28, per_row=1)
    assert known.plausible(36, per_row=9)  # windows of an image: nothing but the batch's tensors came in
    patches = batch((4, 7), (36, 7, 3))
    assert patches.plausible(28, per_row=9)
    patches = batch((4, 7), (37, 3))
    assert not patches.plausible(36, per_row=9)


def test_images_count_as_the_rows_only_where_each_text_has_as_many() -> None:
    ids = torch.tensor([[5, 9, 9, 1], [5, 9, 9, 1]])
    even, odd = Batch(2), Batch(2)
    even.note([ids, torch.zeros(2, 3, 8, 8)], media_tokens=[9])
    odd.note([torch.tensor([[9, 9, 9, 9], [5, 5, 5, 5]]), torch.zeros(2, 3, 8, 8)], media_tokens=[9])
    assert even.only_rows
    assert not odd.only_rows


def probed(see, rows: int = 3, other: int = 2) -> RowProbe:
    """A probe of a site that sees ``see(x)``, x [rows, 4, 2]."""
    x = torch.randn(rows, 4, 2, generator=torch.Generator().manual_seed(0))
    probe = RowProbe(rows, other)
    for turn, part in enumerate((x[:1], x[other : other + 1], x)):
        probe.begin(turn).observe("site", see(part))
    probe.finish()
    return probe


@pytest.mark.parametrize(
    ("see", "places"),
    [
        (lambda x: x, 1),
        (lambda x: x.flatten(0, 1), 4),
        (lambda x: x[:, 0], 1),
        (lambda x: x.repeat_interleave(5, 0), 5),
        (lambda x: x.view(len(x) * 2, 2, 2), 2),
    ],
)
def test_rows_one_after_another_are_proven(see, places: int) -> None:
    assert probed(see).proven == {"site": places}


@pytest.mark.parametrize(
    "see",
    [
        lambda x: x.transpose(0, 1),  # tokens first
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda x: x.repeat(2, 1, 1),  # all rows, and all again
        lambda x: x.flip(0),
        lambda x: x.flatten(0, 1)[x.flatten(0, 1)[:, 0] > 0],  # tokens that a router chose
        lambda x: torch.ones(1, 4, 2),  # shared by all rows
        lambda x: x.sum(0),
        lambda x: torch.ones_like(x),  # nothing tells the rows apart
    ],
)
def test_anything_else_is_not(see) -> None:
    probe = probed(see)
    assert probe.failed == {"site"}
    assert not probe.proven


def test_some_rows_of_nested_arguments() -> None:
    ids = torch.arange(6).view(3, 2)
    output = BaseModelOutput(last_hidden_state=ids)
    value = (ids, torch.ones(1, 2), None, 7, [ids], output)
    for which, wanted in ((slice(2, 3), [[4, 5]]), (torch.tensor([2, 0]), [[4, 5], [0, 1]])):
        first, shared, nothing, number, nested, made = rows_of(value, which, 3)
        assert first.tolist() == nested[0].tolist() == made.last_hidden_state.tolist() == wanted
        assert shared.shape == (1, 2)
        assert (nothing, number) == (None, 7)


def test_media_of_unlike_numbers_in_the_rows_are_never_taken_for_the_batchs_rows() -> None:
    """As many sounds as rows, and both of them in the first."""
    ids, sounds = torch.tensor([[55, 55, 3], [3, 4, 5]]), torch.zeros(2, 8, 16)
    for batch, tokens in ((Batch(2), [54, 55]), (Batch(2), [])):
        batch.note([ids, sounds], tokens)
        assert batch.plausible(2, 1) is (not tokens)
