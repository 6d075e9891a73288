"""Whose rows a tensor holds: known by its shape, or proven, or not to be told."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from loraloom.lora.rows import Batch, RowProbe, rows_of


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
        probe.turn(turn).look("site", see(part))
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
