"""The rows of a run: from the options to examples for training, validation and test.

First all rows are read and checked, without a tokenizer (``read_rows``); then they are tokenised (``tokenise``). This
file decides by row numbers which rows are held out, and how often each occurs in an epoch. The examples are in a table,
on disk if there are many, and each part is a view of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from loraloom.config.train import TrainConfig
from loraloom.data import summary
from loraloom.data.batches import bucketed, padding_share
from loraloom.data.read.sources import resolve
from loraloom.data.records import Record
from loraloom.data.rows import Row
from loraloom.data.shape.shapes import GROUP
from loraloom.data.split import held_out, units_of, weighted
from loraloom.data.table.scan import OnProgress, Scan, scan, silent
from loraloom.data.table.store import MERGED, OVERLONG, Examples
from loraloom.data.table.tokenize import Encoded, encode
from loraloom.data.task import RowTask
from loraloom.data.tokenize.templates import TEMPLATE_NAME, find_template
from loraloom.errors import ConfigError, DataError
from loraloom.files.atomic import write_files
from loraloom.messages import Message, Warn

#: The file of skipped bad rows in the output folder.
BAD_ROWS = "bad-rows.jsonl"
#: Held-out rows that are read again at once, for the predictions shown at the end: the file may be missing then.
SHOWN = 16
#: Parts that are not trained on → their options.
HELD_OUT = {"validation": "eval_split", "test": "test_split"}
#: Parts that must not have rows in common.
COMPARED = (("validation", "train"), ("test", "train"), ("test", "validation"))

Array = npt.NDArray[Any]


@dataclass
class Rows:
    """The rows of a run, checked and divided by their numbers, not tokenised."""

    #: of ``train``, and of the other parts that have their own sources
    scans: dict[str, Scan]
    #: part → numbers of its rows in its scan, or in that of ``train``; for ``train`` as often as in an epoch
    numbers: dict[str, Array]
    names: list[str]
    hashes: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def chats(self) -> bool:
        """Whether rows for training or validation are conversations."""
        return any(found.chats for part, found in self.scans.items() if part != "test")

    def scan_of(self, part: str) -> Scan:
        return self.scans.get(part, self.scans["train"])


@dataclass
class Part:
    """The examples to train on, to validate on, or to test on."""

    examples: Examples
    #: distinct rows; and of these: cut, and with a token that is not trained on because it is partly prompt
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
        """The largest token id, of these or of other rows in the same table."""
        return self.examples.table.largest


@dataclass
class Data:
    """The rows of a run, tokenised.

    ``names``: the labels in the order of their numbers. ``problem``: the kind of seq-cls labels (transformers'
    ``problem_type``). ``notes``: what was recognised and done; ``warnings``: probable mistakes; each is a sentence.
    """

    train: Part
    validation: Part
    validation_rows: HeldOut
    names: list[str]
    padding: float
    hashes: dict[str, str]
    #: rows that decide nothing, for a final measurement
    test: Part | None = None
    test_rows: HeldOut | None = None
    problem: str | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: the chat template of the conversations, unless it is the tokenizer's own
    template: str | None = None
    #: rows that two parts have in common
    shared: list[summary.Shared] = field(default_factory=list)
    #: names in ``hashes`` of sources whose rows are all for the test
    only_test: list[str] = field(default_factory=list)

    def messages(self) -> list[Message]:
        """The notes, the amounts, and the warnings."""
        rows, held_out = len(self.train.examples), len(self.validation.examples)
        return [
            *(Message("note", text=note) for note in self.notes),
            Message("data", rows=rows, held_out=held_out, tokens=self.train.tokens, padding=self.padding),
            *(Warn("note", text=warning) for warning in self.warnings),
        ]


class HeldOut(Sequence[tuple[Row, Record]]):
    """The rows of examples, with their records. Read again on access, the first ``SHOWN`` at once.

    ``of[i]`` is the position in this sequence of the row of example i: a row may have several examples.
    """

    def __init__(self, found: Scan, examples: Examples, skip: bool) -> None:
        self._scan = found
        self.numbers, self.of = np.unique(examples.rows, return_inverse=True)
        self._wanted = self.numbers.tolist()
        self._rows: list[Row] = []
        self._source: Iterator[tuple[int, Row]] = enumerate(found.good(skip))
        self._read(min(SHOWN, len(self)))

    def __len__(self) -> int:
        return len(self._wanted)

    @overload
    def __getitem__(self, number: int) -> tuple[Row, Record]: ...
    @overload
    def __getitem__(self, number: slice) -> list[tuple[Row, Record]]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        self._read(number + 1)
        row = self._rows[number]
        return row, self._scan.record(self._wanted[number], row)

    def _read(self, count: int) -> None:
        while len(self._rows) < count:
            at = self._wanted[len(self._rows)]
            row = next((row for place, row in self._source if place == at), None)
            if row is None:
                names = ", ".join(source.name for source in self._scan.sources)
                raise DataError(f"{names}: holds fewer rows than before; it was changed since it was read")
            self._rows.append(row)


def read_rows(options: TrainConfig, task: RowTask, on_progress: OnProgress = silent) -> Rows:
    """Read and check all rows, and select those to hold out.

    Raises:
        DataError: a source or a row cannot be used, or there are too few rows.
    """
    notes: list[str] = []
    read = partial(
        scan, task=task, format=options.format, skip=options.on_bad_row == "skip", log=notes.append,
        on_progress=on_progress,
    )  # fmt: skip
    train = read(resolve(options.data, format=options.format), columns=options.columns, problem=options.problem_type)
    notes += train.described
    if any(GROUP in shape.ignored for shape in train.shapes):
        notes.append(f"the column {GROUP!r} is not read; columns: {{group: group}} keeps rows of one group together")
    columns = {ours: theirs for ours, theirs in options.columns.items() if ours != GROUP}
    scans, numbers, rest = {"train": train}, dict[str, Array](), np.arange(train.rows)
    for part, option in HELD_OUT.items():
        wanted = getattr(options, option)
        if isinstance(wanted, int | float):
            seed = options.seed if part == "validation" else f"{part}/{options.seed}"
            numbers[part] = _hold_out(train, rest, wanted, seed)
            rest = np.setdiff1d(rest, numbers[part])
        elif wanted is not None:
            scans[part] = read(resolve(wanted, format=options.format), columns=columns, known=train)
            notes += scans[part].described
            numbers[part] = np.arange(scans[part].rows)
    weights = [source.weight for source in train.sources]
    if any(weight != 1 for weight in weights):
        counts = np.diff(np.searchsorted(rest, np.cumsum(train.counts)), prepend=0).tolist()
        rest = rest[np.array(weighted(counts, weights, options.seed), np.int64)]
    hashes = {name: value for found in scans.values() for name, value in found.hashes.items()}
    rows = Rows(scans, {"train": rest, **numbers}, train.names, hashes, notes)
    if options.chat_template is not None and not rows.chats:
        shapes = ", ".join(dict.fromkeys(shape.name for shape in train.shapes))
        raise ConfigError(f"chat_template: does nothing, for the rows hold no conversations ({shapes}); leave it out")
    return rows


def _hold_out(train: Scan, among: Array, amount: float, seed: int | str) -> Array:
    """The rows of ``among`` to hold out: equal rows, and rows of one group, are held out together.

    If too few rows differ, equal rows may be divided, and a later warning says so.
    """
    units = units_of(train.array("digests"), train.array("groups"))[among].tolist()
    classes = train.classes()
    labels = None if classes is None else [classes[row] for row in among.tolist()]
    count = amount if isinstance(amount, int) or amount >= 1 else max(1, round(amount * train.rows))
    try:
        chosen = held_out(len(among), count, seed, labels, units)
    except DataError:
        if train.array("groups").any():
            raise
        chosen = held_out(len(among), count, seed, labels)
    return among[np.array(chosen, np.int64)]


def tokenise(rows: Rows, options: TrainConfig, task: RowTask, tokenizer: Any, on_progress: OnProgress = silent) -> Data:
    """Tokenise the rows. Skipped bad rows are written to the output folder.

    Raises:
        InputError: a setting does not fit, or a row has no trained token.
        SaveError: neither the cache nor the system's folder for temporary files has space.
    """
    skip, notes, train = options.on_bad_row == "skip", list(rows.notes), rows.scans["train"]
    settings = {name: getattr(options, name) for name in ("overlong", "chat_template", "date", "stride")}
    settings |= {"max_length": options.max_length or 512, "labels": rows.names, "problem_type": train.problem}
    made = {
        part: encode(
            found, task, tokenizer, settings, skip=skip, allow_untrained=options.allow_untrained,
            workers=options.data_workers, log=notes.append, on_progress=on_progress,
        )
        for part, found in rows.scans.items()
    }  # fmt: skip
    notes += [note for note in made["train"].notes if note not in notes]
    notes += task.notes(rows.names)
    parts, warnings = {}, list[str]()
    for part, numbers in rows.numbers.items():
        encoded = made.get(part, made["train"])
        flags = encoded.table.row_flags[np.unique(numbers)]
        parts[part] = _part(encoded, numbers, flags, options.overlong)
        warnings += summary.done(part, flags, settings["max_length"], options.overlong, task.windows)
        if not len(parts[part].examples):
            what = summary.WHAT[part]
            reasons = summary.reasons(encoded, flags)
            raise DataError(f"{options.data}: no {what} row is left of {len(flags):,}: {reasons}")
    warnings += summary.repeated(parts["train"].examples)
    pairs = [(part, other) for part, other in COMPARED if part in parts]
    found = [summary.shared(part, parts[part].examples, other, parts[other].examples) for part, other in pairs]
    shared = [one for one in found if one is not None]
    warnings += [one.warning for one in shared]
    if skip and (count := _write_bad_rows(rows, made, Path(options.output))):
        left = "is" if count == 1 else "are"
        place = Path(options.output) / BAD_ROWS
        warnings.append(f"{summary.rows(count)} cannot be used and {left} left out; see {place}")
    template = None
    if train.chats:
        template, said = _template(tokenizer, options)
        notes += said
    lengths = parts["train"].examples.lengths.tolist()
    others = {name for part, found in rows.scans.items() if part != "test" for name in found.hashes}
    return Data(
        parts["train"],
        parts["validation"],
        HeldOut(rows.scan_of("validation"), parts["validation"].examples, skip),
        rows.names,
        padding_share(lengths, bucketed(lengths, options.batch_size, options.seed, 0)),
        rows.hashes,
        parts.get("test"),
        HeldOut(rows.scan_of("test"), parts["test"].examples, skip) if "test" in parts else None,
        train.problem,
        notes,
        warnings,
        template,
        shared,
        [name for name in rows.hashes if name not in others],
    )


def _part(encoded: Encoded, numbers: Array, flags: Array, overlong: str) -> Part:
    table = encoded.table
    times = np.bincount(numbers, minlength=table.rows)
    examples = Examples(table, np.repeat(np.arange(len(table)), times[table.example_rows]))
    truncated = int(np.count_nonzero(flags & OVERLONG)) if overlong == "truncate" else 0
    return Part(examples, len(flags), truncated, int(np.count_nonzero(flags & MERGED)))


def _template(tokenizer: Any, options: TrainConfig) -> tuple[str | None, list[str]]:
    """The chat template to save with the adapter, unless it is the tokenizer's, and notes about it."""
    found, said = find_template(tokenizer, options.chat_template, options.date), []
    if found.dated:
        said.append(
            f"{found.name} writes the date: all conversations are written with {options.date or 'that of today'}, "
            "which a run keeps that is resumed (data.date sets it)"
        )
    if found.text is not None:
        said.append(f"{found.name} is kept with the adapter, as {TEMPLATE_NAME}")
    return found.text, said


def with_date(rows: Rows, options: TrainConfig, tokenizer: Any, date: str) -> TrainConfig:
    """The options with ``date``, if a chat template renders the date and none is set.

    Raises:
        ConfigError: a date is set, but no template renders it.
    """
    if rows.chats and find_template(tokenizer, options.chat_template, options.date or date).dated:
        return replace(options, date=options.date or date)
    if options.date is not None:
        raise ConfigError("date: no chat template writes it here, so it does nothing; leave it out")
    return options


def _write_bad_rows(rows: Rows, encoded: dict[str, Encoded], output: Path) -> int:
    """Write the bad rows of all sources, if any, to ``output``. Returns their number."""
    found: list[Scan | Encoded] = [*rows.scans.values(), *encoded.values()]

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            for one in found:
                file.writelines(one.bad_lines())

    if count := sum(one.bad for one in found):
        write_files(output, {BAD_ROWS: write})
    return count
