"""Kinds of predictions: the metrics that each has, and those that are measured by default."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from loraloom.tasks.metrics import functions
from loraloom.tasks.metrics.functions import Measure, by_word, single


@dataclass(frozen=True)
class Kind:
    """Metrics by name, the most informative first. Without ``defaults`` all are measured by default.

    ``problem`` is the user's name of the kind, the ``problem_type``. ``plain`` is applied to predictions and right
    answers before they are measured; ``which`` describes labels of this kind in messages.
    """

    name: str
    measures: dict[str, Measure] = field(repr=False)
    defaults: tuple[str, ...] = ()
    problem: str | None = None
    plain: Callable[[Sequence[Any]], Sequence[Any]] = field(default=lambda rows: rows, repr=False)
    which: str = ""

    @property
    def unasked(self) -> tuple[str, ...]:
        return self.defaults or tuple(self.measures)


CLASSES = Kind(
    "classes",
    {
        "accuracy": functions.accuracy,
        "f1_macro": single(functions.f1_macro),
        "f1_micro": single(functions.f1_micro),
    },
    ("accuracy", "f1_macro"),
)
SEVERAL_CLASSES = Kind(
    "several classes",
    {
        "f1_micro": functions.f1_micro,
        "f1_macro": functions.f1_macro,
        "subset_accuracy": lambda a, b: functions.accuracy([*map(set, a)], [*map(set, b)]),
    },
    problem="multi_label_classification",
)
NUMBERS = Kind(
    "numbers",
    {
        "mse": functions.mse,
        "mae": functions.mae,
        "pearson": functions.pearson,
        "spearman": functions.spearman,
        "r2": functions.r2,
    },
    problem="regression",
)
#: Tags that mark entities, with ``plain`` set once their scheme is known; and all others, which are tags of words.
TAGS = Kind(
    "tags",
    {
        "f1": functions.entity_f1,
        "precision": functions.entity_precision,
        "recall": functions.entity_recall,
        "accuracy": by_word(functions.accuracy),
    },
    which="which mark entities",
)
WORDS = Kind(
    "words",
    {
        "accuracy": by_word(functions.accuracy),
        "f1_macro": by_word(functions.f1_macro),
        "f1_micro": by_word(functions.f1_micro),
    },
    which="which mark no entities",
)
#: The share of rows whose second text is found among all; how cosines of pairs correlate with their scores.
MATCHES = Kind("matches", {"recall_at_1": functions.accuracy}, problem="contrastive")
SIMILARITIES = Kind("similarities", {"spearman": functions.spearman, "pearson": functions.pearson}, problem="cosine")
ANSWERS = Kind("answers", {"f1": functions.answer_f1, "exact_match": functions.answer_exact})
#: Texts are generated only for metrics that need them; perplexity follows from the loss.
TEXTS = Kind(
    "texts",
    {
        "exact_match": functions.text_exact,
        "rouge1": partial(functions.rouge_n, n=1),
        "rouge2": partial(functions.rouge_n, n=2),
        "rougeL": functions.rouge_l,
    },
    ("perplexity",),
)


@dataclass(frozen=True)
class Scores:
    """Sums over rows or tokens, so that batches of any size add up to the exact mean."""

    loss_sum: float = 0.0
    count: int = 0

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.loss_sum + other.loss_sum, self.count + other.count)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf if self.loss >= 700 else math.nan


def total(parts: Iterable[Scores]) -> Scores:
    return sum(parts, Scores())
