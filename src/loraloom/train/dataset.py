"""The rows of a run: from what the options name to examples for training and for evaluation.

First every row is read and checked, which needs no model (``read_run_rows``); then all are tokenised, once there is a
tokenizer (``encode_run_rows``). Which rows are for evaluation, and how often each comes in an epoch, is decided here,
by numbers: the examples lie in a table, on disk where they are many, and training and evaluation are views of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from loraloom import tasks
from loraloom.config.train import TrainConfig
from loraloom.data.batches import bucketed, padding_share
from loraloom.data.read.holdout import held_out, weighted
from loraloom.data.read.sources import resolve
from loraloom.data.records import Chat, Record
from loraloom.data.rows import Row, RowError
from loraloom.data.table.scan import OnProgress, Survey, survey
from loraloom.data.table.store import LEFT_OUT, MERGED, OVERLONG, UNTRAINED, Examples, Table, unpicked
from loraloom.data.table.tokenize import Encoded, encode_survey
from loraloom.data.tokenize.templates import find_template
from loraloom.errors import ConfigError, DataError, SaveError
from loraloom.messages import Message, Warn
from loraloom.models.load import length_within

#: Where bad rows go that are skipped, in the output folder.
BAD_ROWS = "bad-rows.jsonl"
#: The chat template beside the adapter, under the name by which transformers finds it with a tokenizer.
TEMPLATE_NAME = "chat_template.jinja"
#: Held-out rows that are read again at once, for the predictions that are shown at the end: the file may be gone then.
SHOWN = 16

Array = npt.NDArray[Any]


def silent(what: str, done: int, total: int | None) -> None:
    """Nobody is told how far the reading is."""


@dataclass
class Rows:
    """The rows of a run as they were read: checked and split by their numbers, not tokenised."""

    train: Survey
    #: the rows to evaluate on are from here: the same one, where they were held out
    evaluation: Survey
    #: numbers of the rows to train on, as often as each comes in an epoch, and of those to evaluate on
    train_rows: Array
    evaluation_rows: Array
    names: list[str]
    hashes: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass
class Part:
    """The examples to train on, or to evaluate on."""

    examples: Examples
    #: rows, each counted once; and of these: cut, and with a token that is not trained on because it is also prompt
    rows: int
    truncated: int
    merged: int

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example."""
        return self.examples.lengths  # type: ignore[return-value] # an array serves as a sequence

    @property
    def tokens(self) -> int:
        return self.examples.tokens

    @property
    def largest(self) -> int:
        """The greatest token, of these or of other rows that were read with them."""
        return self.examples.table.largest


@dataclass
class Data:
    """The rows of a run, tokenised.

    ``names`` are the labels in the order of their numbers, ``problem`` is what a seq-cls label is (transformers'
    ``problem_type``). ``notes`` say what was recognised and done, ``warnings`` what may well be a mistake, each in a
    sentence.
    """

    train: Part
    evaluation: Part
    evaluation_rows: HeldOut
    names: list[str]
    padding: float
    hashes: dict[str, str]
    problem: str | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: the chat template that conversations were written with, unless it is what the tokenizer does by itself
    template: str | None = None

    def messages(self) -> list[Message]:
        """What was recognised and done, how much there is, and what may well be a mistake."""
        rows, held_out = len(self.train.examples), len(self.evaluation.examples)
        return [
            *(Message("note", text=note) for note in self.notes),
            Message("data", rows=rows, held_out=held_out, tokens=self.train.tokens, padding=self.padding),
            *(Warn("note", text=warning) for warning in self.warnings),
        ]


class HeldOut(Sequence[Row]):
    """The rows that are evaluated on, read again as far as they are asked for.

    ``of[i]`` is the place here of the row that evaluation example i came from: a row may have several examples.
    """

    def __init__(self, found: Survey, examples: Examples, skip: bool) -> None:
        self._survey = found
        self.numbers, self.of = np.unique(examples.rows, return_inverse=True)
        self._wanted = self.numbers.tolist()
        self._rows: list[Row] = []
        self._source: Iterator[tuple[int, Row]] = enumerate(found.good(skip))

    def __len__(self) -> int:
        return len(self._wanted)

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        while len(self._rows) <= number:
            at = self._wanted[len(self._rows)]
            row = next((row for place, row in self._source if place == at), None)
            if row is None:
                names = ", ".join(source.name for source in self._survey.sources)
                raise DataError(f"{names}: holds fewer rows than before; it was changed since it was read")
            self._rows.append(row)
        return self._rows[number]

    def record(self, number: int) -> Record:
        """What row ``number`` holds, whatever the shape of its file."""
        return self._survey.record(self._wanted[number], self[number])


def read_data(options: TrainConfig, tokenizer: Any, watch: OnProgress = silent) -> Data:
    """The rows of a run, checked, split and tokenised.

    Raises:
        DataError: a file that cannot be read or does not hold what the task needs.
    """
    return encode_run_rows(read_run_rows(options, watch), options, tokenizer, watch)


def read_run_rows(options: TrainConfig, watch: OnProgress = silent) -> Rows:
    """Read and check all rows, and choose those to evaluate on.

    Raises:
        DataError: a source or a row cannot be used; there are too few rows.
    """
    task, skip = tasks.get(options.task), options.on_bad_row == "skip"
    notes: list[str] = []
    given: dict[str, Any] = {"format": options.format, "columns": options.columns, "skip": skip}
    given |= {"log": notes.append, "watch": watch}
    sources = resolve(options.data, format=options.format)
    train = survey(sources, task, problem=options.problem_type, **given)
    notes += [f"{s.describe()}: {shape.describe()}" for s, shape in zip(sources, train.shapes, strict=True)]
    rows, evaluation, held = np.arange(train.rows), train, np.zeros(0, np.int64)
    if isinstance(options.eval_split, int | float):
        amount = options.eval_split
        held = np.array(held_out(train.rows, amount, options.seed, train.classes()), np.int64)
        rows = unpicked(train.rows, held)
    else:
        sources = resolve(options.eval_split, format=options.format)
        evaluation = survey(sources, task, known=train, **given)
        notes += [f"{s.describe()}: {shape.describe()}" for s, shape in zip(sources, evaluation.shapes, strict=True)]
        held = np.arange(evaluation.rows)
    if options.chat_template is not None and not (_talks(train) or _talks(evaluation)):
        names = ", ".join(dict.fromkeys(shape.name for shape in train.shapes))
        raise ConfigError(f"chat_template: does nothing, for the rows hold no conversations ({names}); leave it out")
    weights = [source.weight for source in train.sources]
    if any(weight != 1 for weight in weights):
        ends = np.searchsorted(rows, np.cumsum(train.counts))
        counts = np.diff(ends, prepend=0).tolist()
        rows = rows[np.array(weighted(counts, weights, options.seed), np.int64)]
    return Rows(train, evaluation, rows, held, train.names, {**train.hashes, **evaluation.hashes}, notes)


def encode_run_rows(rows: Rows, options: TrainConfig, tokenizer: Any, watch: OnProgress = silent) -> Data:
    """Tokenise what was read. Bad rows that are skipped are written to the output folder.

    Raises:
        InputError: a setting does not fit, or a row leaves nothing to train on.
        SaveError: neither the cache nor the system's folder for temporary files has room.
    """
    task, skip = tasks.get(options.task), options.on_bad_row == "skip"
    notes, length = list(rows.notes), length_within(None, options.max_length, options.model)
    settings: dict[str, Any] = {
        "max_length": length,
        "overlong": options.overlong,
        "labels": rows.names,
        "problem_type": rows.train.problem,
        "chat_template": options.chat_template,
        "date": options.date,
        "stride": options.stride,
        "skip": skip,
        "allow_untrained": options.allow_untrained,
        "workers": options.data_workers,
        "log": notes.append,
        "watch": watch,
    }
    own = rows.evaluation is not rows.train
    made = encode_survey(rows.train, task, tokenizer, **settings)
    other = encode_survey(rows.evaluation, task, tokenizer, **settings) if own else made
    notes += [note for note in made.notes if note not in notes]
    notes += task.notes(rows.names)
    parts, warnings = [], list[str]()
    for what, encoded, numbers in (("training", made, rows.train_rows), ("held-out", other, rows.evaluation_rows)):
        flags = encoded.table.row_flags[np.unique(numbers)]
        part = _part(encoded.table, numbers, flags, options.overlong)
        warnings += _said(what, flags, options, length)
        if not len(part.examples):
            raise DataError(f"{options.data}: no {what} row is left of {len(flags):,}: {_reasons(encoded, flags)}")
        parts.append(part)
    train, evaluation = parts
    warnings += _alike(train, evaluation)
    if skip and (count := _write_bad_rows(rows, [made, other] if own else [made], Path(options.output))):
        left = "is" if count == 1 else "are"
        warnings.append(f"{_rows(count)} cannot be used and {left} left out; see {Path(options.output) / BAD_ROWS}")
    shown = HeldOut(rows.evaluation, evaluation.examples, skip)
    assert shown[:SHOWN]
    lengths = train.examples.lengths.tolist()
    padding = padding_share(lengths, bucketed(lengths, options.batch_size, options.seed, 0))
    template = None
    if _talks(rows.train):
        found = find_template(tokenizer, options.chat_template, options.date)
        if found.dated:
            notes.append(
                f"{found.name} writes the date: all conversations are written with {options.date or 'that of today'}, "
                "which a run keeps that is resumed (data.date sets it)"
            )
        if (template := found.text) is not None:
            notes.append(f"{found.name} is kept with the adapter, as {TEMPLATE_NAME}")
    return Data(
        train, evaluation, shown, rows.names, padding, rows.hashes, rows.train.problem, notes, warnings, template
    )


def with_date(rows: Rows, options: TrainConfig, tokenizer: Any, date: str) -> TrainConfig:
    """The options with ``date``, if none is set, where a chat template writes the date.

    Raises:
        ConfigError: one is set and nothing writes it.
    """
    talks = _talks(rows.train) or _talks(rows.evaluation)
    if talks and find_template(tokenizer, options.chat_template, options.date or date).dated:
        return replace(options, date=options.date or date)
    if options.date is not None:
        raise ConfigError("date: no chat template writes it here, so it does nothing; leave it out")
    return options


def _talks(found: Survey) -> bool:
    """Are there conversations, by the first rows of each source?"""
    for source, shape in zip(found.sources, found.shapes, strict=True):
        if shape.form.chat:
            return True
        for row in source.first(SHOWN, lambda bad: None):  # prompts and completions of texts, or of messages
            with contextlib.suppress(RowError):
                if isinstance(shape.read(row), Chat):
                    return True
    return False


def _part(table: Table, numbers: Array, flags: Array, overlong: str) -> Part:
    times = np.bincount(numbers, minlength=table.rows)
    examples = Examples(table, np.repeat(np.arange(len(table)), times[table.example_rows]))
    truncated = int(np.count_nonzero(flags & OVERLONG)) if overlong == "truncate" else 0
    return Part(examples, len(flags), truncated, int(np.count_nonzero(flags & MERGED)))


def _said(what: str, flags: Array, options: TrainConfig, length: int) -> list[str]:
    """What was done to the rows, in sentences."""
    done = {"truncate": "cut", "drop": "left out", "split": "split into several"}
    if tasks.get(options.task).windows:
        done |= dict.fromkeys(("truncate", "split"), "read in windows")
    over = {
        OVERLONG: f"over max_length={length} tokens and {done.get(options.overlong, '')}",
        MERGED: "with a token across the end of the prompt, which is not trained on; end prompts with a space or a "
        "line break, or begin completions with one",
        LEFT_OUT: "not written whole by the chat template (it leaves out, for example, the reasoning of earlier turns)",
        UNTRAINED: "left out, because nothing in them is trained on",
    }
    counts = {flag: int(np.count_nonzero(flags & flag)) for flag in over}
    return [
        f"{_rows(count, what)} {'is' if count == 1 else 'are'} {over[flag]}" for flag, count in counts.items() if count
    ]


def _rows(count: int, what: str = "") -> str:
    return f"{count:,} {what} row{'' if count == 1 else 's'}".replace("  ", " ")


def _reasons(encoded: Encoded, flags: Array) -> str:
    reasons = [f"{reason} (rows like this: {count}; the first is {first})" for reason, (count, first) in
               encoded.problems.items()]  # fmt: skip
    if over := int(np.count_nonzero(flags & OVERLONG)):
        reasons.append(f"{_rows(over)} over max_length")
    if bad := next(encoded.bad_lines(), None):
        first = json.loads(bad)
        place = f"line {first['line']}" if "line" in first else f"row {first['number']}"
        reasons.append(f"{first['file']}, {place}: {first['reason']}")
    return "; ".join(reasons) or "none can be encoded"


def _alike(train: Part, evaluation: Part) -> list[str]:
    """Warnings of rows that are there twice, as far as the model can tell."""
    found = []
    table = train.examples.table
    at = np.unique(train.examples.rows)
    chosen = np.isin(table.example_rows, at)
    distinct, counts = np.unique(table.digests[chosen], return_counts=True)
    if twice := int(counts.sum()) - len(distinct):
        found.append(f"{_rows(twice, 'training')} {'is' if twice == 1 else 'are'} the same as another one")
    if shared := int(np.isin(evaluation.examples.digests, distinct).sum()):
        share = shared / len(evaluation.examples)
        found.append(
            f"{_rows(shared, 'held-out')} ({share:.1%}) {'is' if shared == 1 else 'are'} among the training rows as "
            "well, so the evaluation flatters; take them out of one of the two"
        )
    return found


def _write_bad_rows(rows: Rows, encoded: Sequence[Encoded], output: Path) -> int:
    surveys = [rows.train, rows.evaluation] if rows.evaluation is not rows.train else [rows.train]
    count = sum(found.bad for found in surveys) + sum(one.bad for one in encoded)
    if not count:
        return 0
    aside = output / f".{BAD_ROWS}.{secrets.token_hex(4)}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                for found in surveys:
                    file.writelines(found.bad_lines())
                for one in encoded:
                    file.writelines(one.bad_lines())
            os.replace(aside, output / BAD_ROWS)
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()
    except OSError as error:
        raise SaveError(f"{output / BAD_ROWS}: cannot be written ({error.strerror}); choose another folder") from None
    return count
