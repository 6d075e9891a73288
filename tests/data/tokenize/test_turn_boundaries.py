"""Promises of where a turn starts and ends: what real templates do beside writing headings and one closing token.

The templates here are short ones that do the same as those of the models which are named beside them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from loraloom.data.example import IGNORE, EncodedRow, Settings
from loraloom.data.records import Chat
from loraloom.data.tokenize.chat import ChatEncoder
from loraloom.errors import ModelError

TOKENS = (
    "<|turn|> <|user|> <|bot|> <|system|> <|tool|> <|text|> <|/text|> <|call|> <|/call|> <|end|> <|stop|> "
    "<think> </think>"
)


@cache
def alphabet() -> str:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(["Hello there. It is fine, and the weather in Paris is grey."] * 3, trainer)
    return raw.to_str()


def tokenizer(template: str, eos: str = "<|end|>") -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(alphabet()), bos_token="<s>", eos_token=eos)
    made.add_special_tokens({"additional_special_tokens": TOKENS.split()})
    made.chat_template = template
    return made


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def bot(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(city: str = "Paris") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]


GREY = {"role": "tool", "content": "grey"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
TALK = [user("Hello"), bot("Hi."), user("So?"), bot("It is\n\nfine.")]
CALLS = [user("Paris?"), bot("", tool_calls=call()), GREY, bot("It is grey.")]
SPOKEN = [user("Paris?"), bot("Let me see.", tool_calls=call()), GREY, bot("It is grey.")]


def encoded(messages: list[dict[str, Any]], made: Any, tools: Any = None) -> EncodedRow:
    return ChatEncoder(made, Settings(9999)).encode([Chat(messages, tools)])[0]


def trained(messages: list[dict[str, Any]], made: Any, tools: Any = None) -> list[str]:
    """The stretches that carry the loss, in a row that is what the template writes."""
    result = encoded(messages, made, tools)
    assert not result.error, result.error
    (example,) = result.examples
    assert example.input_ids == made.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    assert isinstance(example.labels, list)
    stretches: list[list[int]] = [[]]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (IGNORE, token)
        if label == IGNORE:
            stretches.append([])
        else:
            stretches[-1].append(token)
    return [made.decode(stretch) for stretch in stretches if stretch]


# Where a turn ends ---------------------------------------------------------------------------------------------

#: As Command R7B: what is said has an end of its own, and then the turn ends.
TWO_ENDS = """\
{% for m in messages %}
{{- '<|turn|><|bot|><|text|>' + m.content + '<|/text|><|end|>' if m.role == 'assistant' }}
{{- '<|turn|><|user|>' + m.content + '<|end|>' if m.role == 'user' }}
{%- endfor %}"""
ASKS = "{% if add_generation_prompt %}<|turn|><|bot|><|text|>{% endif %}"


@pytest.mark.parametrize("eos", ["<|end|>", "<|stop|>"])
def test_a_turn_that_ends_with_two_tokens_is_trained_on_both(eos: str) -> None:
    words = ["Hi.<|/text|><|end|>", "It is\n\nfine.<|/text|><|end|>"]
    assert trained(TALK, tokenizer(TWO_ENDS + ASKS, eos)) == words
    assert trained(TALK[:2], tokenizer(TWO_ENDS + ASKS, eos)) == words[:1]


def test_the_names_of_parts_that_close_one_after_the_other_are_trained_on() -> None:
    # As Kimi K3: tokens with names between them.
    made = tokenizer(
        "{% for m in messages %}<|turn|>{{ m.role }}<|text|>{{ m.content }}<|/text|>text<|/text|>{{ m.role }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant<|text|>{% endif %}"
    )
    assert trained(TALK[:2], made) == ["Hi.<|/text|>text<|/text|>assistant<|end|>"]


def test_a_prompt_that_the_template_always_writes_is_no_part_of_the_end() -> None:
    # As Command R7B, and as GLM-Edge, which ends no turn: a heading stands at the end of every conversation.
    made = tokenizer(TWO_ENDS + "<|turn|><|bot|>")
    assert trained(TALK, made) == ["<|text|>Hi.<|/text|><|end|>", "<|text|>It is\n\nfine.<|/text|><|end|>"]
    made = tokenizer(
        "{% for m in messages %}<|{{ 'bot' if m.role == 'assistant' else m.role }}|>\n{{ m.content }}{% endfor %}"
        "<|bot|>"
    )
    assert [words.strip() for words in trained(TALK, made)] == ["Hi.", "It is\n\nfine."]
    assert any("does not learn to end them" in note for note in ChatEncoder(made, Settings(99)).notes)


def test_an_end_that_only_a_following_message_brings_is_trained_on_there() -> None:
    # As Apertus, Apriel 1.6 and Hy3: the last turn is left open.
    made = tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' %}<|turn|>bot:\n{{ m.content }}"
        "{{ '' if loop.last else '<|end|>' }}{% else %}<|turn|>user {{ m.content }}<|stop|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>bot:\n{% endif %}"
    )
    assert trained(TALK, made) == ["Hi.<|end|>", "It is\n\nfine."]
    assert trained([*TALK, user("And?")], made) == ["Hi.<|end|>", "It is\n\nfine.<|end|>"]
    assert any("only those that another message follows" in note for note in ChatEncoder(made, Settings(99)).notes)


def test_the_heading_of_the_next_message_is_no_end() -> None:
    # As GLM 4: nothing ends a turn but the next heading.
    made = tokenizer(
        "<s>{% for m in messages %}<|{{ 'bot' if m.role == 'assistant' else m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    assert trained([*TALK, user("And?")], made) == ["Hi.", "It is\n\nfine."]


def test_an_end_that_is_another_one_in_the_last_turn() -> None:
    # As gpt-oss, which writes <|return|> there: the other one is not what the model stops with.
    made = tokenizer(
        "{% for m in messages %}<|turn|>{{ m.role }}<|text|>{{ m.content }}"
        "{{ '<|stop|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant{% endif %}",
        eos="<|stop|>",
    )
    assert trained([user("Hello"), bot(" Hi.\n"), user("So?"), bot("Fine. ")], made) == [
        "<|text|> Hi.\n",  # with the white space that is the answer's own
        "<|text|>Fine. <|stop|>",
    ]


# Where a turn starts -------------------------------------------------------------------------------------------

#: As Cohere's and Nemotron's: a prompt that opens a thought, plain answers that open a text, and calls.
OPENS = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|turn|><|bot|>' }}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
{%- if m.tool_calls %}{{ '<|call|>[{"name": "' + m.tool_calls[0].function.name + '", "arguments": ' }}
{{- m.tool_calls[0].function.arguments | tojson + '}]<|/call|><|end|>' }}
{%- else %}{{ '<|text|>' + m.content + '<|/text|><|end|>' }}{% endif %}
{%- else %}{{ '<|turn|><|' + m.role + '|>' + m.content + '<|end|>' }}{% endif %}
{%- endfor %}"""
THINKS = "{% if add_generation_prompt %}<|turn|><|bot|><think>{% endif %}"
CALLED = '<|call|>[{"name": "weather", "arguments": {"city": "Paris"}}]<|/call|><|end|>'


@pytest.mark.parametrize("prompt", [THINKS, "<|turn|><|bot|><think></think>", "<|turn|><|bot|>"])
def test_a_turn_starts_where_it_parts_from_the_prompt(prompt: str) -> None:
    made = tokenizer(OPENS + prompt)
    assert trained(TALK[:2], made) == ["<|text|>Hi.<|/text|><|end|>"]
    assert trained(CALLS, made, TOOLS) == [CALLED, "<|text|>It is grey.<|/text|><|end|>"]


def test_a_turn_goes_on_from_the_prompt_as_far_as_that_goes() -> None:
    thought = [user("Hello"), bot("Hi.", reasoning_content="hm")]
    assert trained(thought, tokenizer(OPENS + THINKS)) == ["hm</think><|text|>Hi.<|/text|><|end|>"]
    # As Nemotron 3 and GLM 4.7: a turn without a thought has an empty one, which the prompt has opened.
    made = tokenizer(
        "{% for m in messages %}<|turn|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>"
        "{{ '\n' + m.reasoning_content + '\n' if m.reasoning_content and loop.last }}</think>{% endif %}{{ m.content }}"
        "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n<think>\n{% endif %}"
    )
    talk = [user("Hello"), bot("Hi.", reasoning_content="hm"), user("So?"), bot("Fine.", reasoning_content="well")]
    assert trained(talk, made) == ["</think>Hi.<|end|>", "well\n</think>Fine.<|end|>"]
    assert encoded(talk, made).left_out


def test_a_call_is_trained_on_whole_where_the_words_beside_it_are_not_written() -> None:
    made = tokenizer(OPENS + THINKS)
    assert trained(SPOKEN, made, TOOLS) == [CALLED, "<|text|>It is grey.<|/text|><|end|>"]
    assert encoded(SPOKEN, made, TOOLS).left_out
    # Where it cannot be told, that is an error, and not a call from the middle on.
    counted = tokenizer(OPENS.replace("'<|turn|><|bot|>'", "'<|turn|><|bot|>' + loop.revindex | string"))
    error = encoded([*SPOKEN, user("So?"), bot("Fine.")], counted, TOOLS).error
    assert "does not say where message 2 starts" in error


def test_a_beginning_that_is_written_differently_later_does_not_hide_the_heading() -> None:
    # As gpt-oss, which leaves thoughts out once an answer follows: no prompt is a beginning of the text.
    made = tokenizer(
        "{% set ns = namespace(final=false) %}"
        "{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.final = true %}{% endif %}"
        "{% endfor %}{% for m in messages %}{% if m.tool_calls %}"
        "{{ '' if ns.final else '<|turn|>assistant<think>' + m.content + '<|/text|>' }}"
        "<|turn|>assistant to={{ m.tool_calls[0].function.name }}<|text|>"
        "{{ m.tool_calls[0].function.arguments | tojson }}<|stop|>"
        "{% elif m.role == 'assistant' %}<|turn|>assistant<|text|>{{ m.content }}<|end|>"
        "{% else %}<|turn|>{{ m.role }}<|text|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant{% endif %}"
    )
    assert trained(SPOKEN, made, TOOLS) == [
        ' to=weather<|text|>{"city": "Paris"}<|stop|>',
        "<|text|>It is grey.<|end|>",
    ]


def test_a_system_message_that_moves_does_not_hide_where_a_turn_starts() -> None:
    # As Mistral's: it is written with the last question, or not at all once that is answered.
    made = tokenizer(
        "{% set last = messages[-1] %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{{ messages[0].content + '\n\n' if messages[0].role == 'system' and m == last }}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}<|end|>{% endif %}{% endfor %}"
    )
    system = {"role": "system", "content": "Be brief."}
    assert trained([system, *TALK], made) == [" Hi.<|end|>", " It is\n\nfine.<|end|>"]
    assert encoded([system, *TALK], made).left_out


INLINE = [user("Hello"), bot("<think>\nhm\n</think>\n\nHi.")]


@pytest.mark.parametrize(
    "content",
    [
        "m.content",  # as it stands
        "'<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip() + '\n</think>' "
        "+ m.content.split('</think>')[-1] if '</think>' in m.content else m.content",  # as Qwen3.5
    ],
)
def test_a_tag_that_the_prompt_has_written_is_not_trained_on(content: str) -> None:
    made = tokenizer(
        "{% for m in messages %}<|turn|>{{ m.role }}\n{{ " + content + " }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n<think>\n{% endif %}"
    )
    assert trained(INLINE, made) == ["hm\n</think>\n\nHi.<|end|>"]
    assert trained(TALK[:2], made) == ["Hi.<|end|>"]


# Calls, and templates that need tools --------------------------------------------------------------------------


def test_a_last_call_that_is_written_in_another_way_ends_with_the_token_of_answers() -> None:
    # As Apriel 1.5, which writes the id of a call only where a result follows.
    made = tokenizer(
        "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<|call|>"
        "{{ c.function.name }}{{ '' if loop.last and m == messages[-1] else ' id' }}{% endfor %}{{ '\n<|end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    assert trained(CALLS, made, TOOLS) == ["<|call|>weather id\n<|end|>", "It is grey.\n<|end|>"]
    assert trained(CALLS[:2], made, TOOLS) == ["<|call|>weather\n<|end|>"]


#: As Hermes 2 Pro's and Command R+'s for tools: fails without them, and instructions stand at the end of all.
NEEDS_TOOLS = """\
{%- for t in tools %}{{ '<|tool|>' + t.function.name }}{% endfor %}
{%- for m in messages %}{{ '<|turn|>' + m.role + '\\n' + m.content }}
{%- if m.tool_calls %}{{ 'Action: ' + m.tool_calls[0].function.name + '```\\n' }}{% else %}{{ '<|end|>' }}{% endif %}
{%- endfor %}{{ '<|turn|><|system|>Write an action.<|end|>' }}
{%- if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"""


def test_a_template_that_needs_tools_is_taken_and_what_it_always_adds_is_not_trained_on() -> None:
    made = tokenizer(NEEDS_TOOLS)
    assert trained(TALK[:2], made, TOOLS) == ["Hi.<|end|>"]
    assert trained(CALLS[:2], made, TOOLS) == ["Action: weather```"]
    assert trained(CALLS, made, TOOLS) == ["Action: weather```", "It is grey.<|end|>"]
    assert "line 1: 'NoneType' object is not iterable" in encoded(TALK, made).error


def test_a_template_that_fails_with_tools_as_well_is_told_by_its_first_fault() -> None:
    made = tokenizer("{% for t in tools %}{{ t.nothing.more }}{% endfor %}")
    with pytest.raises(ModelError, match="'NoneType' object is not iterable"):
        ChatEncoder(made, Settings(99))
