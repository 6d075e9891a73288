"""Promises of conversations: with any chat template, exactly what the assistant says carries the loss.

The templates of thirteen families lie in ``templates/``; what is trained on is written out here, by hand, for each.
"""

from __future__ import annotations

import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loraloom.data.example import IGNORE, EncodedRow, Settings
from loraloom.data.records import Chat
from loraloom.data.tokenize.chat import ChatEncoder
from loraloom.data.tokenize.templates import PLAIN, find_template
from loraloom.errors import ConfigError, ModelError

CALM = settings(max_examples=40, deadline=None)  # two cores are shared: a slow example is no failure
TEMPLATES = Path(__file__).parent / "templates"

#: The tokens of their own that each family's tokenizer has, beside ``<s>`` and ``</s>``.
TOKENS = {
    "chatml": "<|im_start|> <|im_end|>",
    "qwen3": "<|im_start|> <|im_end|> <think> </think>",
    "llama2": "",
    "llama3": "<|start_header_id|> <|end_header_id|> <|eot_id|>",
    "mistral": "[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
    "gemma": "<start_of_turn> <end_of_turn>",
    "phi3": "<|user|> <|assistant|> <|system|> <|end|> <|endoftext|>",
    "zephyr": "",
    "deepseek": "<｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> "
    "<｜tool▁call▁begin｜> <｜tool▁sep｜> <｜tool▁call▁end｜>",
    "command": "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>",
    "vicuna": "",
    "marked": "<|im_start|> <|im_end|>",
    "hostile": "<|end|>",
}
#: What each ends the assistant's turn with.
END = {
    "chatml": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "zephyr": "</s>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "command": "<|END_OF_TURN_TOKEN|>",
    "vicuna": "</s>",
    "marked": "<|im_end|>",
    "hostile": "<|end|>",
    PLAIN: "</s>",
}
#: Where the assistant's words follow the prompt after a space, which it has to write.
SPACED = {"llama2", "mistral", "vicuna"}
ALL = [*TOKENS, PLAIN]


@cache
def tokenizer(name: str = "chatml", trim: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained here, with a family's own tokens and template; ``PLAIN`` has no template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(
        ["Hello there, how are you today?\n\nI am fine.  The assistant said hello to a user."] * 3, trainer
    )
    opening = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    raw.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=trim), opening])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": TOKENS.get(name, "").split()})
    if name != PLAIN:
        made.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return made


def with_template(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the ChatML family with another template."""
    made = tokenizer.__wrapped__("chatml")
    made.chat_template = template
    return made


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


CALL = [{"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Paris"}}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def one(messages: list[dict[str, Any]], made: Any, tools: Any = None, **options: Any) -> EncodedRow:
    return ChatEncoder(made, Settings(**{"max_length": 9999, **options})).encode([Chat(messages, tools)])[0]


def trained(result: EncodedRow, made: Any) -> list[str]:
    """The stretches of text that the loss is taken on, and a check that each label is its own token."""
    assert not result.error
    assert not result.problem
    stretches: list[str] = []
    for example in result.examples:
        assert isinstance(example.labels, list)
        assert len(example.labels) == len(example.input_ids)
        current: list[int] = []
        for token, label in zip([*example.input_ids, 0], [*example.labels, IGNORE], strict=True):
            if label != IGNORE:
                assert label == token
                current.append(int(label))
            elif current:
                stretches.append(made.decode(current))
                current = []
    return stretches


def said(name: str, messages: list[dict[str, Any]], tools: Any = None, trim: bool = False) -> list[str]:
    made = tokenizer(name, trim)
    result = one(messages, made, tools)
    whole = made.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    assert result.examples[0].input_ids == whole  # the tokens are those that the model will see
    return trained(result, made)


# The families --------------------------------------------------------------------------------------------------

TALK = [user("Hello there"), bot("Hi, how are you?"), user("Fine. The time?"), bot("It is\n\n12:30.")]
FIRST, SECOND = "Hi, how are you?", "It is\n\n12:30."

BY_HAND = {
    "chatml": [FIRST + "<|im_end|>", SECOND + "<|im_end|>"],
    # Qwen3 writes an empty thought into the last answer only; its prompt does not, so the model has to.
    "qwen3": [FIRST + "<|im_end|>", "<think>\n\n</think>\n\n" + SECOND + "<|im_end|>"],
    "llama2": [" " + FIRST + " </s>", " " + SECOND + " </s>"],
    "llama3": [FIRST + "<|eot_id|>", SECOND + "<|eot_id|>"],
    "mistral": [" " + FIRST + "</s>", " " + SECOND + "</s>"],
    "gemma": [FIRST + "<end_of_turn>", SECOND + "<end_of_turn>"],
    "phi3": [FIRST + "<|end|>", SECOND + "<|end|>"],
    "zephyr": [FIRST + "</s>", SECOND + "</s>"],
    "deepseek": [FIRST + "<｜end▁of▁sentence｜>", SECOND + "<｜end▁of▁sentence｜>"],
    "command": [FIRST + "<|END_OF_TURN_TOKEN|>", SECOND + "<|END_OF_TURN_TOKEN|>"],
    "vicuna": [" " + FIRST + "</s>", " " + SECOND + "</s>"],
    "marked": [FIRST + "<|im_end|>", SECOND + "<|im_end|>"],
    # Every heading counts from the end, so no beginning of the conversation is written the same.
    "hostile": [FIRST + "<|end|>", SECOND + "<|end|>"],
    PLAIN: [FIRST + "</s>", SECOND + "</s>"],
}


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_each_familys_template_trains_the_assistants_words_and_the_end_of_its_turns(name: str, trim: bool) -> None:
    if name == PLAIN:
        made = tokenizer(name, trim)
        assert trained(one(TALK, made), made) == BY_HAND[name]
    else:
        assert said(name, TALK, trim=trim) == BY_HAND[name]


def test_a_whole_row_by_hand() -> None:
    made = tokenizer("llama3")
    result = one([user("Hello"), bot("fine")], made)
    head, end = made.convert_tokens_to_ids("<|start_header_id|>"), made.convert_tokens_to_ids("<|end_header_id|>")
    ids = {word: made(word, add_special_tokens=False).input_ids for word in ("user", "assistant", "\n\n", "Hello")}
    answer = [*made("fine", add_special_tokens=False).input_ids, made.convert_tokens_to_ids("<|eot_id|>")]
    before = [0, head, *ids["user"], end, *ids["\n\n"], *ids["Hello"], made.convert_tokens_to_ids("<|eot_id|>")]
    before += [head, *ids["assistant"], end, *ids["\n\n"]]
    assert result.examples[0].input_ids == before + answer
    assert result.examples[0].labels == [IGNORE] * len(before) + answer


@pytest.mark.parametrize("name", ALL)
def test_an_answer_of_weight_0_is_read_and_not_trained_on(name: str) -> None:
    made = tokenizer(name)
    weighed = one([user("a?"), bot("bad", weight=0), user("b?"), bot("good", weight=1)], made)
    plain = one([user("a?"), bot("bad"), user("b?"), bot("good")], made)
    assert weighed.examples[0].input_ids == plain.examples[0].input_ids
    assert trained(weighed, made) == trained(plain, made)[-1:]


@pytest.mark.parametrize("name", ALL)
def test_an_empty_answer_of_weight_0_is_no_obstacle(name: str) -> None:
    made = tokenizer(name)
    empty = one([user("a?"), bot("", weight=0), user("b?"), bot("good")], made)
    plain = one([user("a?"), bot("bad"), user("b?"), bot("good")], made)
    assert trained(empty, made) == trained(plain, made)[-1:]


def test_half_of_a_surrogate_pair_anywhere_in_a_conversation_is_an_error_of_that_row() -> None:
    made = with_template(
        "{{ tools | tojson }}{% for m in messages %}{{ m.note }}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    half = "a \ud83d b"
    call = {"type": "function", "function": {"name": "find", "arguments": {"q": half}}}
    encoder = ChatEncoder(made, Settings(9999))
    chats = [
        Chat([user("a"), bot("", tool_calls=[call])]),
        Chat([user("a"), bot("b", note=half)]),
        Chat([user("a"), bot("b")], [{"type": "function", "function": {"name": "f", "description": half}}]),
        Chat([user("a"), bot("b")]),
    ]
    *wrong, right = encoder.encode(chats)
    for result in wrong:
        assert "half of a surrogate pair" in result.error
        assert r"a \ud83d b" in result.error
    assert trained(right, made) == ["b<|im_end|>"]


@pytest.mark.parametrize("name", [n for n in ALL if n != "gemma"])
def test_a_system_message_is_not_trained_on(name: str) -> None:
    made = tokenizer(name)
    words = trained(one([system("Be brief."), *TALK], made), made)
    assert words == trained(one(TALK, made), made)
    assert "brief" not in "".join(words)


def test_a_system_message_that_the_template_refuses_is_an_error_of_the_row_in_the_templates_words() -> None:
    result = one([system("Be brief."), *TALK], tokenizer("gemma"))
    assert result.examples == []
    assert "System role not supported" in result.error


def test_roles_that_the_template_refuses_are_an_error_of_that_row_alone() -> None:
    encoder = ChatEncoder(tokenizer("llama2"), Settings(9999))
    first, second = encoder.encode([Chat([user("a"), user("b"), bot("c")]), Chat(TALK)])
    assert "Conversation roles must alternate" in first.error
    assert not second.error
    assert len(second.examples) == 1


def test_a_default_system_prompt_of_the_template_is_not_trained_on() -> None:
    made = tokenizer("chatml")
    result = one(TALK, made)
    assert made.decode(result.examples[0].input_ids).startswith("<|im_start|>system\nYou are a helpful assistant.")
    assert trained(result, made) == BY_HAND["chatml"]


def test_there_is_one_opening_token_where_template_and_tokenizer_both_write_one() -> None:
    made = tokenizer("llama3")
    assert made("x").input_ids[0] == 0  # the tokenizer puts one before every text by itself
    assert one(TALK, made).examples[0].input_ids.count(0) == 1


def test_a_tokenizer_of_the_sentencepiece_kind_trains_the_same_words() -> None:
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    raw.train_from_iterator(["Hello there, how are you today? I am fine. [INST] It is 12:30 [/INST]"] * 3, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for name in ("llama2", "vicuna"):
        made.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        result = one([user("Hello there"), bot("I am fine é🙂."), user("Hello"), bot("It is")], made)
        parts = [word.replace(" ", "") for word in trained(result, made)]
        assert parts == ["Iamfineé🙂.</s>", "Itis</s>"]
        assert not result.merged


def test_an_answer_that_repeats_the_question_and_the_heading_is_told_apart() -> None:
    text = "<|im_start|>assistant\nHello"
    made = tokenizer("chatml")
    talk = [user("assistant\nHello"), bot("assistant\nHello"), user("Hello"), bot("Hello")]
    assert trained(one(talk, made), made) == ["assistant\nHello<|im_end|>", "Hello<|im_end|>"]
    assert text in made.decode(one(talk, made).examples[0].input_ids)


def test_one_character_the_same_from_everyone() -> None:
    for name in ALL:
        made = tokenizer(name)
        words = trained(one([user("a"), bot("a"), user("a"), bot("a")], made), made)
        assert [word.split("</think>")[-1].strip() for word in words] == ["a" + END[name]] * 2 or name == "llama2"


def test_a_conversation_that_the_assistant_opens() -> None:
    for name in ("chatml", "llama3", "phi3", "zephyr", "vicuna", PLAIN):
        made = tokenizer(name)
        assert [w.strip() for w in trained(one([bot("Hi!"), user("So?"), bot("Yes")], made), made)] == [
            "Hi!" + END[name],
            "Yes" + END[name],
        ]


def test_a_question_at_the_end_is_not_trained_on() -> None:
    made = tokenizer("chatml")
    assert trained(one([*TALK, user("And?")], made), made) == BY_HAND["chatml"]


def test_two_answers_in_a_row_are_both_trained_on() -> None:
    made = tokenizer("chatml")
    assert trained(one([user("a"), bot("One."), bot("Two.")], made), made) == ["One.<|im_end|>", "Two.<|im_end|>"]


# White space, thoughts and tools -------------------------------------------------------------------------------


def test_white_space_around_an_answer_is_trained_on_as_the_template_writes_it() -> None:
    talk = [user("Hello"), bot("  Hi!\n"), user("So?"), bot("\n\nYes ")]
    assert said("chatml", talk) == ["  Hi!\n<|im_end|>", "\n\nYes <|im_end|>"]
    assert said("llama3", talk) == ["Hi!<|eot_id|>", "Yes<|eot_id|>"]
    assert said("gemma", talk) == ["Hi!<end_of_turn>", "Yes<end_of_turn>"]
    assert said("deepseek", talk) == ["  Hi!\n<｜end▁of▁sentence｜>", "\n\nYes <｜end▁of▁sentence｜>"]


THOUGHT = [user("Hello"), bot("<think>\nhm\n</think>\n\nHi!"), user("So?"), bot("<think>\nwell\n</think>\n\nYes")]


def test_reasoning_that_the_template_drops_from_earlier_turns_is_told_and_the_last_is_trained_on() -> None:
    result = one(THOUGHT, tokenizer("qwen3"))
    assert trained(result, tokenizer("qwen3")) == ["Hi!<|im_end|>", "<think>\nwell\n</think>\n\nYes<|im_end|>"]
    assert result.left_out


def test_reasoning_in_a_field_of_its_own_is_trained_on_where_the_template_writes_it() -> None:
    talk = [user("Hello"), bot("Hi!", reasoning_content="hm"), user("So?"), bot("Yes", reasoning_content="well")]
    result = one(talk, tokenizer("qwen3"))
    assert trained(result, tokenizer("qwen3")) == ["Hi!<|im_end|>", "<think>\nwell\n</think>\n\nYes<|im_end|>"]
    assert result.left_out
    other = one(talk, tokenizer("llama3"))
    assert trained(other, tokenizer("llama3")) == ["Hi!<|eot_id|>", "Yes<|eot_id|>"]
    assert other.left_out


def test_reasoning_is_text_like_any_other_to_a_template_that_does_not_know_it() -> None:
    assert said("chatml", THOUGHT) == [
        "<think>\nhm\n</think>\n\nHi!<|im_end|>",
        "<think>\nwell\n</think>\n\nYes<|im_end|>",
    ]


def test_a_prompt_that_opens_a_thought_which_the_turns_do_not_have() -> None:
    # DeepSeek-R1 prompts with <think>, and drops thoughts from every turn: no prompt is a beginning of the text.
    assert said("deepseek", THOUGHT) == ["\n\nHi!<｜end▁of▁sentence｜>", "\n\nYes<｜end▁of▁sentence｜>"]


def test_tool_calls_are_trained_on_as_written_and_what_tools_answer_is_not() -> None:
    result = {"role": "tool", "content": '{"sky": "grey"}', "tool_call_id": "abcdefghi"}
    talk = [user("Paris?"), bot("", tool_calls=CALL), result, bot("It is grey."), user("Thanks"), bot("Fine.")]
    call = '{"name": "weather", "arguments": {"city": "Paris"}}'
    assert said("chatml", talk, TOOLS) == [
        f"<tool_call>\n{call}\n</tool_call><|im_end|>",
        "It is grey.<|im_end|>",
        "Fine.<|im_end|>",
    ]
    assert said("mistral", talk, TOOLS) == [f"[TOOL_CALLS] [{call}]</s>", " It is grey.</s>", " Fine.</s>"]
    assert said("deepseek", talk, TOOLS) == [
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜end▁of▁sentence｜>',
        "It is grey.<｜end▁of▁sentence｜>",
        "Fine.<｜end▁of▁sentence｜>",
    ]
    made = tokenizer(PLAIN)
    assert trained(one(talk, made, TOOLS), made) == [
        f"<tool_call>{call}</tool_call></s>",
        "It is grey.</s>",
        "Fine.</s>",
    ]


def test_words_beside_tool_calls_and_several_calls_are_trained_on() -> None:
    talk = [user("Paris?"), bot("Let me see.", tool_calls=CALL * 2)]
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert said("chatml", talk, TOOLS) == [f"Let me see.\n{call}\n{call}<|im_end|>"]
    dropped = one(talk, tokenizer("mistral"), TOOLS)
    assert "Let me" not in "".join(trained(dropped, tokenizer("mistral")))
    assert dropped.left_out


def test_tool_calls_that_the_template_does_not_write_are_an_error() -> None:
    result = one([user("Paris?"), bot("", tool_calls=CALL)], tokenizer("llama3"), TOOLS)
    assert "does not write the tool calls of message 2" in result.error


def test_a_template_that_takes_arguments_as_text_and_writes_an_empty_answer_after_the_calls() -> None:
    made = with_template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% for call in m.tool_calls or [] %}"
        "<|im_start|>call {{ call.function.name + ' ' + call.function.arguments }}<|im_end|>{% endfor %}"
        "<|im_start|>bot {{ m.content }}<|im_end|>"
        "{% else %}<|im_start|>{{ m.role + ' ' + m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    result = one([user("Paris?"), bot("", tool_calls=CALL), user("So?"), bot("Grey.")], made)
    assert trained(result, made) == ['call weather {"city": "Paris"}<|im_end|>', "bot Grey.<|im_end|>"]


# Templates that cannot be trusted ------------------------------------------------------------------------------

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def test_a_template_that_changes_what_the_assistant_says_is_an_error() -> None:
    for change in ("m.content | upper", "m.content | replace('e', '3')", "m.content[:5]"):
        result = one(TALK, with_template(HEAD + "{{ " + change + " }}" + TAIL))
        assert result.examples == []
        assert "what to train on cannot be told with certainty" in result.error


def test_a_template_that_changes_what_the_user_says_is_no_obstacle() -> None:
    made = with_template(HEAD + "{{ m.content | upper if m.role == 'user' else m.content }}" + TAIL)
    assert trained(one(TALK, made), made) == BY_HAND["chatml"]


def test_a_template_that_drops_an_answer_is_an_error() -> None:
    made = with_template(HEAD + "{{ m.content if loop.last or m.role == 'user' }}" + TAIL)
    assert "does not write what the assistant says in message 2" in one(TALK, made).error


def test_a_template_that_repeats_an_answer_is_an_error() -> None:
    made = with_template(HEAD + "{{ m.content + m.content }}" + TAIL)
    assert "more than once" in one(TALK, made).error


def test_a_template_that_writes_the_users_words_into_the_answer_is_an_error() -> None:
    made = with_template(HEAD + "{{ m.content + (messages[0].content if m.role == 'assistant' else '') }}" + TAIL)
    result = one(TALK, made)
    assert result.examples == []
    assert result.error


def test_an_answer_of_nothing_is_an_error() -> None:
    assert "has nothing to write for message 2" in one([user("a"), bot("  ")], tokenizer("chatml")).error


def test_headings_are_not_trained_on_where_the_template_has_no_prompt_for_the_assistant() -> None:
    made = with_template(HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}")
    assert trained(one(TALK, made), made) == BY_HAND["chatml"]


def test_an_end_that_only_the_last_turn_has_is_trained_on_there() -> None:
    made = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if loop.last else '\\n' }}{% endfor %}"
    )
    words = trained(one(TALK, made), made)
    assert [word.strip() for word in words] == [FIRST, SECOND + "</s>"]


def test_a_template_that_ends_no_turn_is_said_aloud() -> None:
    made = with_template("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}")
    encoder = ChatEncoder(made, Settings(9999))
    assert any("does not learn to end them" in note for note in encoder.notes)
    assert trained(encoder.encode([Chat(TALK)])[0], made) == [FIRST, SECOND]


def test_generation_marks_agree_where_they_are_right_and_are_not_trusted_where_they_are_not() -> None:
    # The template in the file marks the heading and not the end, as some models' do.
    made = tokenizer("marked")
    ours = one(TALK, made)
    theirs = made.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert [label != IGNORE for label in ours.examples[0].labels] != [bool(mark) for mark in theirs]  # type: ignore[union-attr]
    right = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ours = one(TALK, right)
    theirs = right.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert [label != IGNORE for label in ours.examples[0].labels] == [bool(mark) for mark in theirs]  # type: ignore[union-attr]


# Which template ------------------------------------------------------------------------------------------------


def test_a_template_with_an_error_in_it_is_told_with_its_line() -> None:
    with pytest.raises(ModelError, match="the tokenizer's chat template, line 2: .*endfor"):
        ChatEncoder(with_template("{% for m in messages %}\n{% endfr %}"), Settings(99))
    with pytest.raises(ModelError, match="line 2: 'conversation' is undefined"):
        ChatEncoder(with_template("{{ bos_token }}\n{{ conversation[0] }}"), Settings(99))


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y"])  # of Llama 3.2, gpt-oss and Granite
def test_a_template_that_writes_the_date_writes_the_day_that_it_is_given(form: str) -> None:
    day = "{%- if strftime_now is defined %}{{ strftime_now('" + form + "') }}{% endif %}"
    made = with_template(day + HEAD + "{{ m.content }}" + TAIL)
    texts = {}
    for date in ("2024-07-26", "1999-01-02", None):
        result = one(TALK, made, date=date)
        assert trained(result, made) == BY_HAND["chatml"]
        texts[date] = made.decode(result.examples[0].input_ids)
    for date in ("2024-07-26", "1999-01-02"):
        assert texts[date].startswith(datetime.datetime.fromisoformat(date).strftime(form))
    assert texts[None] == made.apply_chat_template(TALK, tokenize=False)
    assert find_template(made).dated
    assert not find_template(tokenizer("chatml")).dated
    assert not find_template(made, PLAIN).dated
    fails = "\n{% for m in messages %}\n{{ m.content }}{{ 1 // (m.content | length - 9) }}{% endfor %}"
    broken = with_template(day + fails)
    assert "line 3: integer division or modulo by zero" in one([user("ninechars"), bot("b")], broken, date=date).error


def test_a_template_is_rendered_in_a_sandbox() -> None:
    made = with_template("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ModelError, match="unsafe"):
        ChatEncoder(made, Settings(99))


def test_a_template_that_fails_on_one_row_is_an_error_of_that_row_with_its_line() -> None:
    made = with_template(HEAD + "{{ m.content }}\n{% if 'x!' in m.content %}{{ m.nothing.more }}{% endif %}" + TAIL)
    result = one([user("x!"), bot("a")], made)
    assert "line 3" in result.error
    assert "has no attribute 'nothing'" in result.error


def test_a_template_from_a_file_or_as_text_goes_before_the_tokenizers_own(tmp_path: Path) -> None:
    made = tokenizer("chatml")
    (tmp_path / "mine.jinja").write_text((TEMPLATES / "zephyr.jinja").read_text())
    for choice in (str(tmp_path / "mine.jinja"), (TEMPLATES / "zephyr.jinja").read_text()):
        assert trained(one(TALK, made, chat_template=choice), made) == BY_HAND["zephyr"]
    (tmp_path / "broken.jinja").write_text("\n{{ 1 +")
    with pytest.raises(ModelError, match=r"broken\.jinja, line 2: "):
        one(TALK, made, chat_template=str(tmp_path / "broken.jinja"))
    with pytest.raises(ConfigError, match="neither a file nor a template"):
        one(TALK, made, chat_template="nowhere.jinja")
    with pytest.raises(ConfigError, match="did you mean 'loraloom-plain'"):
        one(TALK, made, chat_template="loraloom-plan")
    with pytest.raises(ConfigError, match="neither a file"):
        one(TALK, made, chat_template=str(tmp_path))


def test_the_plain_template_is_used_and_told_where_there_is_none() -> None:
    made = tokenizer(PLAIN)
    encoder = ChatEncoder(made, Settings(9999))
    assert any(PLAIN in note for note in encoder.notes)
    result = encoder.encode([Chat([system("Be brief."), *TALK])])[0]
    assert made.decode(result.examples[0].input_ids) == (
        f"<s>### System:\nBe brief.\n\n### User:\nHello there\n\n### Assistant:\n{FIRST}</s>\n\n"
        f"### User:\nFine. The time?\n\n### Assistant:\n{SECOND}</s>"
    )
    assert ChatEncoder(tokenizer("chatml"), Settings(9999)).notes == []
    assert find_template(tokenizer("chatml"), PLAIN).plain


def test_the_plain_template_ends_turns_where_the_tokenizer_has_no_end_token() -> None:
    made = tokenizer.__wrapped__(PLAIN)
    made.eos_token = None
    assert trained(one(TALK, made), made) == [FIRST + "\n### End", SECOND + "\n### End"]


def test_a_tokenizer_with_several_templates_has_one_chosen_by_name() -> None:
    made = tokenizer.__wrapped__("chatml")
    made.chat_template = {"default": made.chat_template, "short": (TEMPLATES / "zephyr.jinja").read_text()}
    assert trained(one(TALK, made), made) == BY_HAND["chatml"]
    assert trained(one(TALK, made, chat_template="short"), made) == BY_HAND["zephyr"]
    made.chat_template = {"short": (TEMPLATES / "zephyr.jinja").read_text()}
    with pytest.raises(ConfigError, match="choose one by its name"):
        ChatEncoder(made, Settings(99))


# Length --------------------------------------------------------------------------------------------------------

LONG = [system("Be brief."), *[m for i in range(6) for m in (user(f"How is {i}?"), bot(f"It is {i}, fine."))]]


def test_a_long_conversation_is_cut_dropped_or_an_error_as_asked() -> None:
    made = tokenizer("chatml")
    whole = one(LONG, made)
    length = len(whole.examples[0].input_ids)
    cut = one(LONG, made, max_length=40)
    assert cut.examples[0].input_ids == whole.examples[0].input_ids[:40]
    assert cut.overlong
    dropped = one(LONG, made, max_length=40, overlong="drop")
    assert (dropped.examples, dropped.overlong, dropped.error) == ([], True, "")
    assert f"{length} tokens, where max_length is 40" in one(LONG, made, max_length=40, overlong="error").error
    for choice in ("error", "drop", "split"):
        assert one(LONG, made, max_length=length, overlong=choice).examples == whole.examples


def test_a_long_conversation_is_split_between_exchanges_with_the_system_message_in_each_part() -> None:
    made = tokenizer("chatml")
    result = one(LONG, made, max_length=100, overlong="split")
    assert result.overlong
    assert len(result.examples) > 1
    assert trained(result, made) == trained(one(LONG, made), made)  # each answer once, in order
    for example in result.examples:
        assert len(example.input_ids) <= 100
        assert made.decode(example.input_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")


def test_an_exchange_that_does_not_fit_by_itself_is_an_error() -> None:
    talk = [*LONG, user("How?"), bot("It is fine. " * 60)]
    error = one(talk, tokenizer("chatml"), max_length=100, overlong="split").error
    assert "exchange 7 of the conversation with the system message is longer than max_length=100" in error


@pytest.mark.parametrize("length", [60, 90, 120])
def test_exchanges_of_weight_0_are_no_obstacle_to_a_split(length: int) -> None:
    made = tokenizer("chatml")
    quiet = [m for i in range(4) for m in (user(f"Is it {i}?"), bot(f"No, not {i}.", weight=0))]
    for talk in ([*quiet, *LONG[1:]], [*LONG[1:], *quiet], [*LONG[1:7], *quiet, *LONG[7:]]):
        result = one(talk, made, max_length=length, overlong="split")
        assert result.overlong
        assert trained(result, made) == trained(one(LONG[1:], made), made)  # each answer once, in order
        assert all(len(example.input_ids) <= length for example in result.examples)
        assert all(any(label != IGNORE for label in example.labels) for example in result.examples)
    # Where there is room, they are what goes before an answer.
    if length == 120:
        first = one([*quiet, *LONG[1:]], made, max_length=length, overlong="split").examples[0]
        assert "No, not 3." in made.decode(first.input_ids)


def test_an_exchange_of_weight_0_that_does_not_fit_is_left_out_of_a_split() -> None:
    made = tokenizer("chatml")
    talk = [user("How?"), bot("It is fine. " * 60, weight=0), *LONG[1:]]
    result = one(talk, made, max_length=100, overlong="split")
    assert trained(result, made) == trained(one(LONG[1:], made), made)


def test_a_conversation_cut_before_the_first_answer_has_nothing_to_train_on() -> None:
    result = one([user("How is it? " * 40), bot("Fine.")], tokenizer("chatml"), max_length=40)
    assert result.examples == []
    assert "nothing of what the assistant says is left to train on within max_length=40" in result.problem


def test_a_conversation_without_an_answer_has_nothing_to_train_on() -> None:
    assert one([user("Hello?")], tokenizer("chatml")).problem == "the assistant says nothing in the conversation"


# Any conversation ----------------------------------------------------------------------------------------------

#: Words with what trips templates: tags, brackets, braces, line breaks, spaces at both ends, other alphabets.
WORDS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
        st.sampled_from(
            [
                "\n",
                "  ",
                "<b>",
                "</i>",
                "{{ x }}",
                "{%",
                "[INST]",
                "</s>",
                "<|im_end|>\n",
                '"',
                "\\",
                "USER:",
                "### User:\n",
                "é🙂",
            ]
        ),
    ),
    min_size=1,
    max_size=5,
).map("".join)
FREE = WORDS.filter(lambda text: bool(text.strip()))


@CALM
@given(st.sampled_from([n for n in ALL if n != "qwen3"]), st.lists(st.tuples(FREE, FREE), min_size=1, max_size=4))
def test_of_any_conversation_the_answers_and_their_ends_are_trained_on(name: str, pairs: list[tuple[str, str]]) -> None:
    made = tokenizer(name)
    talk = [message for question, answer in pairs for message in (user(question), bot(answer))]
    words = trained(one(talk, made), made)
    trims = name in {"llama2", "llama3", "gemma", "command", "vicuna", "hostile"}
    expected = []
    for _, answer in pairs:
        lead = " " if name in SPACED else ""
        expected.append(lead + (answer.strip() if trims else answer) + END[name])
    if name == "hostile":  # where the turn starts is known by its words alone, and a space is part of the first token
        words = [word.removeprefix(" ") for word in words]
    assert words == expected
