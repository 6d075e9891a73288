"""From records to token ids and labels: the one door to the encoders of all tasks.

This file knows which encoder a task has and what must be right before any row is encoded. What the loss is taken
on is known to each task's own file. Encoders need a fast tokenizer, because only those say where in the text a
token starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraloom.config import TaskType
from loraloom.data.answers import AnswerEncoder
from loraloom.data.causal import CausalEncoder
from loraloom.data.example import CHUNK, IGNORE, OVERLONG, Encoded1, Encoder, Example, Settings
from loraloom.data.labels import LabelEncoder
from loraloom.data.records import Labelled, Pair, Record, Text
from loraloom.data.rows import Row, as_task, check_columns, label_ids, label_name
from loraloom.data.tags import TagEncoder
from loraloom.data.translations import TranslationEncoder
from loraloom.errors import ConfigError, DataError, ModelError, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

__all__ = ["CHUNK", "ENCODERS", "IGNORE", "Encoded", "Encoded1", "Encoder", "Example", "Settings", "encode", "encoder"]

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
) -> Encoder:
    """The encoder of ``task``; no example of it is longer than ``max_length`` tokens.

    ``overlong`` says what is done with a row of more tokens: ``error``, ``truncate`` (its end is cut off), ``drop``
    (left out and counted) or ``split`` (into several examples, where the task can). ``labels`` are the classes or
    tags in the order of their numbers.

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
    return make(tokenizer, Settings(max_length, overlong, tuple(labels), problem_type, chat_template, stride))


@dataclass(frozen=True, slots=True)
class Encoded:
    """Examples in the order of the rows, and what was done to them.

    ``truncated`` rows were cut to ``max_length``; ``merged`` rows have a token that spans the end of the
    prompt and the start of the completion, and is not trained on; ``tokens`` is the total after cutting.
    """

    examples: list[Example]
    truncated: int
    merged: int
    tokens: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example.input_ids) for example in self.examples]


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    task: TaskType | str,
    max_length: int,
    path: str | Path,
    labels: Sequence[str] = (),
) -> Encoded:
    """All ``rows`` at once for ``task`` (seq-cls: text and label; causal-lm: prompt and completion, or text).

    ``path`` is only named in errors. Raises ``DataError`` for rows that do not fit the task or leave nothing to
    train on, and what ``encoder`` raises.
    """
    kind = as_task(task)
    made = encoder(kind, tokenizer, max_length=max_length, labels=labels)
    if not rows:
        return Encoded([], truncated=0, merged=0, tokens=0)
    columns = check_columns(rows, kind, path)
    if kind is TaskType.SEQ_CLS:
        label_ids(rows, labels, path)
    results: list[Encoded1] = []
    for start in range(0, len(rows), CHUNK):
        results += made.encode([(row, _record(row, columns)) for row in rows[start : start + CHUNK]])
    for row, result in zip(rows, results, strict=True):
        if result.problem or result.error:
            alike = sum(other.problem == result.problem for other in results) if result.problem else 1
            raise DataError(f"{path}, line {row.line}: {result.problem or result.error} (rows like this: {alike})")
    examples = [example for result in results for example in result.examples]
    return Encoded(
        examples,
        truncated=sum(result.overlong for result in results),
        merged=sum(result.merged for result in results),
        tokens=sum(len(example.input_ids) for example in examples),
    )


def _record(row: Row, columns: tuple[str, ...]) -> Record:
    fields = row.fields
    if "label" in columns:
        return Labelled(fields["text"], None, label_name(row))
    return Pair(fields["prompt"], fields["completion"]) if "prompt" in columns else Text(fields["text"])
