"""Promises of the encoding: what the loss is taken on, to the token, and what happens at ``max_length``."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loraloom.data.example import CHUNK, IGNORE, EncodedRow, Example
from loraloom.data.rows import Row
from loraloom.data.shape.shapes import recognise
from loraloom.data.tokenize.encode import encoder
from loraloom.errors import ConfigError, ModelError
from loraloom.tasks import TASKS

CALM = settings(max_examples=60, deadline=None)  # two cores are shared: a slow example is no failure
BOS, EOS, SEP = 0, 1, 2
SENTENCES = ["Label: yes no maybe", "the cat sat on the mat", "what is this? a cat"] * 3


def byte_level(single: str = "<s> $A", eos: str | None = "</s>", trim: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose words carry their leading space, as GPT-2, Llama 3 and Qwen have it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<sep>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(SENTENCES, trainer)
    ids = [(name, raw.token_to_id(name)) for name in specials]
    template = processors.TemplateProcessing(single=single, special_tokens=ids)
    raw.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), template])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=eos)


def bert_like() -> PreTrainedTokenizerFast:
    """Whole words between [CLS] and [SEP]; its file asks for padding and truncation, as MiniLM's does."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "on", "mat"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    raw.enable_padding(length=16)
    raw.enable_truncation(max_length=3)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


LLAMA = byte_level()


def encode(
    rows: list[Row], tokenizer: Any, task: str, max_length: int, labels: tuple[str, ...] = ("a", "b")
) -> list[EncodedRow]:
    made = encoder(TASKS[task], tokenizer, max_length=max_length, labels=labels)
    shape = recognise(rows, TASKS[task])
    return made.encode([(row, shape.read(row)) for row in rows])


def examples(results: list[EncodedRow]) -> list[Example]:
    return [example for result in results for example in result.examples]


def pair(prompt: str, completion: str, line: int = 1) -> Row:
    return Row({"prompt": prompt, "completion": completion}, line)


def one(row: Row, tokenizer: Any = LLAMA, max_length: int = 64) -> Example:
    return examples(encode([row], tokenizer, "causal-lm", max_length))[0]


def trained(example: Example, tokenizer: Any = LLAMA) -> str:
    """The text that the loss is taken on."""
    assert isinstance(example.labels, list)
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


# Classification -------------------------------------------------------------------------------------------


def test_a_text_keeps_its_special_tokens_and_its_label_becomes_the_place_in_the_list() -> None:
    rows = [Row({"text": "the cat", "label": "b"}, 1), Row({"text": "cat sat on the mat", "label": "a"}, 2)]
    encoded = encode(rows, bert_like(), "seq-cls", 6)
    assert examples(encoded) == [Example([2, 4, 5, 3], 1), Example([2, 5, 6, 7, 4, 3], 0)]
    assert [result.overlong for result in encoded] == [False, True]


def test_a_text_of_exactly_max_length_is_not_over_length() -> None:
    assert not encode([Row({"text": "the cat", "label": "a"}, 1)], bert_like(), "seq-cls", 4)[0].overlong


def test_a_label_outside_the_list_is_an_error_of_the_row() -> None:
    (result,) = encode([Row({"text": "cat", "label": "c"}, 7)], bert_like(), "seq-cls", 8)
    assert result.error.startswith("the label 'c' is never seen in training")
    assert result.examples == []


def test_a_text_without_a_token_has_nothing_to_train_on() -> None:
    raw = Tokenizer(models.BPE())  # knows no character at all, and has nothing to stand for the unknown
    bare = PreTrainedTokenizerFast(tokenizer_object=raw)
    (result,) = encode([Row({"text": "cat", "label": "a"}, 3)], bare, "seq-cls", 8)
    assert result.problem.startswith("the tokenizer finds no token")


def test_rows_beyond_one_chunk_of_the_tokenizer_keep_their_order() -> None:
    rows = [Row({"text": "the " * (1 + i % 7), "label": "ab"[i % 2]}, i + 1) for i in range(2 * CHUNK + 3)]
    found = examples(encode(rows, bert_like(), "seq-cls", 16))
    assert [len(example.input_ids) for example in found] == [3 + i % 7 for i in range(len(rows))]
    assert [example.labels for example in found] == [i % 2 for i in range(len(rows))]


# Completion -----------------------------------------------------------------------------------------------


@CALM
@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_the_tokens_are_those_of_the_whole_text_and_the_loss_is_on_the_completion(prompt: str, rest: str) -> None:
    # A completion that opens with a line break and a letter shares no token with any prompt.
    completion = "\nx" + rest
    example = one(pair(prompt + "?", completion), max_length=10_000)
    assert example.input_ids == [BOS, *LLAMA(prompt + "?" + completion, add_special_tokens=False).input_ids, EOS]
    assert isinstance(example.labels, list)
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    assert example.labels == [IGNORE] * first + example.input_ids[first:]
    assert LLAMA.decode(example.input_ids[1:first]) == prompt + "?"
    assert LLAMA.decode(example.input_ids[first:-1]) == completion


def test_the_opening_token_belongs_to_the_prompt_and_the_closing_one_to_the_completion() -> None:
    example = one(pair("Label:", " yes"))
    assert example.input_ids[0] == BOS
    assert example.labels[0] == IGNORE  # type: ignore[index]
    assert trained(example) == " yes</s>"


def test_an_empty_prompt_leaves_the_loss_on_all_of_the_completion() -> None:
    assert one(pair("", "the cat")) == one(Row({"text": "the cat"}, 1))


def test_a_plain_text_is_trained_on_in_full() -> None:
    example = one(Row({"text": "the cat"}, 1))
    assert example.labels == [IGNORE, *example.input_ids[1:]]
    assert trained(example) == "the cat</s>"


def test_every_special_token_in_front_is_masked() -> None:
    example = one(Row({"text": "the cat"}, 1), byte_level("<s> <sep> $A"))
    assert example.input_ids[:2] == [BOS, SEP]
    assert example.labels[:2] == [IGNORE, IGNORE]  # type: ignore[index]


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A"])
@pytest.mark.parametrize("completion", [" yes", " yes</s>"])
def test_the_end_token_is_there_once_whoever_puts_it_there(single: str, completion: str) -> None:
    tokenizer = byte_level(single)
    example = one(pair("Label:", completion), tokenizer)
    # A closing token written in the data is text like any other; the template's comes on top of it.
    written = single.endswith("</s>") and completion.endswith("</s>")
    assert example.input_ids.count(EOS) == 1 + written
    assert example.input_ids[-1] == EOS
    assert trained(example, tokenizer) == " yes</s>" + "</s>" * written


def test_a_tokenizer_without_an_end_token_gets_none() -> None:
    example = one(pair("Label:", " yes"), byte_level(eos=None))
    assert EOS not in example.input_ids
    assert trained(example) == " yes"


@pytest.mark.parametrize("trim", [True, False])
def test_a_token_over_the_boundary_is_counted_and_not_trained_on(trim: bool) -> None:
    encoded = encode([pair("the c", "at sat"), pair("the cat", " sat")], byte_level(trim=trim), "causal-lm", 64)
    assert [trained(example) for example in examples(encoded)] == [" sat</s>", " sat</s>"]
    assert [result.merged for result in encoded] == [True, False]


def test_a_completion_swallowed_by_the_prompts_last_token_is_said_with_the_remedy() -> None:
    rows = [pair("Label:", " no", 1), pair("Label: ", "yes", 2), pair("Label: ", "no", 3)]
    fine, *others = encode(rows, LLAMA, "causal-lm", 64)
    assert not fine.problem
    for result in others:
        assert result.examples == []
        assert result.merged
        for part in ("'completion'", "move that space"):
            assert part in result.problem


def test_a_long_row_is_cut_at_its_end_and_known() -> None:
    whole = one(pair("Label:", " yes no maybe"))
    encoded = encode([pair("Label:", " yes no maybe"), pair("Label:", " yes")], LLAMA, "causal-lm", 5)
    cut = examples(encoded)[0]
    assert cut.input_ids == whole.input_ids[:5]
    assert cut.labels == whole.labels[:5]  # type: ignore[index]
    assert EOS not in cut.input_ids
    assert [result.overlong for result in encoded] == [True, False]


def test_max_length_is_the_callers_and_not_the_one_in_the_tokenizers_settings() -> None:
    short = byte_level()
    short.model_max_length = 4
    assert one(pair("Label:", " yes no maybe"), short) == one(pair("Label:", " yes no maybe"))


def test_the_end_token_alone_beyond_max_length_is_over_length() -> None:
    row = pair("Label:", " yes")
    length = len(one(row).input_ids)
    assert not encode([row], LLAMA, "causal-lm", length)[0].overlong
    assert encode([row], LLAMA, "causal-lm", length - 1)[0].overlong


def test_rows_whose_prompt_fills_max_length_say_so_in_the_same_words() -> None:
    long = "the cat sat on the mat " * 3
    rows = [pair("Label:", " yes", 1), pair(long, "yes no", 5), pair(long, "no no", 9)]
    first, *others = [result.problem for result in encode(rows, LLAMA, "causal-lm", 8)]
    assert first == ""
    assert others[0] == others[1]
    for part in ("'completion'", "max_length=8"):
        assert part in others[0]


def test_a_text_whose_only_token_is_never_predicted_is_refused() -> None:
    bare = byte_level("$A", eos=None)
    (result,) = encode([Row({"text": "x"}, 1)], bare, "causal-lm", 64)
    assert result.problem.startswith("nothing of 'text' is left to train on")
    assert one(Row({"text": "xy"}, 1), bare).labels != []


# Limits ---------------------------------------------------------------------------------------------------


def test_a_max_length_without_room_for_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_length: 2 leaves no room for text; give at least 3"):
        encode([Row({"text": "cat", "label": "a"}, 1)], bert_like(), "seq-cls", 2)
    with pytest.raises(ConfigError, match="give at least 3"):
        one(pair("a", "b"), max_length=2)


def test_a_tokenizer_that_is_not_fast_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow is not a fast tokenizer"):
        one(pair("a", "b"), Slow())
