"""Promises of causal language models' rows: every trained token once, and what is done with rows over length."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loraloom.data.example import IGNORE, EncodedRow
from loraloom.data.records import Chat, Pair, Record, Text
from loraloom.data.rows import Row
from loraloom.data.tokenize.encode import encoder
from loraloom.errors import ConfigError, ModelError
from loraloom.tasks import TASKS

CALM = settings(max_examples=60, deadline=None)
BOS, EOS = 0, 1
ROW = Row({}, 1)


def words(single: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Whole words: word ``w7`` is token 7, so that ids can be read."""
    vocabulary = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 200)}}
    raw = Tokenizer(models.WordLevel(vocabulary))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def text(first: int, last: int) -> str:
    return " ".join(f"w{i}" for i in range(first, last + 1))


def one(record: Record, max_length: int, overlong: str = "truncate", made: Any = None) -> EncodedRow:
    return encoder(TASKS["causal-lm"], made or words(), max_length=max_length, overlong=overlong).encode(
        [(ROW, record)]
    )[0]


def shown(result: EncodedRow) -> list[tuple[list[int], list[int]]]:
    return [(example.input_ids, example.labels) for example in result.examples]  # type: ignore[misc]


I = IGNORE  # noqa: E741


def test_a_row_that_fits_is_the_same_whatever_is_done_with_longer_ones() -> None:
    for choice in ("error", "truncate", "drop", "split"):
        result = one(Pair("w2 w3", " w4 w5"), 6, choice)
        assert shown(result) == [([BOS, 2, 3, 4, 5, EOS], [I, I, I, 4, 5, EOS])]
        assert (result.overlong, result.merged, result.problem, result.error) == (False, False, "", "")


def test_a_row_over_length_is_cut_dropped_or_an_error_as_asked() -> None:
    record = Pair("w2 w3", " w4 w5")
    assert shown(one(record, 5)) == [([BOS, 2, 3, 4, 5], [I, I, I, 4, 5])]
    dropped, refused = one(record, 5, "drop"), one(record, 5, "error")
    assert (dropped.examples, dropped.overlong, dropped.problem, dropped.error) == ([], True, "", "")
    assert (refused.examples, refused.overlong) == ([], True)
    assert refused.error.startswith("6 tokens, where max_length is 5; ")


def test_a_split_text_becomes_windows_that_open_with_a_token_of_the_window_before() -> None:
    assert shown(one(Text(text(2, 9)), 5, "split")) == [
        ([BOS, 2, 3, 4, 5], [I, 2, 3, 4, 5]),
        ([BOS, 5, 6, 7, 8], [I, I, 6, 7, 8]),
        ([BOS, 8, 9, EOS], [I, I, 9, EOS]),
    ]
    assert shown(one(Text(text(2, 6)), 3, "split", words("$A"))) == [
        ([2, 3, 4], [2, 3, 4]),
        ([4, 5, 6], [I, 5, 6]),
        ([6, EOS], [I, EOS]),
    ]


def test_a_split_pair_keeps_its_prompt_in_the_first_window_and_half_a_window_of_context_in_the_others() -> None:
    assert shown(one(Pair(text(2, 4), " " + text(5, 12)), 7, "split")) == [
        ([BOS, 2, 3, 4, 5, 6, 7], [I, I, I, I, 5, 6, 7]),
        ([BOS, 5, 6, 7, 8, 9, 10], [I, I, I, I, 8, 9, 10]),
        ([BOS, 8, 9, 10, 11, 12, EOS], [I, I, I, I, 11, 12, EOS]),
    ]


def test_a_pair_whose_prompt_does_not_fit_cannot_be_split() -> None:
    result = one(Pair(text(2, 8), " w9"), 8, "split")
    assert result.error.startswith("the prompt alone has 8 tokens, where max_length is 8")
    assert one(Pair(text(2, 7), " " + text(8, 9)), 8, "split").error == ""


@CALM
@given(st.integers(0, 6), st.integers(1, 60), st.integers(8, 30))
def test_windows_train_every_token_of_the_completion_once_and_in_order(asked: int, said: int, limit: int) -> None:
    prompt = text(2, 1 + asked)
    record = Pair(prompt, " " + text(2 + asked, 1 + asked + said)) if asked else Text(text(2, 1 + said))
    result = one(record, limit, "split")
    trained = [label for example in result.examples for label in example.labels if label != IGNORE]  # type: ignore[union-attr]
    assert trained == [*range(2 + asked, 2 + asked + said), EOS]
    assert all(len(example.input_ids) == len(example.labels) <= limit for example in result.examples)  # type: ignore[arg-type]
    assert all(example.labels[0] == IGNORE for example in result.examples)  # type: ignore[index]


def test_a_prompt_that_fills_the_window_leaves_nothing_to_train_on() -> None:
    result = one(Pair(text(2, 8), " w9"), 8)
    assert result.examples == []
    assert result.overlong
    assert "nothing of 'completion' is left to train on within max_length=8" in result.problem


def test_texts_pairs_and_chats_of_one_chunk_keep_their_order() -> None:
    made = words()
    made.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    chat = Chat([{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}])
    both = encoder(TASKS["causal-lm"], made, max_length=9)
    assert both.notes == []  # no conversation was met yet
    results = both.encode([(ROW, Text("w5 w6")), (ROW, chat), (ROW, Pair("w7", " w8"))])
    assert [result.examples[0].input_ids for result in results] == [[BOS, 5, 6, EOS], [2, 3], [BOS, 7, 8, EOS]]
    assert results[1].examples[0].labels == [I, 3]


def test_a_broken_template_that_was_asked_for_is_told_before_any_row() -> None:
    with pytest.raises(ModelError, match="chat_template, line 1: "):
        encoder(TASKS["causal-lm"], words(), max_length=9, chat_template="{% if %}")


def test_an_unknown_choice_for_rows_over_length_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="overlong: 'truncat' is not one of .*; did you mean 'truncate'"):
        one(Text("w2"), 9, "truncat")


def test_no_records_are_no_examples() -> None:
    assert encoder(TASKS["causal-lm"], words(), max_length=9).encode([]) == []
