"""Promises of the batches: every row once, little padding, none of it seen by the model, no global state."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.data.batches import bucketed, collate, evaluation_batches, padding_share
from loraloom.data.example import IGNORE, Example

CALM = settings(max_examples=60, deadline=None)  # two cores are shared: a slow example is no failure
PAD = 9
LENGTHS = st.lists(st.integers(1, 300), max_size=400)
#: Token 9 is also a real token here, as the end-of-text token is where a tokenizer has no padding token.
TOKENS = st.lists(st.integers(0, PAD), min_size=1, max_size=20)


def docstring_like(n: int) -> list[int]:
    """Lengths with a long tail: most texts are short, a few reach the limit."""
    source = random.Random(0)
    return [min(128, 3 + int(source.lognormvariate(3.3, 0.9))) for _ in range(n)]


# Order ----------------------------------------------------------------------------------------------------


@CALM
@given(LENGTHS, st.integers(1, 9), st.integers(), st.integers(0, 5))
def test_every_row_is_in_one_batch_of_an_epoch_and_all_batches_but_one_are_full(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    for batches in (bucketed(lengths, size, seed, epoch), evaluation_batches(lengths, size)):
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        rest = len(lengths) % size
        assert sorted(len(b) for b in batches if len(b) != size) == ([rest] if rest else [])


@CALM
@given(LENGTHS, st.integers(1, 9), st.integers())
def test_the_order_follows_from_the_arguments_alone(lengths: list[int], size: int, seed: int) -> None:
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    first = bucketed(lengths, size, seed, 3)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(2)
    torch.manual_seed(2)
    assert bucketed(tuple(lengths), size, seed, 3) == first


def test_the_order_is_the_same_on_every_python() -> None:
    assert bucketed([5, 1, 4, 2, 3, 6, 7], 2, seed=7, epoch=1) == [[1, 3], [4, 2], [0, 5], [6]]


def test_epochs_and_seeds_give_different_orders() -> None:
    lengths = docstring_like(200)
    orders = [str(bucketed(lengths, 8, seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_rows_of_one_length_are_mixed_anew_in_every_epoch() -> None:
    first, second = ({frozenset(batch) for batch in bucketed([5] * 64, 8, 0, epoch)} for epoch in (0, 1))
    assert not first & second


def test_batches_come_in_no_order_of_length() -> None:
    lengths = docstring_like(800)
    longest = [max(lengths[row] for row in batch) for batch in bucketed(lengths, 16, 0, 0)]
    rising = sum(a <= b for a, b in pairwise(longest))
    assert 10 < rising < 40


# Padding --------------------------------------------------------------------------------------------------


def test_the_padding_share_is_counted_to_the_token() -> None:
    assert padding_share([4, 1, 3, 2], [[0, 1], [2, 3]]) == pytest.approx(4 / 14)
    assert padding_share([4, 1, 3, 2], [[0], [1], [2], [3]]) == 0
    assert padding_share([], []) == 0


def test_buckets_leave_a_tenth_of_the_padding_of_random_batches() -> None:
    lengths = docstring_like(4700)
    shuffled = random.Random(0).sample(range(4700), 4700)
    plain = padding_share(lengths, [shuffled[i : i + 16] for i in range(0, 4700, 16)])
    assert plain > 0.4
    assert padding_share(lengths, bucketed(lengths, 16, 0, 0)) < plain / 10
    assert padding_share(lengths, evaluation_batches(lengths, 16)) < plain / 20


def test_evaluation_starts_with_the_longest_rows() -> None:
    assert evaluation_batches([2, 9, 5, 9], 2) == [[1, 3], [2, 0]]


# Tensors --------------------------------------------------------------------------------------------------


@CALM
@given(st.lists(TOKENS, min_size=1, max_size=8))
def test_padding_is_on_the_right_masked_and_left_out_of_the_loss(rows: list[list[int]]) -> None:
    batch = collate([Example(ids, [IGNORE, *ids[1:]]) for ids in rows], PAD, "token")
    width = max(map(len, rows))
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        name: ((len(rows), width), torch.int64) for name in ("input_ids", "attention_mask", "labels")
    }
    for i, ids in enumerate(rows):
        assert batch["input_ids"][i].tolist() == ids + [PAD] * (width - len(ids))
        assert batch["attention_mask"][i].tolist() == [1] * len(ids) + [0] * (width - len(ids))
        assert batch["labels"][i].tolist() == [IGNORE, *ids[1:]] + [IGNORE] * (width - len(ids))


def test_a_class_is_one_number_per_row() -> None:
    batch = collate([Example([5, 6], 2), Example([7], 0)], PAD, "row")
    assert batch["labels"].tolist() == [2, 0]
    assert batch["labels"].dtype == torch.int64


def test_numbers_and_several_classes_are_float32() -> None:
    numbers = collate([Example([5, 6], 2.0), Example([7], -0.5)], PAD, "row")["labels"]
    assert (numbers.tolist(), numbers.dtype) == ([2.0, -0.5], torch.float32)
    several = collate([Example([5, 6], [1.0, 0.0]), Example([7], [0.0, 0.0])], PAD, "row")["labels"]
    assert (several.tolist(), several.dtype) == ([[1.0, 0.0], [0.0, 0.0]], torch.float32)


def test_an_answer_is_two_places_per_row() -> None:
    labels = collate([Example([5, 6, 7], [1, 2]), Example([7], [0, 0])], PAD, "row")["labels"]
    assert (labels.tolist(), labels.dtype) == ([[1, 2], [0, 0]], torch.int64)


def test_tags_are_as_long_as_the_tokens_and_targets_have_a_length_of_their_own() -> None:
    tags = collate([Example([5, 6, 7], [IGNORE, 1, 2]), Example([7], [0])], PAD, "token")
    assert tags["labels"].tolist() == [[IGNORE, 1, 2], [0, IGNORE, IGNORE]]
    targets = collate([Example([5, 6, 7], [1, 2]), Example([7], [3, 4, 5, 6])], PAD, "target")
    assert targets["labels"].tolist() == [[1, 2, IGNORE, IGNORE], [3, 4, 5, 6]]
    assert targets["input_ids"].shape == (2, 3)
    assert targets["labels"].dtype == torch.int64


def test_segments_are_there_where_a_row_has_them_and_padded_with_the_first() -> None:
    pairs = [Example([5, 6, 7], 0, [0, 1, 1]), Example([7, 8], 1)]
    assert collate(pairs, PAD, "row")["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 0]]
    assert "token_type_ids" not in collate(pairs[1:], PAD, "row")
