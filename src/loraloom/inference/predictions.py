"""A few held-out rows with what the adapter predicts for them, in words for a person to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.data.example import Example
from loraloom.inference.evaluation import HeldOut, predictions, run
from loraloom.tasks.base import Task


def told(
    model: Any, name: str, task: Task, examples: Sequence[Example], held_out: HeldOut, batch_size: int
) -> list[dict[str, str]]:
    """What one adapter predicts for all ``examples``, one entry for each row that they are of."""
    outputs: Sequence[Any] = [None] * len(examples)
    if not task.generates:
        _, outputs = run(model, name, task, examples, held_out.tokenizer.pad_token_id, batch_size)
    made = predictions(model, name, task, examples, outputs, batch_size, held_out)
    shown: dict[int, dict[str, str]] = {}
    for predicted, right, number in zip(made.predictions, made.references, made.examples, strict=True):
        record = held_out.records[held_out.row(number)][1]
        words = {
            "input": task.shown_input(record, examples[number], held_out.tokenizer),
            "expected": task.shown_value(record, right),
            "predicted": task.shown_value(record, predicted, outputs[number]),
        }
        shown.setdefault(held_out.row(number), words)
    return list(shown.values())
