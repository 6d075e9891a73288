"""What an advice is, and all that it is drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraloom.tune.ranking import Comparison, same
from loraloom.tune.trial import Trial

#: Fewer steps than these say nothing: of the shape of a curve, or of which values are the better ones.
FEW_STEPS = 20


@dataclass(frozen=True)
class Advice:
    """``kind`` names the symptom, ``text`` is for people, ``figures`` are the numbers in it."""

    kind: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DiagnosticInputs:
    """All that advice is drawn from. ``trials`` are first seeds; see ``verdict`` for ``edges`` and ``order``."""

    best: Trial
    trials: Sequence[Trial]
    comparison: Comparison
    importance: Mapping[str, float]
    mattered: Sequence[str]
    edges: Mapping[str, str]
    order: Mapping[str, Sequence[Any]]

    def place(self, trial: Trial, param: str) -> float | None:
        """Where a trial's value lies among the others, low to high; None where the hyperparameter has no order."""
        value = trial.values.get(param)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        labels = [same(item) for item in self.order.get(param, ())]
        return float(labels.index(same(value))) if same(value) in labels else None

    @property
    def when(self) -> str:
        """When the comparison was made, where that was not at the end."""
        share = self.comparison.share
        return "" if share > 0.995 else f" after {share:.0%} of the steps"
