"""Promises of questions: the windows are transformers' own, and an answer is found in every window that holds it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraloom.data.example import EncodedRow
from loraloom.data.records import Asked
from loraloom.data.rows import Row
from loraloom.data.tokenize.answers import AnswerEncoder
from loraloom.data.tokenize.encode import encoder
from loraloom.data.tokenize.labels import NOTE
from loraloom.tasks import TASKS

CALM = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CONTEXT = "the cat sat on the mat in London, the cats sat on the mat in New York."


def asked(answer: str | None, context: str = CONTEXT, question: str = "who sat?") -> Asked:
    return Asked(question, context, [] if answer is None else [(answer, context.index(answer))])


def encoded(tokenizer: Any, record: Asked, max_length: int = 64, stride: int = 4, **settings: Any) -> EncodedRow:
    made = encoder(TASKS["question-answering"], tokenizer, max_length=max_length, stride=stride, **settings)
    (result,) = made.encode([(Row({}, 1), record)])
    return result


def test_a_line_break_parts_question_and_context_where_the_tokenizer_puts_nothing(byte_pieces: Any) -> None:
    made = encoder(TASKS["question-answering"], byte_pieces, max_length=200, stride=4)
    (result,) = made.encode([(Row({}, 1), asked("the mat"))])
    ids, (first, last) = result.examples[0].input_ids, result.examples[0].labels  # type: ignore[misc]
    assert byte_pieces.decode(ids) == byte_pieces.decode(byte_pieces("who sat?\n", CONTEXT).input_ids)
    assert byte_pieces.decode(ids[first : last + 1]).strip() == "the mat"
    assert made.notes == [NOTE]


@CALM
@given(st.lists(st.sampled_from(CONTEXT.split()), min_size=1, max_size=30), st.integers(12, 24), st.integers(0, 3))
def test_windows_are_those_of_transformers(word_pieces: Any, words: list[str], limit: int, stride: int) -> None:
    record = asked(None, " ".join(words))
    theirs = word_pieces(
        record.question, record.context, truncation="only_second", max_length=limit, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    result = encoded(word_pieces, record, limit, stride)
    assert [one.input_ids for one in result.examples] == theirs.input_ids
    assert [one.token_type_ids for one in result.examples] == theirs.token_type_ids
    assert result.overlong == (len(theirs.input_ids) > 1)
    (windows,) = AnswerEncoder(word_pieces, encoder_settings(limit, stride)).windows([record])
    for i, window in enumerate(windows):
        offsets = [o for o, s in zip(theirs.offset_mapping[i], theirs.sequence_ids(i), strict=True) if s == 1]
        assert window.offsets == offsets


def encoder_settings(limit: int, stride: int) -> Any:
    from loraloom.data.example import Settings

    return Settings(limit, stride=stride)


@pytest.mark.parametrize("name", ["word_pieces", "byte_pieces", "marked_pieces"])
@pytest.mark.parametrize("answer", ["the cat", "London", "cats", "New York", "York."])
def test_the_tokens_of_an_answer_are_its_text_in_each_window_that_holds_it(
    name: str, answer: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    record = asked(answer)
    start = CONTEXT.index(answer)
    limit = len(tokenizer(record.question, "").input_ids) + 14
    result = encoded(tokenizer, record, limit, 8)
    (windows,) = AnswerEncoder(tokenizer, encoder_settings(limit, 8)).windows([record])
    assert len(windows) == len(result.examples) > 1
    held = 0
    for window, example in zip(windows, result.examples, strict=True):
        assert isinstance(example.labels, list)
        first, last = (int(place) - window.first for place in example.labels)
        if example.labels == [0, 0]:
            assert window.offsets[0][0] > start or window.offsets[-1][1] < start + len(answer)
            continue
        held += 1
        # A token may begin with the space in front of the answer, or go on behind it.
        text = CONTEXT[window.offsets[first][0] : window.offsets[last][1]]
        assert answer in text
        assert len(text) <= len(answer) + 2
    assert held >= 1


def test_the_question_without_an_answer_points_to_the_first_token(word_pieces: Any) -> None:
    assert {tuple(one.labels) for one in encoded(word_pieces, asked(None), 16).examples} == {(0, 0)}  # type: ignore[arg-type]


def test_an_answer_that_no_window_holds_is_said_and_not_taught_as_none(word_pieces: Any) -> None:
    long = "sat on the mat in London, the cats sat"
    result = encoded(word_pieces, asked(long), 12, 2)
    assert result.examples == []
    assert result.problem.startswith("no window holds the whole answer")
    assert encoded(word_pieces, asked(long), 40, 2).problem == ""


def test_a_question_as_long_as_max_length_is_said(word_pieces: Any) -> None:
    result = encoded(word_pieces, asked("the cat", question="who sat " * 10), 16)
    assert result.error.startswith("the question takes 23 tokens with the special ones, which leaves no room")


def test_a_stride_beyond_the_room_is_taken_as_half_of_it(word_pieces: Any) -> None:
    result = encoded(word_pieces, asked("the cat"), 16, 128)
    assert 1 < len(result.examples) < 12
    assert all(len(one.input_ids) <= 16 for one in result.examples)


def test_rows_over_length_may_be_dropped_or_errors(word_pieces: Any) -> None:
    assert encoded(word_pieces, asked("the cat"), 16, overlong="drop") == EncodedRow(overlong=True)
    assert "where max_length is 16" in encoded(word_pieces, asked("the cat"), 16, overlong="error").error
    split, cut = (encoded(word_pieces, asked("the cat"), 16, overlong=how) for how in ("split", "truncate"))
    assert split == cut


def test_a_context_without_a_token_is_said(word_pieces: Any) -> None:
    assert encoded(word_pieces, Asked("who", "\u200b", [])).problem == "the tokenizer finds no token in 'context'"
