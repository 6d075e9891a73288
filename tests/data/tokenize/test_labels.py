"""Promises of labels of texts: classes, several classes, numbers; one text or two."""

from __future__ import annotations

from typing import Any

import pytest

from loraloom.data.example import EncodedRow
from loraloom.data.records import Labelled
from loraloom.data.rows import Row
from loraloom.data.tokenize.encode import encoder
from loraloom.data.tokenize.labels import NOTE, NUMBER, SEVERAL, SINGLE
from loraloom.errors import ConfigError
from loraloom.tasks import TASKS


def encoded(tokenizer: Any, *records: Labelled, max_length: int = 32, **settings: Any) -> list[EncodedRow]:
    made = encoder(TASKS["seq-cls"], tokenizer, max_length=max_length, **settings)
    return made.encode([(Row({}, i), record) for i, record in enumerate(records, start=1)])


def test_a_pair_has_two_segments_where_the_tokenizer_tells_them_apart(word_pieces: Any, byte_pieces: Any) -> None:
    records = [Labelled("the cat", "who sat", "a"), Labelled("the mat", None, "b")]
    two, one = (result.examples[0] for result in encoded(word_pieces, *records, labels=["a", "b"]))
    wanted = word_pieces("the cat", "who sat")
    assert (two.input_ids, two.token_type_ids) == (wanted.input_ids, wanted.token_type_ids)
    assert two.token_type_ids == [0, 0, 0, 0, 1, 1, 1]
    assert (one.input_ids, one.token_type_ids) == (word_pieces("the mat").input_ids, None)
    assert (two.labels, one.labels) == (0, 1)
    plain = encoded(byte_pieces, *records, labels=["a", "b"])[0].examples[0]
    assert plain.token_type_ids is None


def test_a_line_break_parts_the_texts_where_the_tokenizer_puts_nothing_and_it_is_said(
    word_pieces: Any, byte_pieces: Any
) -> None:
    one, two = Labelled("the cat", None, "a"), Labelled("the cat", "who sat", "a")
    for tokenizer, between in ((byte_pieces, "\n"), (word_pieces, "")):
        made = encoder(TASKS["seq-cls"], tokenizer, max_length=32, labels=["a"])
        (found,) = made.encode([(Row({}, 1), one)])
        assert found.examples[0].input_ids == tokenizer("the cat").input_ids
        assert made.notes == []
        (found,) = made.encode([(Row({}, 1), two)])
        assert found.examples[0].input_ids == tokenizer(f"the cat{between}", "who sat").input_ids
        assert made.notes == ([NOTE] if between else [])
    (found,) = encoded(byte_pieces, two, labels=["a"], max_length=4, overlong="error")
    count = len(byte_pieces("the cat\n", "who sat").input_ids)
    assert f"{count} tokens" in found.error


def test_of_a_pair_the_longer_text_is_cut_first(word_pieces: Any) -> None:
    (result,) = encoded(word_pieces, Labelled("the cat sat on the mat", "who sat", 1), max_length=8, labels=["1"])
    assert word_pieces.decode(result.examples[0].input_ids) == "[CLS] the cat sat [SEP] who sat [SEP]"
    assert result.overlong


def test_several_labels_are_a_one_for_each_that_applies(word_pieces: Any) -> None:
    records = [Labelled("cat", None, ["red", "7"]), Labelled("cat", None, []), Labelled("cat", None, [7])]
    found = encoded(word_pieces, *records, labels=["7", "blue", "red"], problem_type=SEVERAL)
    assert [one.examples[0].labels for one in found] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert all(isinstance(part, float) for part in found[0].examples[0].labels)  # type: ignore[union-attr]


def test_a_number_is_a_float_whatever_it_was_written_as(word_pieces: Any) -> None:
    found = encoded(word_pieces, Labelled("cat", None, 2), Labelled("cat", None, -0.5), problem_type=NUMBER)
    labels = [one.examples[0].labels for one in found]
    assert labels == [2.0, -0.5]
    assert all(isinstance(label, float) for label in labels)


def test_one_class_is_the_same_however_it_was_written(word_pieces: Any) -> None:
    found = encoded(word_pieces, *[Labelled("cat", None, label) for label in (1, "1", 1.0)], labels=["0", "1"])
    assert [one.examples[0].labels for one in found] == [1, 1, 1]


@pytest.mark.parametrize(
    ("label", "problem", "words"),
    [
        ("hapy", SINGLE, "the label 'hapy' is never seen in training, which has 2 labels; did you mean 'happy'?"),
        (
            ["happy", "sda"],
            SEVERAL,
            "the label 'sda' is never seen in training, which has 2 labels; did you mean 'sad'?",
        ),
        (["happy"], SINGLE, "the label must be one class, found the list ['happy']"),
        ("happy", NUMBER, "the label must be a number for regression, found 'happy'"),
    ],
)
def test_a_label_that_does_not_fit_is_said(word_pieces: Any, label: Any, problem: str, words: str) -> None:
    (result,) = encoded(word_pieces, Labelled("cat", None, label), labels=["happy", "sad"], problem_type=problem)
    assert words in result.error
    assert not result.examples


def test_a_text_without_a_token_is_said(word_pieces: Any) -> None:
    (result,) = encoded(word_pieces, Labelled("\u200b", None, "a"), labels=["a"])
    assert (result.examples, result.problem) == ([], "the tokenizer finds no token in 'text'")


def test_a_row_over_length_is_cut_dropped_or_an_error_but_never_split(word_pieces: Any) -> None:
    long = Labelled("the cat sat on the mat", None, "a")
    for overlong, examples in (("truncate", 1), ("drop", 0), ("error", 0)):
        (result,) = encoded(word_pieces, long, max_length=5, labels=["a"], overlong=overlong)
        assert (len(result.examples), result.overlong) == (examples, True)
    assert result.error.startswith("8 tokens, where max_length is 5")
    assert result.error.endswith("(truncate or drop)")
    with pytest.raises(ConfigError, match="overlong: seq-cls cannot split a row"):
        encoded(word_pieces, long, labels=["a"], overlong="split")
