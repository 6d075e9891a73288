"""Answers that do not look at the row: what does no better than the best of these has learned nothing of the rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loraloom.data.example import Example
from loraloom.tasks.metrics.kinds import Scores, total

#: Answers of which each is tried on the held-out rows.
TRIED = 20
#: Texts are answers to choose from where there are at most this share of the rows of them.
DISTINCT = 0.2

Score = Callable[[Example], Scores]
#: what a model would put out for a row
Answer = Callable[[Example], Tensor]


@dataclass(frozen=True)
class Known:
    """What a run knows of its training rows: classes, problem type, tokens that there are, rows of a batch."""

    labels: Sequence[str]
    problem: str | None
    tokenizer: Any
    tokens: int
    block: int


@dataclass
class Constant:
    """The best answer of its kind by the loss, and answers to measure, in words.

    ``score`` is its loss on a row. Of ``answers`` each gives what the model would put out for a row; ``texts`` are
    those of tasks that generate.
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
    """Where few texts are asked for, as where a text names a class: each as likely as among the training rows.

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
    """Number → minus the logarithm of its share; one that never came is as rare as half a row."""
    whole = counts.total()
    return {number: -math.log(max(counts[number], 0.5) / whole) for number in numbers}


def name_of(labels: Sequence[str], number: int) -> str:
    return repr(labels[number]) if number < len(labels) else str(number)
