"""A search replayed on a table: trials train and are measured by looking them up, and every step is paid for.

A strategy sees a subset of the configurations, one seed for all first trials (as in a real search) and others for the
finalists, and its own validation rows, at most a fifth of the pool. What is true of a configuration is known from the
rows that no strategy sees, over all seeds. More trials than a table has configurations are pairs of a configuration and
a seed: the same configuration with another seed is another trial, whose truth is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from tables import Table

from loraloom.inference.jackknife import PARTS

#: A step's backward takes about as long as its forward: rows measured cost this share of rows trained on.
FORWARD = 0.5
BATCH = 16
#: Configurations that are trained again with other seeds, and the seeds of each: the defaults of a search.
FINALISTS, SEEDS = 3, 2


@dataclass
class Env:
    """One replay: ``trials`` are configurations of the table, ``seeds`` those of each, ``rows`` the validation rows."""

    table: Table
    trials: list[int]
    seeds: list[list[int]]
    rows: np.ndarray
    steps_paid: float = 0.0
    #: (trial, seed) → the point it stands at
    at: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def draw(cls, table: Table, count: int, rows: int, source: np.random.Generator) -> Env:
        configurations, seeds, _, pool = table.loss.shape
        places = source.permutation(configurations).tolist()
        order = source.permutation(seeds).tolist()
        pairs = [(one, order[turn:] + order[:turn]) for turn in range(seeds) for one in places]
        held_out = source.permutation(pool)[: min(rows, pool // 5)]
        return cls(table, [one for one, _ in pairs[:count]], [mine for _, mine in pairs[:count]], held_out)

    @property
    def points(self) -> list[int]:
        """Steps at which a trial may be measured; the first is 0, the last the end."""
        found: list[int] = self.table.meta["points"]
        return found

    @property
    def steps(self) -> int:
        return self.points[-1]

    @property
    def shares(self) -> list[float]:
        return [point / self.steps for point in self.points]

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
        return self.table.train_loss[self.trials[trial], self.seeds[trial][seed], :done]

    def measure(self, trial: int, seed: int = 0, rows: int | None = None) -> tuple[list[float], list[float]]:
        """Loss and goodness at the point of ``trial``: over the first ``rows`` validation rows, then without each part.

        Goodness is the share of hits, or minus the loss.
        """
        chosen = self.rows[:rows]
        self.steps_paid += FORWARD * len(chosen) / BATCH
        where = self.trials[trial], self.seeds[trial][seed], self.at.get((trial, seed), 0)
        loss = jackknife(self.table.loss[where][chosen], self.table.tokens[chosen])
        if self.table.hit is None:
            return loss, [-value for value in loss]
        return loss, jackknife(self.table.hit[where][chosen], self.table.tokens[chosen])

    @cached_property
    def full_cost(self) -> float:
        """Training all to their end and measuring each once there."""
        return len(self.trials) * (self.steps + FORWARD * len(self.rows) / BATCH)

    def finish(self, ranked: list[int]) -> int:
        """Train the first of ``ranked``, best first, with further seeds; the best mean over the seeds wins."""
        last, finalists = len(self.points) - 1, ranked[:FINALISTS]

        def mean(trial: int) -> tuple[float, float]:
            paid = self.steps_paid
            found = [self.measure(trial)]
            self.steps_paid = paid  # measured before it was ranked
            for seed in range(1, 1 + SEEDS):
                self.train(trial, last, seed)
                found.append(self.measure(trial, seed))
            return float(np.mean([good[0] for _, good in found])), -float(np.mean([loss[0] for loss, _ in found]))

        return max(finalists, key=lambda trial: (*mean(trial), -trial))

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


def jackknife(values: np.ndarray, weights: np.ndarray) -> list[float]:
    """The mean of ``values`` [row] by ``weights`` [row], then without each of ``PARTS`` parts. A loss of NaN is 30."""
    weighted, weights = np.nan_to_num(values.astype(float), nan=30.0) * weights, weights.astype(float)
    part = np.arange(len(values)) % PARTS
    sums, counts = np.bincount(part, weighted), np.bincount(part, weights)
    found: list[float] = [sums.sum() / counts.sum(), *((sums.sum() - sums) / (counts.sum() - counts))]
    return found


def truths(table: Table, seen: np.ndarray) -> np.ndarray:
    """[configuration, half of the rows that are not ``seen``]: the mean over seeds at the end."""
    unseen = np.setdiff1d(np.arange(table.loss.shape[-1]), seen)
    halves = unseen[::2], unseen[1::2]
    end, weights = ends(table), table.tokens.astype(float)
    return np.stack([end[:, half] @ weights[half] / weights[half].sum() for half in halves], -1)


def ends(table: Table) -> np.ndarray:
    """[configuration, row]: goodness at the end, mean over seeds. Computed once a table."""
    if not hasattr(table, "ends"):
        end = -table.loss[:, :, -1] if table.hit is None else table.hit[:, :, -1].astype(np.float32)
        vars(table)["ends"] = np.nan_to_num(end, nan=-30.0).mean(1)
    found: np.ndarray = vars(table)["ends"]
    return found


def baseline(table: Table) -> float:
    """How good the best constant answer is on the whole pool: for classes the share of the commonest."""
    if table.hit is None:
        return float(-np.average(table.loss[:, :, 0].mean((0, 1)), weights=table.tokens))
    found: float = table.meta["constant"]["share"]
    return found
