"""Constant answers, which ignore the row: an adapter that is no better has learned nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loraloom.data.example import Example
from loraloom.tasks.metrics.kinds import Scores, total

#: Maximum number of answers to try on the held-out rows.
TRIED = 20
#: Texts count as a choice of answers if their number is at most this share of the rows.
DISTINCT = 0.2

Score = Callable[[Example], Scores]
#: the output of a model for a row
Answer = Callable[[Example], Tensor]


@dataclass(frozen=True)
class Known:
    """Facts on the training rows: classes, problem type, size of the vocabulary, rows of a batch."""

    labels: Sequence[str]
    problem: str | None
    tokenizer: Any
    tokens: int
    block: int


@dataclass
class Constant:
    """The best constant answer by the loss, and answers to measure, by their description.

    ``score`` is the loss of a row. ``answers`` give a model's output for a row; ``texts`` are those of tasks that
    generate.
    """

    words: str
    score: Score
    answers: list[tuple[str, Answer]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def loss(self, examples: Iterable[Example]) -> float:
        return total(self.score(example) for example in examples).loss


def commonest_text(
    targets: Sequence[tuple[int, ...]], texts: Iterable[str], tokens: int, of: Callable[[Example], tuple[int, ...]]
) -> Constant | None:
    """If there are few different texts, such as names of classes: each with its share of the training rows.

    ``targets`` are the tokens of each row's text and ``texts`` the texts; ``of`` gives the tokens of another row.
    """
    known = Counter(targets)
    if len(known) > DISTINCT * len(targets):
        return None
    count = len(targets) + 0.5 * (len(known) + 1)

    def score(example: Example) -> Scores:
        target = of(example)
        unknown = 0.0 if target in known else len(target) * math.log(tokens)
        return Scores(unknown - math.log((known[target] + 0.5) / count), len(target))

    found = [text for text, _ in Counter(texts).most_common(3)]
    return Constant(f"always {found[0]!r}", score, texts=found)


def surprise(counts: Counter[int], numbers: Iterable[int]) -> dict[int, float]:
    """Number → minus the logarithm of its share; one without a row counts as half a row."""
    whole = counts.total()
    return {number: -math.log(max(counts[number], 0.5) / whole) for number in numbers}


def name_of(labels: Sequence[str], number: int) -> str:
    return repr(labels[number]) if number < len(labels) else str(number)
