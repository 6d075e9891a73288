"""What each task asks of logits: a loss for the rows of one slot, and the figures of an evaluation.

Knows tensors alone; files and slots are others' business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from loraloom.config import TaskType
from loraloom.data.encode import IGNORE


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


def _flat(task: TaskType, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions [n, classes] and what they should be [n]."""
    if task is TaskType.CAUSAL_LM:
        wanted = labels[:, 1:].flatten()
        kept = wanted != IGNORE
        return logits[:, :-1].flatten(0, 1)[kept].float(), wanted[kept]
    return logits.float(), labels


def loss(task: TaskType, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean loss over rows (seq-cls: logits [rows, classes], labels [rows]) or over labelled tokens
    (causal-lm: logits [rows, length, vocabulary], labels [rows, length]; each position predicts the next)."""
    return F.cross_entropy(*_flat(task, logits, labels))


def score(task: TaskType, logits: Tensor, labels: Tensor) -> Scores:
    predicted, wanted = _flat(task, logits, labels)
    summed = F.cross_entropy(predicted, wanted, reduction="sum")
    return Scores(float(summed), wanted.numel(), int((predicted.argmax(-1) == wanted).sum()))


def metric_name(task: TaskType) -> str:
    return "accuracy" if task is TaskType.SEQ_CLS else "perplexity"


def metric(task: TaskType, scores: Scores) -> float:
    if task is TaskType.SEQ_CLS:
        return scores.accuracy
    return math.exp(scores.loss) if scores.loss < 700 else math.inf


def total(parts: Iterable[Scores]) -> Scores:
    return sum(parts, Scores())
