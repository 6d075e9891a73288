"""An adapter's answers to rows without one: classes, numbers, tags, parts of a text, texts, embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.data.example import Encoder, Example, Settings
from loraloom.data.records import Pair, Record
from loraloom.data.rows import Row
from loraloom.data.shape.shapes import recognise
from loraloom.errors import DataError
from loraloom.inference.evaluation import Evaluator, HeldOut
from loraloom.inference.generate import generate
from loraloom.inference.session import Session
from loraloom.tasks.base import Task


def answers(
    session: Session,
    adapter: str,
    rows: Sequence[str | Mapping[str, Any]],
    settings: Settings,
    *,
    columns: Mapping[str, str] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 64,
) -> list[Any]:
    """The answer of ``adapter`` to each row, in order.

    Args:
        rows: texts, or the columns of the training rows without the answer. For tags, words or a text of words with
            spaces between; for a conversation ``{"messages": [...]}``.
        settings: the settings of the training's encoder; rows over length are cut.
        columns: our names of columns → those of ``rows``.

    Raises:
        DataError: a row lacks a column, or holds something else; names the row by its index from 0.
    """
    task, tokenizer, records = session.task, session.tokenizer, list[tuple[Row, Record]]()
    for number, given in enumerate(rows):
        filled = task.answered(_columns(task, number, given, columns), settings.labels, settings.problem_type)
        row = Row(filled, number, unit="row")
        records.append((row, recognise(row, task, problem_type=settings.problem_type).read(row)))
    if not records:
        return []
    encoder = task.encoder(tokenizer, settings)
    if task.generates:
        prompts = [_prompt(task, row, record, encoder, tokenizer) for row, record in records]
        return list(generate(session, [adapter] * len(prompts), prompts, max_new_tokens, batch_size))
    examples: list[Example] = []
    of: list[int] = []
    for number, encoded in enumerate(encoder.encode(records)):
        if fault := encoded.error or encoded.problem:
            raise DataError(f"row {number}: {fault}")
        examples += encoded.examples
        of += [number] * len(encoded.examples)
    held_out = HeldOut(
        records=records, rows=of, labels=settings.labels, max_length=settings.max_length, stride=settings.stride
    )
    made = Evaluator(session, examples, held_out, batch_size).answers(adapter)
    found = {of[example]: answer for answer, example in zip(made.predictions, made.examples, strict=True)}
    return [found[number] for number in range(len(records))]


def _columns(
    task: Task, number: int, row: str | Mapping[str, Any], columns: Mapping[str, str] | None
) -> dict[str, Any]:
    """A row's columns by our names."""
    if isinstance(row, str):
        if not task.text_column:
            needs = " and ".join(repr(name) for name in task.forms[0].needs[:-1])
            raise DataError(f"row {number}: {task.name} needs {needs}; give a dict")
        return {task.text_column: row}
    if not isinstance(row, Mapping):
        raise DataError(f"row {number}: a text or a dict of columns, found {type(row).__name__}")
    ours = {theirs: name for name, theirs in (columns or {}).items()}
    return {ours.get(name, name): value for name, value in row.items()}


def _prompt(task: Task, row: Row, record: Record, encoder: Encoder, tokenizer: Any) -> list[int]:
    """The prompt's tokens."""
    if isinstance(record, Pair):  # not with the placeholder, because a token could span both
        ids: list[int] = tokenizer(record.prompt).input_ids
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and len(ids) > 1 else ids
    (encoded,) = encoder.encode([(row, record)])
    if fault := encoded.error or encoded.problem:
        raise DataError(f"row {row.line}: {fault}")
    return task.prompt_and_target(encoded.examples[0])[0]
