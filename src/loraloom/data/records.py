"""The contents of a checked row, by kind: the interface between the shapes of data and the encoders.

Records are normalised: from files of any shape, encoders get only these. Their texts can be encoded as UTF-8.
Nothing here knows files, columns, tokenizers or tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: A message in OpenAI's form: ``role``, ``content``, and optionally ``tool_calls``, ``tool_call_id``, ``name``.
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Text:
    """causal-lm: a text. All its tokens are trained on."""

    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """causal-lm: a prompt, which may be empty, and a completion, which is trained on and not empty."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """causal-lm: a conversation. The assistant's messages are trained on.

    ``role`` is ``system``, ``developer``, ``user``, ``assistant`` or ``tool``. ``content`` is always a string (text
    parts of a list are joined; ``""`` beside tool calls if the file has null). A tool call is
    ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``, with ``id`` if the file has one; its
    arguments are an object, as chat templates expect (JSON text is parsed). Other keys of a message are kept unless
    null, for templates that use them (``reasoning_content``). ``weight`` is 0 for a message of the assistant that is
    not trained on, as in OpenAI's files, and for one in a prompt. ``tools`` are
    ``{"type": "function", "function": {...}}`` with the JSON schemas of the functions, or None.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Labelled:
    """seq-cls: a text, or a pair of texts, and its label.

    The label is a class (``str`` or ``int``), a finite number (``float``), or a list of the classes that apply, which
    may be empty.
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
    """seq2seq-lm: the encoder's input, and the decoder's target."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Asked:
    """question-answering: a question, a context, and the answers in the context.

    An answer is its text and its first character (from 0) in ``context``: ``context[start:]`` starts with the text,
    which has been checked. Without answers, the context does not answer the question.
    """

    question: str
    context: str
    answers: list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Related:
    """feature-extraction: two texts that belong together, and optionally a third that does not; or two and a score.

    ``score`` is the target cosine of the embeddings of the two texts, from -1 to 1.
    """

    texts: tuple[str, ...]
    score: float | None = None


Record = Text | Pair | Chat | Labelled | Tagged | Translated | Asked | Related

#: Fields that a model learns to predict; it reads the others.
_LEARNED = ("label", "tags", "target", "answers", "score")


def inputs(record: Record) -> tuple[Any, ...]:
    """The model's input. Rows with the same input must not be divided between training and evaluation."""
    return tuple(getattr(record, name) for name in record.__slots__ if name not in _LEARNED)
