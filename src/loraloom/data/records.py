"""What a checked row holds, by kind: the contract between the shapes of data and the encoders.

A record is normalised: whichever of the many shapes a file has, an encoder meets only these. Texts in them are
strings that can be written as UTF-8. Nothing here knows files, columns, tokenizers or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: A message in OpenAI's form: ``role``, ``content``, and where they apply ``tool_calls``, ``tool_call_id``, ``name``.
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """causal-lm: a text, every token of which is trained on."""

    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """causal-lm: a prompt, which may be empty, and the completion that is trained on, which is not."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """causal-lm: a conversation, trained on what the assistant says.

    ``role`` is ``system``, ``developer``, ``user``, ``assistant`` or ``tool``. ``content`` is a string always (the
    text parts of a list are joined; ``""`` beside tool calls where the file has null). A tool call is
    ``{"type": "function", "function": {"name": ..., "arguments": {...}}}`` with ``id`` where the file has one, its
    arguments an object (a JSON text is parsed), which is what chat templates take. Other keys of a message that are
    not null are passed on, for templates that know them (``reasoning_content``). ``weight`` is 0 on an assistant's
    message that is not to be trained on, as in OpenAI's files, and on one that is part of a prompt. ``tools`` are
    ``{"type": "function", "function": {...}}`` with the JSON schemas of the functions, or None.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Labelled:
    """seq-cls: a text, or a pair of texts, and its label.

    The label is a class (``str`` or ``int``), a number (``float``, always finite), or several classes (a list,
    which may be empty: none applies).
    """

    text: str
    second: str | None
    label: str | int | float | list[str | int]


@dataclass(frozen=True, slots=True)
class Tagged:
    """token-cls: words, one or more, and a tag for each."""

    tokens: list[str]
    tags: list[str | int]


@dataclass(frozen=True, slots=True)
class Translated:
    """seq2seq-lm: what the encoder reads, and what the decoder is to write."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Asked:
    """question-answering: a question, the text that it is asked of, and the answers in that text.

    An answer is its text and the character (from 0) of ``context`` at which it starts: ``context[start:]`` begins
    with it, which has been checked. No answers: the question cannot be answered from this context.
    """

    question: str
    context: str
    answers: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Related:
    """feature-extraction: two texts that belong together, and perhaps a third that does not; or two and their cosine.

    ``score`` is the cosine that the embeddings of the two texts should have, from -1 to 1.
    """

    texts: tuple[str, ...]
    score: float | None = None


Record = Text | Pair | Chat | Labelled | Tagged | Translated | Asked | Related

#: What a model is to learn of a row; the other fields it reads.
_LEARNED = ("label", "tags", "target", "answers", "score")


def inputs(record: Record) -> tuple[Any, ...]:
    """What the model reads of a record: rows of which that is the same are no test of each other."""
    return tuple(getattr(record, name) for name in record.__slots__ if name not in _LEARNED)
