"""What each task measures: sums that batches add up to, and the metric that they give.

Knows numbers alone; tensors, files and slots are others' business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from loraloom.config import TaskType


@dataclass(frozen=True)
class Scores:
    """Sums over rows or tokens, so that batches of any size add up to the exact mean."""

    loss_sum: float = 0.0
    count: int = 0
    correct: int = 0

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.loss_sum + other.loss_sum, self.count + other.count, self.correct + other.correct)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.count if self.count else math.nan

    @property
    def accuracy(self) -> float:
        return self.correct / self.count if self.count else math.nan


def metric_name(task: TaskType) -> str:
    return "accuracy" if task is TaskType.SEQ_CLS else "perplexity"


def metric(task: TaskType, scores: Scores) -> float:
    if task is TaskType.SEQ_CLS:
        return scores.accuracy
    return math.exp(scores.loss) if scores.loss < 700 else math.inf


def total(parts: Iterable[Scores]) -> Scores:
    return sum(parts, Scores())
