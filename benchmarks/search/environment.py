"""A search replayed on a table: trials train and are measured by looking them up, and every step is paid for.

A strategy sees a subset of the configurations, one seed for all first trials (as in a real search) and others for
repeats, and its own validation rows, at most a fifth of the pool. What is true of a configuration is known from the
rows that no strategy sees, over all seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tables import Table

#: A step's backward takes about as long as its forward: rows measured cost this share of rows trained on.
FORWARD = 0.5
BATCH = 16


@dataclass
class Env:
    """One replay. ``trials`` are configurations of the table, ``rows`` the validation rows."""

    table: Table
    trials: list[int]
    seeds: list[int]
    rows: np.ndarray
    steps_paid: float = 0.0
    #: (trial, seed) → the point it stands at
    at: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def draw(cls, table: Table, count: int, rows: int, source: np.random.Generator) -> Env:
        configurations, seeds, _, pool = table.loss.shape
        trials = source.permutation(configurations)[:count].tolist()
        return cls(
            table, trials, source.permutation(seeds).tolist(), np.sort(source.permutation(pool)[: min(rows, pool // 5)])
        )

    @property
    def points(self) -> list[int]:
        """Steps at which a trial may be measured; the first is 0, the last the end."""
        found: list[int] = self.table.meta["points"]
        return found

    @property
    def steps(self) -> int:
        return self.points[-1]

    def config(self, trial: int) -> dict[str, Any]:
        found: dict[str, Any] = self.table.meta["configurations"][self.trials[trial]]
        return found

    def train(self, trial: int, point: int, seed: int = 0) -> None:
        """Train ``trial`` (a place in ``trials``) to ``points[point]``."""
        before = self.at.get((trial, seed), 0)
        if point > before:
            self.steps_paid += self.points[point] - self.points[before]
            self.at[trial, seed] = point

    def losses(self, trial: int, seed: int = 0) -> np.ndarray:
        """The training losses so far."""
        done = self.points[self.at.get((trial, seed), 0)]
        return self.table.train_loss[self.trials[trial], self.seeds[seed], :done]

    def measure(self, trial: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Loss and goodness of each validation row at the point of ``trial``; goodness is a hit, or minus the loss."""
        self.steps_paid += FORWARD * len(self.rows) / BATCH
        where = self.trials[trial], self.seeds[seed], self.at.get((trial, seed), 0)
        loss = self.table.loss[where][self.rows]
        good = -loss if self.table.hit is None else self.table.hit[where][self.rows].astype(float)
        return loss, good

    @cached_property
    def weights(self) -> np.ndarray:
        """Of each validation row in a mean."""
        return self.table.tokens[self.rows].astype(float)

    def cost(self) -> float:
        """Over that of training all to their end and measuring each once there."""
        return self.steps_paid / (len(self.trials) * (self.steps + FORWARD * len(self.rows) / BATCH))

    @cached_property
    def truth(self) -> np.ndarray:
        """[trial, half]: how good each is at its end, on each half of the unseen rows, over all seeds."""
        return truths(self.table, self.rows)[self.trials]

    def regret(self, chosen: int) -> float:
        """What the best of the subset has above ``chosen``; the best is picked on one half and scored on the other."""
        lost = [
            self.truth[self.truth[:, one].argmax(), other] - self.truth[chosen, other]
            for one, other in ((0, 1), (1, 0))
        ]
        return float(np.mean(lost))


def truths(table: Table, seen: np.ndarray) -> np.ndarray:
    """[configuration, half of the rows that are not ``seen``]: the mean over seeds at the end."""
    unseen = np.setdiff1d(np.arange(table.loss.shape[-1]), seen)
    halves = unseen[::2], unseen[1::2]
    end = -table.loss[:, :, -1] if table.hit is None else table.hit[:, :, -1].astype(np.float32)
    end = np.nan_to_num(end, nan=-30.0)
    weights = table.tokens.astype(float)
    return np.stack([np.average(end[..., half], axis=-1, weights=weights[half]).mean(-1) for half in halves], -1)


def baseline(table: Table) -> float:
    """How good the best constant answer is on the whole pool: for classes the share of the commonest."""
    if table.hit is None:
        return float(-np.average(table.loss[:, :, 0].mean((0, 1)), weights=table.tokens))
    found: float = table.meta["constant"]["share"]
    return found
