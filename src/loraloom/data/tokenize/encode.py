"""From records to token ids and labels: the entry point to the encoders of all tasks.

This file checks what must hold before any row is encoded. Encoders need a fast tokenizer, because only those give the
offsets of tokens in the text.
"""

from __future__ import annotations

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
    **settings: Any,
) -> Encoder:
    """The encoder of ``task``; no example is longer than ``max_length`` tokens. ``settings`` are those of ``Settings``.

    Raises:
        ConfigError: ``max_length`` has no room for text, or ``overlong`` is unknown.
        ModelError: the tokenizer is not a fast one, or the chat template is broken.
    """
    made = Settings(max_length, **settings)
    overlong = made.overlong
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
    return task.encoder(tokenizer, made)


def check_overlong(task: RowTask, overlong: str) -> None:
    """Raise ``ConfigError`` for ``split`` of rows that cannot be split."""
    if overlong == "split" and task.indivisible:
        raise ConfigError(
            f"overlong: {task.name} cannot split a row, for {task.indivisible}; choose truncate, drop or error"
        )
