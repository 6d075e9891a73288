"""What an encoder is given and what it gives back: the contract between the tasks' encoders and their caller.

Nothing here knows a task, a file or a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraloom.data.records import Record
from loraloom.data.rows import Row

#: The label of a position that the loss leaves out (what ``torch.nn.functional.cross_entropy`` ignores).
IGNORE = -100

#: Rows tokenized at a time: enough for the tokenizer's threads, few enough to keep its offsets out of memory.
CHUNK = 1000


@dataclass(slots=True)
class Example:
    """What the model is given for one row, or for one part of it, as numbers.

    ``labels`` by task: a class id (seq-cls), a number (regression), 0.0 or 1.0 for each class (several labels);
    one label per token, ``IGNORE`` where none counts (causal-lm, token-cls); the target's ids, with a length of
    their own (seq2seq-lm); first and last token of the answer (question-answering). ``token_type_ids`` are there
    for models that tell two segments apart.
    """

    input_ids: list[int]
    labels: int | float | list[int] | list[float]
    token_type_ids: list[int] | None = None


@dataclass(slots=True)
class EncodedRow:
    """One row, encoded: its examples (none, one, or several where it was split), and what was done to it.

    ``problem`` says why there is nothing to train on, in the same words for every row of the kind; ``error`` says
    what is wrong with this row, in words that follow its place (a label that is unknown, a conversation that the
    chat template refuses, a row over length where that is an error). A row with either has no examples.

    ``overlong``: the row had more than ``max_length`` tokens. ``merged``: a token joins text that is trained on
    with text that is not, and is left out of the loss. ``left_out``: the chat template does not write all of the
    row, such as the reasoning of earlier turns.
    """

    examples: list[Example] = field(default_factory=list)
    overlong: bool = False
    merged: bool = False
    problem: str = ""
    error: str = ""
    left_out: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user chose about encoding; plain values, so that every worker process can be given them."""

    max_length: int
    overlong: str = "truncate"
    labels: tuple[str, ...] = ()
    problem_type: str | None = None
    chat_template: str | None = None
    stride: int = 128
    #: the day, such as 2026-07-26, for a chat template that writes one; by default today
    date: str | None = None


class Encoder:
    """Records of one task in, examples out. ``notes`` is what the user should be told once, before training."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.notes: list[str] = []

    def encode(self, records: Sequence[tuple[Row, Record]]) -> list[EncodedRow]:
        """One ``EncodedRow`` for each record, in order; rows are tokenized together, so give them in chunks."""
        raise NotImplementedError


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int | None = None,
    *,
    special: bool = True,
) -> Iterator[Any]:
    """One ``tokenizers.Encoding`` per text, cut to ``max_length`` unless that is None.

    ``special``: with the tokenizer's own tokens in front and behind.
    """
    for start in range(0, len(texts), CHUNK):
        yield from tokenizer(
            list(texts[start : start + CHUNK]),
            add_special_tokens=special,
            truncation=max_length is not None,
            max_length=max_length,
            padding=False,
            verbose=False,  # without truncation it would warn of lengths that we cut ourselves
        ).encodings


def refused(count: Callable[[], int], settings: Settings, *, splits: bool = True) -> EncodedRow | None:
    """A row of ``count`` tokens, more than ``max_length``, where such rows are errors or left out; else None.

    ``splits``: the task can split one.
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
