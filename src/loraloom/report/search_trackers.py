"""The trials of a search for TensorBoard, W&B and the like: figures at their evaluations, and the final leaderboard."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from loraloom.files.log import Log, info
from loraloom.report.trackers import Trackers, named_for, running
from loraloom.report.tune import NewEvaluations, state, training_loss
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.executor import SearchStatus
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import Verdict

#: The run's names of what belongs to a trial begin with this and its number.
TRIAL = "trial-"


@contextlib.contextmanager
def tracking(options: TuneConfig, log: Log = info) -> Iterator[SearchTracks]:
    """The trackers of ``options.train.report_to`` for a search, which end with the context.

    Raises:
        ConfigError: one does not start. Begins with ``report_to``.
    """
    train = options.train
    with running(train.report_to, train.output, options.to_dict(), log) as trackers:
        yield SearchTracks(trackers)


class SearchTracks:
    """``update`` after each step, ``end`` with the verdict."""

    def __init__(self, trackers: Trackers) -> None:
        self._trackers, self._new = trackers, NewEvaluations()

    def update(self, status: SearchStatus) -> None:
        """Write the evaluations since the last call."""
        for trial in self._new.of(status.trials, {trial.number for trial in status.running}):
            self._write(trial)

    def end(self, found: Verdict) -> None:
        """Write what came after the last call, and the leaderboard."""
        for trial in self._new.of(found.trials, set()):
            self._write(trial)
        self._trackers.start_waiting()
        rows = [(number, found.scores[number], found.trial(number)) for number in found.ranking]
        columns = ["trial", *found.params, found.metric, "noise", "parameters", "state"]
        table: list[list[Any]] = []
        for number, score, trial in rows:
            values = [trial.values.get(name) for name in found.params]
            table.append([number, *values, score.mean, score.noise, trial.parameters, state(trial, score)])
        for tracker in list(self._trackers.there):
            with self._trackers.guarded(tracker, "did not take the leaderboard"):
                _write_table(tracker, columns, table, found.metric)

    def _write(self, trial: Trial) -> None:
        self._trackers.start_waiting()
        last = trial.curve.evaluations[-1]
        values = {f"eval/{name}": value for name, value in last.items() if name not in ("step", "rows")}
        values |= {"train/loss": training_loss(trial), "train/learning_rate": trial.curve.learning_rate[-1]}
        named = {f"{TRIAL}{trial.number}/{name}": value for name, value in values.items() if value is not None}
        for tracker in list(self._trackers.there):
            with self._trackers.guarded(tracker, f"failed at trial {trial.number}", drop=True):
                if tracker.name == "wandb":  # its steps may not go back, and each trial has its own
                    tracker.log({**named, f"{TRIAL}{trial.number}/step": trial.step})
                else:
                    tracker.log(named_for(tracker.name, named), step=trial.step)


def _write_table(tracker: Any, columns: Sequence[str], rows: Sequence[Sequence[Any]], metric: str) -> None:
    """As a table where the tracker has tables, else the metric of each configuration."""
    if tracker.name == "tensorboard":
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)
        tracker.writer.add_text("leaderboard", text)
        tracker.writer.flush()
    elif hasattr(tracker, "log_table"):
        tracker.log_table("leaderboard", columns=list(columns), data=[list(row) for row in rows])
    else:
        place = columns.index(metric)
        values = {f"leaderboard/{TRIAL}{row[0]}/{metric}": row[place] for row in rows if math.isfinite(row[place])}
        tracker.log(named_for(tracker.name, values))
