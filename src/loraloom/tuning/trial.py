"""One trial of a search: a configuration, how far it came, and what was measured. Numbers and names alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.inference.jackknife import Figures

#: waiting: not begun or held at a rung; running: in the pack; finished: trained to its last step; stopped: given up
#: at a rung because others were better; failed: its loss was not finite or blew up.
State = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """A configuration with one seed.

    ``values`` are the hyperparameters as they were proposed, such as ``{"lora.r": 8, "lora.lora_alpha": "2r",
    "train.learning_rate": 1e-3}``; ``options`` are all options of its training, which follow from them.
    """

    number: int
    values: dict[str, Any]
    options: TrainConfig
    #: optimizer steps of its whole training, and those taken
    steps: int
    step: int = 0
    state: State = "waiting"
    #: why it failed or was stopped, for people
    reason: str = ""
    curve: Curve = field(default_factory=Curve)
    #: trained numbers, and the bytes of the adapter's file
    parameters: int = 0
    bytes: int = 0
    #: its share of the pack's time
    seconds: float = 0.0
    #: the number of the trial that this one repeats with another seed, or None
    repeats: int | None = None
    #: module → (rank, directions that hold nearly all of the update, norm of the update over that of the weight);
    #: measured when it ends
    used: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    #: metric → over all held-out rows, and over all but each part of them; measured when it ends
    parts: Figures = field(default_factory=dict)
    #: step before the last → the same on the rows that it was measured on there, of the loss and the search's metric.
    #: Trials that were measured on as many rows were measured on the same ones, in the same parts.
    rungs: dict[int, Figures] = field(default_factory=dict)
    #: files of its adapter → sha256; once it is finished
    files: dict[str, str] = field(default_factory=dict)
    #: the step at which it is held next until others are there too; 0 is its last
    goal: int = 0
    #: to be measured at its present step, before it continues
    measure: bool = False
    #: held-out rows that the next measurement before the last step takes; 0: as many as usual there
    rows: int = 0
    #: it repeats a configuration that turned out to be no finalist, and does not count
    dropped: bool = False
    #: expert weights that stay as they are, in words; "" where there are none
    unadapted: str = ""

    @property
    def measured(self) -> bool:
        """Whether it was measured at the step at which it stands."""
        return bool(self.curve.evaluations) and int(self.curve.evaluations[-1]["step"]) == self.step

    def drop(self, reason: str) -> None:
        """Stop it and forget what it came to, for how far that is depends on the slots and on the moment."""
        self.dropped, self.state, self.reason, self.step, self.goal, self.curve = True, "stopped", reason, 0, 0, Curve()
        self.measure, self.rows, self.rungs, self.parts, self.used, self.files = False, 0, {}, {}, {}, {}

    @property
    def measured_rows(self) -> int | None:
        """Held-out rows of its last measurement; None: all, or it was never measured."""
        rows = self.curve.evaluations[-1].get("rows") if self.curve.evaluations else None
        return None if rows is None else int(rows)

    def points(self, metric: str, *, full: bool = False) -> list[tuple[int, float]]:
        """The step and the metric of each evaluation, NaN if missing; ``full``: of those on all held-out rows alone."""
        found = [e for e in self.curve.evaluations if not (full and "rows" in e)]
        values = [math.nan if (value := e.get(metric)) is None else float(value) for e in found]
        return [(int(e["step"]), value) for e, value in zip(found, values, strict=True)]

    def latest(self, metric: str) -> float | None:
        """The metric on the held-out rows when last measured."""
        return self.curve.evaluations[-1].get(metric) if self.curve.evaluations else None

    def figures(self, metric: str) -> list[float]:
        """The metric when last measured: over all rows measured, and over all but each part; empty if unknown."""
        last = self.parts if self.state == "finished" else self.rungs.get(self.step, {})
        return last.get(metric, [])
