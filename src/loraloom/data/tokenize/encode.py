"""From records to token ids and labels: the one door to the encoders of all tasks.

This file knows which encoder a task has and what must be right before any row is encoded. What the loss is taken
on is known to each task's own file. Encoders need a fast tokenizer, because only those say where in the text a
token starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loraloom.config.lora import TaskType
from loraloom.config.names import OVERLONG, as_task
from loraloom.data.example import Encoder, Settings
from loraloom.data.tokenize.answers import AnswerEncoder
from loraloom.data.tokenize.causal import CausalEncoder
from loraloom.data.tokenize.labels import LabelEncoder
from loraloom.data.tokenize.tags import TagEncoder
from loraloom.data.tokenize.translations import TranslationEncoder
from loraloom.errors import ConfigError, ModelError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What makes the encoder of a task from a tokenizer and the settings, and the tokens it needs beside the special ones.
ENCODERS: dict[TaskType, tuple[Callable[[Any, Settings], Encoder], int]] = {
    TaskType.CAUSAL_LM: (CausalEncoder, 2),  # the first token is never predicted
    TaskType.SEQ_CLS: (LabelEncoder, 1),
    TaskType.TOKEN_CLS: (TagEncoder, 1),
    TaskType.SEQ_2_SEQ_LM: (TranslationEncoder, 1),
    TaskType.QUESTION_ANS: (AnswerEncoder, 2),
}


def encoder(
    task: TaskType | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    overlong: str = "truncate",
    labels: Sequence[str] = (),
    problem_type: str | None = None,
    chat_template: str | None = None,
    stride: int = 128,
    date: str | None = None,
) -> Encoder:
    """The encoder of ``task``; no example of it is longer than ``max_length`` tokens.

    ``overlong`` says what is done with a row of more tokens: ``error``, ``truncate`` (its end is cut off), ``drop``
    (left out and counted) or ``split`` (into several examples, where the task can). ``labels`` are the classes or
    tags in the order of their numbers, and ``date`` is the day that a chat template writes which writes one.

    Raises ``ConfigError`` for a ``max_length`` that has no room for text and an ``overlong`` that is unknown, and
    ``ModelError`` for a tokenizer that is not a fast one or a chat template that is broken.
    """
    kind = as_task(task)
    if overlong not in OVERLONG:
        raise ConfigError(
            f"overlong: {overlong!r} is not one of {', '.join(OVERLONG)}{nearest(str(overlong), OVERLONG)}"
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, which says where in the text a token "
            f"starts; the model's folder needs a tokenizer.json"
        )
    make, least = ENCODERS[kind]
    room = tokenizer.num_special_tokens_to_add() + least
    if max_length < room:
        raise ConfigError(f"max_length: {max_length} leaves no room for text; give at least {room}")
    return make(tokenizer, Settings(max_length, overlong, tuple(labels), problem_type, chat_template, stride, date))
