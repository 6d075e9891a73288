"""Figures with their error: over all held-out rows, and over all but each of some parts of them (the jackknife).

Any metric gets a standard error this way, a user's own too, and two adapters on the same rows one of their difference
(Efron and Stein 1981). One pass over the rows serves all of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from loraloom.data.table.store import Examples
from loraloom.distributed.process_group import SINGLE, ProcessGroup
from loraloom.inference.evaluation import HeldOut, predictions, run
from loraloom.tasks.base import Task
from loraloom.tasks.metrics.kinds import Scores, total
from loraloom.tasks.metrics.registry import Metrics
from loraloom.tasks.outputs import Predictions

if TYPE_CHECKING:
    from torch import Tensor

    from loraloom.lora.model import PeftModel

#: Parts that held-out rows are divided into; rows that are fewer are a part each.
PARTS = 20

#: Metric → its figure over all rows, and over all but each part.
Figures = dict[str, list[float]]


def divide(rows: Sequence[int]) -> list[list[int]]:
    """Examples in parts, at random but always the same. ``rows`` is the row of each: its examples stay together."""
    distinct = sorted(set(rows))
    random.Random("parts").shuffle(distinct)
    part_of = {row: place % min(PARTS, len(distinct)) for place, row in enumerate(distinct)}
    parts: list[list[int]] = [[] for _ in range(min(PARTS, len(distinct)))]
    for number, row in enumerate(rows):
        parts[part_of[row]].append(number)
    return parts


def figures(metrics: Metrics, scores: Sequence[Scores], said: Predictions, parts: Sequence[Sequence[int]]) -> Figures:
    """The figures of what was said. ``scores`` are the losses of each part."""
    part_of = {number: place for place, part in enumerate(parts) for number in part}
    found: Figures = {}
    for left_out in [-1, *(range(len(parts)) if len(parts) > 1 else ())]:
        kept = [i for i, example in enumerate(said.examples) if part_of[example] != left_out]
        one = metrics.measure(
            total(score for place, score in enumerate(scores) if place != left_out),
            [said.predictions[i] for i in kept],
            [said.references[i] for i in kept],
        )
        for name, value in one.items():
            found.setdefault(name, []).append(value)
    return found


def evaluate_parts(
    model: PeftModel,
    name: str,
    task: Task,
    examples: Examples,
    pad_id: int,
    batch_size: int,
    held_out: HeldOut,
    parts: Sequence[Sequence[int]],
    world: ProcessGroup = SINGLE,
) -> Figures:
    """The figures of one adapter, as ``evaluation.evaluate`` has them, with those of all but each part."""
    metrics = held_out.metrics
    assert metrics is not None
    keep = metrics.needs_predictions
    scores: list[Scores] = []
    outputs: list[Tensor | None] = [None] * len(examples)
    for part in parts:
        score, found = run(model, name, task, examples.view(part), pad_id, batch_size, keep=keep, world=world)
        scores.append(score)
        for number, output in zip(part, found, strict=True):
            outputs[number] = output
    said = predictions(model, name, task, examples, outputs, batch_size, held_out, world) if keep else Predictions()
    return figures(metrics, scores, said, parts)


def error(values: Sequence[float]) -> float:
    """The standard error of ``values[0]`` by the others, each without one part; infinite where it cannot be had."""
    rest = [value for value in values[1:] if math.isfinite(value)]
    if len(rest) < 2 or not math.isfinite(values[0]):
        return math.inf
    mean = fmean(rest)
    return math.sqrt((len(rest) - 1) / len(rest) * math.fsum((value - mean) ** 2 for value in rest))
