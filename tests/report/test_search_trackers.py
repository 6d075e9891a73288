"""Promises to who watches a search in a tracker: each trial's figures where it was measured, and the leaderboard."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.report.search_trackers import SearchTracks
from loraloom.report.trackers import FOLDER, Trackers
from loraloom.tuning.executor import SearchStatus
from loraloom.tuning.ranking import Score
from loraloom.tuning.trial import Trial
from report.test_trackers import scalars

OPTIONS = TrainConfig(model="m", data="d.csv", task="seq-cls", output="o", max_steps=30)


class Told:
    """A tracker that keeps what it is told."""

    def __init__(self, name: str) -> None:
        self.name, self.told, self.tables = name, list[tuple[Any, dict[str, Any]]](), list[Any]()

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.told.append((step, values))


class Tables(Told):
    def log_table(self, name: str, columns: list[str], data: list[list[Any]]) -> None:
        self.tables.append((name, columns, data))


def trial(number: int, step: int) -> Trial:
    curve = Curve([0.9, 0.8], [0.1, 0.05], [{"step": step, "loss": 0.7, "accuracy": 0.5 + number / 10, "rows": 9}])
    return Trial(number, {"lora.r": 4 + number}, OPTIONS, 30, step, "running", curve=curve, parameters=12)


def status(*trials: Trial) -> SearchStatus:
    return SearchStatus(trials, trials, "accuracy", 2, 100.0, None)


def verdict(*trials: Trial) -> Any:
    scores = {one.number: Score(one.curve.evaluations[-1]["accuracy"], None, {0: 0.5}) for one in trials}
    return SimpleNamespace(
        trials=trials, ranking=[one.number for one in trials][::-1], scores=scores, metric="accuracy",
        params=["lora.r"], trial=lambda number: trials[number],
    )  # fmt: skip


def test_each_evaluation_is_written_once_at_the_step_of_its_trial(tmp_path: Path) -> None:
    other, strict = Told("swanlab"), Tables("wandb")
    tracks = SearchTracks(Trackers(tmp_path, print, there=[other, strict]))
    zero, one = trial(0, 4), trial(1, 4)
    tracks.update(status(zero))
    tracks.update(status(zero, one))
    one.curve.evaluations.append({"step": 10, "loss": 0.6, "accuracy": 0.9})
    one.step = 10
    tracks.end(verdict(zero, one))
    assert [(step, sorted(values)[0]) for step, values in other.told[:3]] == [
        (4, "trial-0/eval/accuracy"), (4, "trial-1/eval/accuracy"), (10, "trial-1/eval/accuracy"),
    ]  # fmt: skip
    assert other.told[2][1] == {
        "trial-1/eval/accuracy": 0.9, "trial-1/eval/loss": 0.6, "trial-1/train/loss": pytest.approx(0.85),
        "trial-1/train/learning_rate": 0.05,
    }  # fmt: skip
    # The steps of this one may not go back from trial to trial.
    assert [(step, values[f"trial-{n}/step"]) for (step, values), n in zip(strict.told, (0, 1, 1), strict=True)] == [
        (None, 4), (None, 4), (None, 10),
    ]  # fmt: skip
    assert other.told[3] == (None, {"leaderboard/trial-1/accuracy": 0.9, "leaderboard/trial-0/accuracy": 0.5})
    ((name, columns, rows),) = strict.tables
    assert (name, columns) == ("leaderboard", ["trial", "lora.r", "accuracy", "noise", "parameters", "state"])
    assert rows[0][:3] == [1, 5, 0.9]


def test_tensorboard_has_the_curves_of_all_trials_and_the_leaderboard(tmp_path: Path) -> None:
    trackers = Trackers(tmp_path, print, waiting=True)
    tracks = SearchTracks(trackers)
    zero, one = trial(0, 4), trial(1, 7)
    tracks.update(status(zero, one))
    tracks.end(verdict(zero, one))
    trackers.there[0].finish()
    found = scalars(tmp_path / FOLDER)
    assert found["trial-1/eval/accuracy"] == [(7, 0.6)]
    assert "leaderboard/text_summary" in found
