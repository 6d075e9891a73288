"""Promises of tags: on the first piece of each word and nowhere else, whatever the tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraloom.data.example import IGNORE, EncodedRow
from loraloom.data.records import Tagged
from loraloom.data.rows import Row
from loraloom.data.tokenize.encode import encoder
from loraloom.tasks import TASKS

CALM = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TAGS = ["B-PER", "I-PER", "O"]


def encoded(tokenizer: Any, words: list[str], tags: list[Any], max_length: int = 64, **settings: Any) -> EncodedRow:
    made = encoder(TASKS["token-cls"], tokenizer, max_length=max_length, **{"labels": TAGS, **settings})
    (result,) = made.encode([(Row({}, 1), Tagged(words, tags))])
    return result


def tagged(tokenizer: Any, result: EncodedRow) -> list[tuple[str, int]]:
    """(the text of a piece, its label), of pieces with one."""
    (example,) = result.examples
    assert isinstance(example.labels, list)
    assert len(example.labels) == len(example.input_ids)
    pairs = zip(example.input_ids, example.labels, strict=True)
    return [(tokenizer.convert_ids_to_tokens(i), int(label)) for i, label in pairs if label != IGNORE]


def test_the_first_piece_of_a_word_carries_its_tag(word_pieces: Any) -> None:
    result = encoded(word_pieces, ["Angela", "Merkel", "sat", "in", "London"], ["B-PER", "I-PER", "O", "O", "O"])
    example = result.examples[0]
    assert word_pieces.convert_ids_to_tokens(example.input_ids) == [
        "[CLS]", "ang", "##ela", "merkel", "sat", "in", "lon", "##don", "[SEP]",
    ]  # fmt: skip
    assert example.labels == [IGNORE, 0, IGNORE, 1, 2, 2, 2, IGNORE, IGNORE]


@pytest.mark.parametrize("name", ["byte_pieces", "marked_pieces"])
def test_any_tokenizer_will_do(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    words = ["Angela", "Merkel", "met", "the", "cats"]
    result = encoded(tokenizer, words, ["B-PER", "I-PER", "O", "O", "O"])
    found = tagged(tokenizer, result)
    assert [label for _, label in found] == [0, 1, 2, 2, 2]
    for (piece, _), word in zip(found, words, strict=True):
        assert word.startswith(piece.lstrip("Ġ▁")), piece
    assert result.examples[0].input_ids == tokenizer(" ".join(words)).input_ids


@CALM
@given(
    words=st.lists(st.sampled_from(["the", "cats", "London", "mat,", "Merkel", "x-y", "a.b"]), min_size=1, max_size=9)
)
def test_word_pieces_are_those_that_transformers_aligns(word_pieces: Any, words: list[str]) -> None:
    result = encoded(word_pieces, words, list(range(len(words))), labels=[str(i) for i in range(len(words))])
    theirs = word_pieces(words, is_split_into_words=True)
    wanted, last = [], None
    for word in theirs.word_ids():
        wanted.append(IGNORE if word is None or word == last else word)
        last = word
    assert (result.examples[0].input_ids, result.examples[0].labels) == (theirs.input_ids, wanted)


def test_tags_may_be_numbers(word_pieces: Any) -> None:
    assert encoded(word_pieces, ["the", "cat"], [1, 0], labels=["0", "1"]).examples[0].labels == [IGNORE, 1, 0, IGNORE]


def test_a_tag_that_training_does_not_have_is_said(word_pieces: Any) -> None:
    result = encoded(word_pieces, ["cat"], ["B-PRE"])
    assert result.error == "the tag 'B-PRE' is never seen in training, which has 3 tags; did you mean 'B-PER'?"


def test_a_word_without_a_token_is_counted_and_its_neighbours_keep_their_tags(word_pieces: Any) -> None:
    result = encoded(word_pieces, ["the", "\u200b", "cat"], ["O", "B-PER", "I-PER"])
    assert result.merged
    assert tagged(word_pieces, result) == [("the", 2), ("cat", 1)]
    assert encoded(word_pieces, ["\u200b"], ["O"]).problem == "the tokenizer finds no token in 'tokens'"


def test_a_row_over_length_is_cut_or_split_between_words(word_pieces: Any) -> None:
    words, tags = ["the", "cats", "in", "London", "sat"], ["O", "B-PER", "O", "B-PER", "O"]
    for overlong, parts in {
        "truncate": [["[CLS]", "the", "cat", "##s", "in", "[SEP]"]],
        "split": [
            ["[CLS]", "the", "cat", "##s", "in", "[SEP]"],
            ["[CLS]", "lon", "##don", "sat", "[SEP]"],
        ],
        "drop": [],
    }.items():
        result = encoded(word_pieces, words, tags, max_length=7, overlong=overlong)
        assert result.overlong
        assert [word_pieces.convert_ids_to_tokens(one.input_ids) for one in result.examples] == parts
    assert encoded(word_pieces, words, tags, 7, overlong="error").error.startswith("9 tokens, where max_length is 7")


@CALM
@given(st.lists(st.sampled_from(["the", "cats", "abcdefghij", "london"]), min_size=1, max_size=12), st.integers(3, 12))
def test_split_keeps_every_tag_once_and_every_part_short(word_pieces: Any, words: list[str], limit: int) -> None:
    names = [str(i) for i in range(len(words))]
    result = encoded(word_pieces, words, names, limit, labels=names, overlong="split")
    labels = [label for one in result.examples for label in one.labels if label != IGNORE]  # type: ignore[union-attr]
    assert labels == list(range(len(words)))
    assert all(len(one.input_ids) <= limit for one in result.examples)
