"""Held-out rows beside their examples, and the predictions for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loraloom.data.records import Record
from loraloom.data.rows import Row

#: The prediction of an output with NaN: equal to nothing, so that it counts as wrong in every metric.
NOTHING = math.nan


@dataclass(frozen=True, kw_only=True)
class EvalRows:
    """What predictions need of held-out rows beside their examples. Metrics that need a missing part are left out.

    ``records`` are the rows as read; ``rows`` gives the row of each example (by default one each, in order). ``labels``
    are the classes or tags by number. ``max_length`` and ``stride`` are those of question-answering's examples.
    """

    records: Sequence[tuple[Row, Record]] = ()
    rows: Sequence[int] | None = None
    labels: Sequence[str] = ()
    tokenizer: Any = None
    max_length: int = 0
    stride: int = 128

    def has(self, names: Sequence[str]) -> bool:
        """Whether these members are given."""
        return all(found is not None and len(found) > 0 for found in (getattr(self, name) for name in names))

    def row(self, example: int) -> int:
        """The row of an example."""
        return example if self.rows is None else int(self.rows[example])

    def by_row(self, count: int) -> dict[int, list[int]]:
        """Row → its examples, of the first ``count`` examples."""
        found: dict[int, list[int]] = {}
        for example in range(count):
            found.setdefault(self.row(example), []).append(example)
        return found


@dataclass
class Predictions:
    """Predictions, right answers, and the example of each (the first of a row with several)."""

    predictions: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)

    def add(self, predicted: Any, right: Any, example: int) -> None:
        self.predictions.append(predicted)
        self.references.append(right)
        self.examples.append(example)


def words_of(value: Any) -> str:
    """A class, a number, several classes or a text, for a person to read."""
    if isinstance(value, float) and math.isnan(value):
        return "(no number)"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "(none)"
    return f"{value:.4g}" if isinstance(value, float) else str(value).strip()
