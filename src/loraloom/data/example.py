"""The interface between the tasks' encoders and their caller: settings, examples, encoded rows, rows over length.

Nothing here knows a task, a file or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loraloom.data.records import Record
from loraloom.data.rows import Row

#: The label of a position that the loss leaves out (what ``torch.nn.functional.cross_entropy`` ignores).
IGNORE = -100

#: Maximum number of rows to tokenize together: enough for the tokenizer's threads; their offsets fit in memory.
CHUNK = 1000


@dataclass(slots=True)
class Example:
    """The model's input for one row, or for a part of it.

    ``labels`` by task: a class id (seq-cls), a number (regression), 0.0 or 1.0 for each class (several labels); one
    label per token, ``IGNORE`` for tokens that are not in the loss (causal-lm, token-cls); the target's ids, of any
    length (seq2seq-lm); first and last token of the answer (question-answering). ``token_type_ids`` are for models that
    distinguish two segments.
    """

    input_ids: list[int]
    labels: int | float | list[int] | list[float]
    token_type_ids: list[int] | None = None


@dataclass(slots=True)
class EncodedRow:
    """One row, encoded: its examples (none, one, or several where it was split), and what was done to it.

    ``problem``: why the row has no trained token, with the same text for all rows of this kind. ``error``: what is
    wrong with this row, to append to its place (an unknown label, a conversation that the chat template refuses, a row
    over length if that is an error). A row with either has no examples.

    ``overlong``: the row had more than ``max_length`` tokens. ``merged``: a token spans trained and other text, and is
    excluded from the loss. ``left_out``: the chat template omits a part of the row, such as the reasoning of earlier
    turns.
    """

    examples: list[Example] = field(default_factory=list)
    overlong: bool = False
    merged: bool = False
    problem: str = ""
    error: str = ""
    left_out: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """The user's settings of encoding: plain values that can be sent to worker processes.

    ``overlong``: what is done with a row of more than ``max_length`` tokens: ``error``, ``truncate`` (the end is cut
    off), ``drop`` (left out and counted) or ``split`` (into several examples, if the task can). ``labels``: the classes
    or tags in the order of their numbers. ``date``: the day, such as 2026-07-26, for a chat template that renders one;
    by default today.
    """

    max_length: int
    overlong: str = "truncate"
    labels: Sequence[str] = ()
    problem_type: str | None = None
    chat_template: str | None = None
    stride: int = 128
    date: str | None = None


class Encoder:
    """Records of one task to examples. ``notes`` are for the user, once before training."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.notes: list[str] = []

    def encode(self, records: Sequence[tuple[Row, Record]]) -> list[EncodedRow]:
        """One ``EncodedRow`` per record, in order. Records are tokenized together, so pass them in chunks."""
        found = [record for _, record in records]
        tokens = self.tokens(found) if found else []
        return [self.encode_one(record, of) for record, of in zip(found, tokens, strict=True)]

    def tokens(self, records: Sequence[Any]) -> Iterable[Any]:
        """What ``encode_one`` takes of each record, by default a ``tokenizers.Encoding``."""
        raise NotImplementedError

    def encode_one(self, record: Any, tokens: Any) -> EncodedRow:
        raise NotImplementedError


def tokenize(tokenizer: Any, *texts: Sequence[Any], truncation: bool = False, **options: Any) -> list[Any]:
    """One ``tokenizers.Encoding`` per text, or per pair with a second list. ``options`` are those of transformers."""
    if texts and not texts[0]:
        return []
    # Not verbose: without truncation it would warn of lengths that are cut later.
    return tokenizer(*texts, truncation=truncation, padding=False, verbose=False, **options).encodings  # type: ignore[no-any-return]


def refused(count: Callable[[], int], settings: Settings, *, splits: bool = True) -> EncodedRow | None:
    """The result of a row of ``count`` tokens, over ``max_length``, if such rows are errors or dropped; otherwise None.

    ``splits``: the task can split rows.
    """
    if settings.overlong == "drop":
        return EncodedRow(overlong=True)
    if settings.overlong != "error":
        return None
    ways = "truncate, drop or split" if splits else "truncate or drop"
    error = (
        f"{count()} tokens, where max_length is {settings.max_length}; raise max_length, shorten the row, or choose "
        f"with overlong what is done with such rows ({ways})"
    )
    return EncodedRow(overlong=True, error=error)


def fitted(ids: list[int], targets: list[int], settings: Settings, *, merged: bool, what: str) -> EncodedRow:
    """The row as one example, cut to ``max_length`` unless a longer row is an error or dropped.

    ``what`` is the word for the trained part, in messages.
    """
    limit = settings.max_length
    overlong = len(ids) > limit
    if overlong and (instead := refused(lambda: len(ids), settings)):
        return replace(instead, merged=merged)
    # The first position is never predicted, so a target there trains nothing.
    if all(target == IGNORE for target in targets[1:limit]):
        return EncodedRow(
            overlong=overlong,
            merged=merged,
            problem=f"nothing of {what} is left to train on within max_length={limit}; raise max_length, "
            f"or shorten the prompts",
        )
    return EncodedRow([Example(ids[:limit], targets[:limit])], overlong=overlong, merged=merged)


def windows(ids: list[int], targets: list[int], limit: int, front: int, context: int) -> list[Example]:
    """Windows of at most ``limit`` tokens over the row; every target is in exactly one of them.

    Each window after the first starts with the row's first ``front`` tokens (the special ones) and with up to
    ``context`` tokens before it, none of which is trained again.
    """
    made = [Example(ids[:limit], targets[:limit])]
    done = limit
    while done < len(ids):
        start = max(front, done - context)
        stop = min(len(ids), start + limit - front)
        labels = [IGNORE] * (front + done - start) + targets[done:stop]
        made.append(Example(ids[:front] + ids[start:stop], labels))
        done = stop
    return [example for example in made if any(label != IGNORE for label in example.labels[1:])]  # type: ignore[index]
