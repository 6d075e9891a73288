"""A starting learning rate and number of epochs, and whether a run ended too early.

These are published rules of thumb; a search finds better values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.tasks.base import Task

#: Ten times the rate of full fine-tuning at a width of 2000, falling with the width (Schulman et al. 2025, "LoRA
#: Without Regret", on Llama); half as much again for runs under 100 steps.
RATE, WIDTH, POWER, SHORT = 5e-4, 2000, 0.775, 1.5
LOWEST, HIGHEST = 5e-5, 5e-3
#: By whether the task has a new head: minimum steps, and maximum epochs, after which a generating model memorises rows.
STEPS = {True: 300, False: 100}
MOST = {True: 15, False: 5}
#: The loss was still falling if it fell by more than this share, and this much, between the last two evaluations.
FALLS, LEAST = 0.02, 1e-3


def start(hidden: int | None, task: Task, rows: int, batch_size: int) -> tuple[float, int]:
    """Peak learning rate and epochs for a model of width ``hidden`` on ``rows`` rows."""
    steps = max(1, math.ceil(rows / batch_size))
    epochs = min(MOST[task.new_head], max(2 if rows > 20_000 else 3, math.ceil(STEPS[task.new_head] / steps)))
    rate = RATE * (WIDTH / (hidden or WIDTH)) ** POWER * (SHORT if steps * epochs < 100 else 1)
    rate = min(HIGHEST, max(LOWEST, rate))
    digits = 1 - math.floor(math.log10(rate))
    return round(rate, digits), epochs


def falls(evaluations: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """The last two held-out losses if the loss was still falling at the end of a run; otherwise None."""
    losses = [float(entry["loss"]) for entry in evaluations if entry.get("loss") is not None]
    if len(losses) < 2 or not all(map(math.isfinite, losses[-2:])) or losses[-1] != min(losses):
        return None
    before, last = losses[-2:]
    return (before, last) if before - last > max(FALLS * abs(before), LEAST) else None
