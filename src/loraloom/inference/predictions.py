"""A few held-out rows with what the adapter says of them, in words for a person to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from loraloom.config.lora import TaskType
from loraloom.data.example import Example
from loraloom.data.records import Asked, Labelled, Pair, Record, Tagged, Translated
from loraloom.inference.evaluation import HeldOut, predictions, problem_of, prompt_and_target, run
from loraloom.tasks.metrics.registry import choose


def told(
    model: Any, name: str, task: TaskType, examples: Sequence[Example], held_out: HeldOut, batch_size: int
) -> list[dict[str, str]]:
    """What one adapter says of all ``examples``, one entry for each row that they are of."""
    texts = choose(task, problem_of(examples)).kind == "texts"
    outputs: Sequence[Any] = [None] * len(examples)
    if not texts:
        _, outputs = run(model, name, task, examples, held_out.tokenizer.pad_token_id, batch_size)
    said = predictions(model, name, task, examples, outputs, batch_size, held_out)
    seen: dict[int, dict[str, str]] = {}
    for predicted, right, number in zip(said.predictions, said.references, said.examples, strict=True):
        row = number if held_out.rows is None else int(held_out.rows[number])
        record = held_out.records[row][1]
        words = _words(record, predicted), _words(record, right)
        if isinstance(record, Labelled) and isinstance(predicted, str):
            words = f"{words[0]} ({float(outputs[number].softmax(-1).max()):.0%})", words[1]
        shown = _input(record, examples[number], task, held_out.tokenizer)
        seen.setdefault(row, {"input": shown, "expected": words[1], "predicted": words[0]})
    return list(seen.values())


def _input(record: Record, example: Example, task: TaskType, tokenizer: Any) -> str:
    if isinstance(record, Labelled):
        return record.text if record.second is None else f"{record.text} | {record.second}"
    if isinstance(record, Tagged):
        return " ".join(record.tokens)
    if isinstance(record, Translated):
        return record.source
    if isinstance(record, Asked):
        return record.question
    if isinstance(record, Pair) and record.prompt:
        return record.prompt
    return str(tokenizer.decode(prompt_and_target(example, task)[0], skip_special_tokens=True))


def _words(record: Record, value: Any) -> str:
    """A class, a number, tags, an answer or a text."""
    if isinstance(record, Tagged):
        # A row may be cut, or a word without a token: then it cannot be said which words the tags are of.
        words = record.tokens if len(value) == len(record.tokens) else [""] * len(value)
        marked = [f"{word} {tag}".strip() for word, tag in zip(words, value, strict=True) if tag != "O"]
        return ", ".join(marked) or "O"
    if isinstance(value, float) and math.isnan(value):
        return "(no number)"
    if isinstance(record, Asked):
        first = value if isinstance(value, str) else next(iter(value), "")
        return first or "(no answer)"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "(none)"
    return f"{value:.4g}" if isinstance(value, float) else str(value).strip()
