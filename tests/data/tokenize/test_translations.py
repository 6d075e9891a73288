"""Promises of sources and targets: the target's own ids with its end, and nothing cut in silence."""

from __future__ import annotations

from typing import Any

import pytest

from loraloom.data.example import EncodedRow
from loraloom.data.records import Translated
from loraloom.data.rows import Row
from loraloom.data.tokenize.encode import encoder
from loraloom.errors import ConfigError
from loraloom.tasks import TASKS

ENGLISH, GERMAN = "translate English to German: the house is wonderful", "das Haus ist wunderbar"


def encoded(tokenizer: Any, source: str, target: str, max_length: int = 64, **settings: Any) -> EncodedRow:
    made = encoder(TASKS["seq2seq-lm"], tokenizer, max_length=max_length, **settings)
    (result,) = made.encode([(Row({}, 1), Translated(source, target))])
    return result


def test_the_target_is_what_transformers_makes_of_it_with_one_end(marked_pieces: Any) -> None:
    (example,) = encoded(marked_pieces, ENGLISH, GERMAN).examples
    wanted = marked_pieces(ENGLISH, text_target=GERMAN)
    assert (example.input_ids, example.labels) == (wanted.input_ids, wanted.labels)
    assert example.labels[-2:].count(marked_pieces.eos_token_id) == 1  # type: ignore[index]


def test_the_end_is_added_where_the_tokenizer_does_not_write_it(byte_pieces: Any) -> None:
    (example,) = encoded(byte_pieces, ENGLISH, GERMAN).examples
    assert example.labels == [*byte_pieces(GERMAN).input_ids, byte_pieces.eos_token_id]
    assert example.input_ids == byte_pieces(ENGLISH).input_ids


def test_a_target_that_is_cut_has_no_end_and_is_counted(marked_pieces: Any) -> None:
    whole = encoded(marked_pieces, "cat", GERMAN).examples[0].labels
    assert isinstance(whole, list)
    limit = len(whole) - 2
    result = encoded(marked_pieces, "cat", GERMAN, limit)
    assert result.overlong
    assert result.examples[0].labels == whole[:limit]
    assert not encoded(marked_pieces, "cat", GERMAN, len(whole)).overlong


def test_a_source_that_is_cut_keeps_its_end(marked_pieces: Any) -> None:
    result = encoded(marked_pieces, ENGLISH, "cat", 8)
    assert result.overlong
    assert len(result.examples[0].input_ids) == 8
    assert result.examples[0].input_ids[-1] == marked_pieces.eos_token_id


def test_rows_over_length_may_be_dropped_or_errors_but_not_split(marked_pieces: Any) -> None:
    assert encoded(marked_pieces, ENGLISH, "cat", 8, overlong="drop") == EncodedRow(overlong=True)
    count = len(marked_pieces(ENGLISH).input_ids)
    result = encoded(marked_pieces, ENGLISH, "cat", 8, overlong="error")
    assert result.error.startswith(f"{count} tokens, where max_length is 8")
    assert result.error.endswith("(truncate or drop)")
    with pytest.raises(ConfigError, match="overlong: seq2seq-lm cannot split a row"):
        encoded(marked_pieces, ENGLISH, "cat", overlong="split")


def test_an_empty_side_is_said(word_pieces: Any) -> None:
    assert encoded(word_pieces, "\u200b", "cat").problem == "the tokenizer finds no token in 'source'"
    assert encoded(word_pieces, "cat", "\u200b").problem == "the tokenizer finds no token in 'target'"
