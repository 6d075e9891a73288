"""All that advice is drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraloom.tuning.ranking import Comparison, same
from loraloom.tuning.trial import Trial

#: Fewer steps than these say nothing: of the shape of a curve, or of which values are the better ones.
FEW_STEPS = 20


@dataclass(frozen=True)
class DiagnosticInputs:
    """``trials`` are first seeds; see ``verdict`` for ``edges`` and ``order``."""

    best: Trial
    trials: Sequence[Trial]
    comparison: Comparison
    importance: Mapping[str, float]
    mattered: Sequence[str]
    edges: Mapping[str, str]
    order: Mapping[str, Sequence[Any]]

    def place(self, trial: Trial, param: str) -> float | None:
        """Where a trial's value lies among the others, low to high; None if the hyperparameter has no order."""
        value = trial.values.get(param)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        labels = [same(item) for item in self.order.get(param, ())]
        return float(labels.index(same(value))) if same(value) in labels else None
