"""The second pass over the rows: they are encoded, in several processes if there are many, and written as arrays.

This file reads rows from their sources, has them encoded, and writes a table of examples; it handles rows that cannot
be encoded. It does not know which rows are for training: a table has all of them, in the order of their numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loraloom.data.example import CHUNK, Example
from loraloom.data.records import Record
from loraloom.data.rows import BadRow, Row, RowError, row_error
from loraloom.data.shape.shapes import Shape
from loraloom.data.table import cache
from loraloom.data.table.cache import Draft, Entry, Memory
from loraloom.data.table.scan import BAD, OnProgress, Scan, bad_line, silent
from loraloom.data.table.store import LEFT_OUT, MERGED, OVERLONG, UNTRAINED, Packed, Table, Writer, pack
from loraloom.data.table.workers import MOST, mapped
from loraloom.data.task import RowTask
from loraloom.data.tokenize.encode import encoder
from loraloom.errors import DataError
from loraloom.files.hashing import file_hash
from loraloom.files.log import Log, info
from loraloom.files.resources import cores

#: Minimum number of rows for several processes: each takes a second or two to start.
MANY = 20_000
#: Maximum characters of the rows that are sent to a worker together.
CHARACTERS = 2 * 2**20
KIND = "rows"


@dataclass
class Encoded:
    """A table of all rows. ``problems``: why rows have no trained token → how many, and the place of the first."""

    table: Table
    problems: dict[str, tuple[int, str]]
    bad: int
    bad_lines: Callable[[], Iterator[bytes]]
    #: what the user should know of the encoder
    notes: list[str]


def encode(
    found: Scan,
    task: RowTask,
    tokenizer: Any,
    settings: dict[str, Any],
    *,
    skip: bool = False,
    allow_untrained: bool = False,
    workers: int | None = None,
    log: Log = info,
    on_progress: OnProgress = silent,
) -> Encoded:
    """Encode all rows of ``found``; ``settings`` are those of ``encode.encoder``.

    Args:
        skip: rows that cannot be encoded or have no trained token are recorded and skipped instead of raised.
        allow_untrained: rows without a trained token are skipped and counted; they are not bad rows.
        workers: number of processes; by default one per core if there are many rows.

    Raises:
        InputError: a setting or a row is wrong; of rows that leave nothing to train on the first, with their number.
        FailureError: a worker died.
    """
    encoder(task, tokenizer, **settings)  # raises for a wrong setting before the cache is read
    job = (task, tokenizer, settings, found.shapes, skip, allow_untrained)
    count = workers if workers is not None else min(cores(), MOST) if found.rows >= MANY else 1

    def results() -> Iterator[_Done]:
        alone = count > 1 and not _picklable(job)
        if alone:
            log("the tokenizer cannot be sent to other processes, so one process tokenises")
        return mapped(_worker, job, _chunks(found.read(skip)), 1 if alone else min(count, -(-found.rows // CHUNK)))

    strict = not (skip or allow_untrained)
    build = partial(_build, found=found, results=results, strict=strict, on_progress=on_progress)
    if found.kept is not None:
        store: Entry | Memory = (memory := Memory())
        memory.info = build(memory)
    else:
        key = found.origin(task, skip) | {
            "tokenizer": tokenizer_hash(tokenizer),
            "settings": settings,
            "template": _template_hash(settings["chat_template"]),
            "allow_untrained": allow_untrained,
        }
        store = cache.entry(KIND, cache.key_of(key), build, log)
    info = store.info
    return Encoded(Table(store), info["problems"], info["bad"], partial(store.lines, BAD), info["notes"])


def tokenizer_hash(tokenizer: Any) -> str:
    """The hash of everything in a tokenizer that decides the tokens of a text."""
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # set by each call
        inner.pop(state, None)
    outer = [
        type(tokenizer).__name__,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.chat_template,
        list(tokenizer.model_input_names),
        str(getattr(tokenizer, "truncation_side", "")),
    ]
    return hashlib.sha256(json.dumps([inner, outer], sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _template_hash(given: str | None) -> str | None:
    """The hash of a template's file; None if ``given`` is no file."""
    return file_hash(Path(given)) if given and os.path.isfile(given) else None


@dataclass
class _Done:
    packed: Packed
    #: positions of rows without a trained token, and why
    problems: list[tuple[str, str]]
    bad: list[BadRow]
    #: the encoder's notes so far
    notes: list[str]


def _worker(
    task: RowTask, tokenizer: Any, settings: dict[str, Any], shapes: list[Shape], skip: bool, allow_untrained: bool
) -> Callable[[tuple[int, list[Row]]], _Done]:
    made = encoder(task, tokenizer, **settings)

    def work(item: tuple[int, list[Row]]) -> _Done:
        number, rows = item
        records = list(_records(shapes[number], rows, skip))
        examples: list[list[Example]] = []
        flags: list[int] = []
        done = _Done(pack([], [], []), [], [], [])
        for (row, _), result in zip(records, made.encode(records), strict=True):
            flag = OVERLONG * result.overlong | MERGED * result.merged | LEFT_OUT * result.left_out
            if result.error:
                if not skip:
                    raise row_error(row, result.error)
                done.bad.append(row_error(row, result.error).bad)
            elif result.problem:
                flag |= UNTRAINED
                done.problems.append((row.where, result.problem))
                if skip and not allow_untrained:
                    done.bad.append(row_error(row, result.problem).bad)
            examples.append([] if result.error or result.problem else result.examples)
            flags.append(flag)
        done.packed = pack([row for row, _ in records], examples, flags)
        done.notes = list(made.notes)
        return done

    return work


def _records(shape: Shape, rows: Iterable[Row], skip: bool) -> Iterator[tuple[Row, Record]]:
    for row in rows:
        try:
            yield row, shape.read(row)
        except RowError:  # recorded in the first pass
            if not skip:
                raise


def _build(
    folder: Draft | Memory, found: Scan, results: Callable[[], Iterator[_Done]], strict: bool, on_progress: OnProgress
) -> dict[str, Any]:
    """Write the results of all rows. ``strict``: raise an error for rows without a trained token."""
    problems: dict[str, tuple[int, str]] = {}
    notes: dict[str, None] = {}
    writer, lines, bad = Writer(folder), folder.file(BAD), 0
    for part in results():
        for where, reason in part.problems:
            count, first = problems.get(reason, (0, where))
            problems[reason] = count + 1, first
        for row in part.bad:
            lines.write(bad_line(row))
        bad += len(part.bad)
        notes |= dict.fromkeys(part.notes)
        writer.add(part.packed)
        on_progress("rows tokenised", writer.rows, found.rows)
    if found.kept is None:
        found.check_unchanged()
    if writer.rows != found.rows:
        names = ", ".join(source.name for source in found.sources)
        raise DataError(f"{names}: changed while it was read; begin again once it is whole")
    if problems and strict:
        reason, (count, first) = next(iter(problems.items()))
        raise DataError(
            f"{first}: {reason} (rows like this: {count}); with allow_untrained such rows are left out, and with "
            "on_bad_row: skip they are also written to a file"
        )
    return {**writer.finish(), "problems": problems, "bad": bad, "notes": list(notes)}


def _picklable(job: tuple[Any, ...]) -> bool:
    try:
        pickle.dumps(job)
    except Exception:  # code of the tokenizer can raise anything
        return False
    return True


def _chunks(rows: Iterable[tuple[int, Row]]) -> Iterator[tuple[int, list[Row]]]:
    """Chunks of rows of one source, limited in rows and in characters."""
    chunk: list[Row] = []
    at, size = 0, 0
    for number, row in rows:
        if chunk and (number != at or len(chunk) == CHUNK or size > CHARACTERS):
            yield at, chunk
            chunk, size = [], 0
        at = number
        chunk.append(row)
        size += _size(row.fields)
    if chunk:
        yield at, chunk


def _size(value: Any) -> int:
    """Approximate number of characters of a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, Sequence) else 8
