"""The learning rate of each step, which follows from the step alone. Knows numbers, no optimizers."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Up in a line through the warmup, then as ``kind`` says.

    Args:
        peak: the rate after the warmup.
        steps: all there are; ``warmup`` of these come first.
        kind: ``linear`` and ``cosine`` fall to 0 at the end, ``constant`` stays, ``warmup_stable_decay`` stays and
            falls to 0 in a line in the last ``decay`` steps (Hu et al. 2024, MiniCPM).
    """

    peak: float
    steps: int
    warmup: int = 0
    kind: str = "linear"
    decay: int = 0

    def rate(self, step: int) -> float:
        """Of ``step``, from 0. No step is wasted on a rate of 0: the fall would reach it one step after the last."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        start = self.warmup
        if self.kind == "warmup_stable_decay":
            start = max(self.warmup, self.steps - self.decay)
        left = min(1.0, (self.steps - step) / max(self.steps - start, 1))
        return self.peak * ((1 - math.cos(math.pi * left)) / 2 if self.kind == "cosine" else left)
