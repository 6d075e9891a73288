"""From records to token ids and labels: the entry point to the encoders of all tasks.

This file checks what must hold before any row is encoded. Encoders need a fast tokenizer, because only those give the
offsets of tokens in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.config.names import OVERLONG
from loraloom.data.example import Encoder, Settings
from loraloom.data.task import RowTask
from loraloom.errors import ConfigError, ModelError, nearest


def encoder(
    task: RowTask,
    tokenizer: Any,
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
    if overlong not in OVERLONG:
        raise ConfigError(
            f"overlong: {overlong!r} is not one of {', '.join(OVERLONG)}{nearest(str(overlong), OVERLONG)}"
        )
    check_overlong(task, overlong)
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, which says where in the text a token "
            f"starts; the model's folder needs a tokenizer.json"
        )
    room = tokenizer.num_special_tokens_to_add() + task.min_tokens
    if max_length < room:
        raise ConfigError(f"max_length: {max_length} leaves no room for text; give at least {room}")
    settings = Settings(max_length, overlong, tuple(labels), problem_type, chat_template, stride, date)
    return task.encoder(tokenizer, settings)


def check_overlong(task: RowTask, overlong: str) -> None:
    """Raise ``ConfigError`` for ``split`` of rows that cannot be split."""
    if overlong == "split" and task.indivisible:
        raise ConfigError(
            f"overlong: {task.name} cannot split a row, for {task.indivisible}; choose truncate, drop or error"
        )
