"""Promises of trackers: TensorBoard has every figure of a run, one that goes on continues, and nothing else is sent."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraloom.errors import ConfigError
from loraloom.report.trackers import FOLDER, Trackers, check
from loraloom.train.loop import Progress
from loraloom.train.slot import Curve


def progress(steps: int, evaluated: bool = False) -> Progress:
    evaluations = [{"step": steps, "loss": 0.5, "accuracy": 0.75}] if evaluated else []
    slot: Any = SimpleNamespace(step=steps, curve=Curve([1.0 / steps], [0.1], evaluations))
    return Progress(slot, tokens=100 * steps, seconds=2.0 * steps)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show, from its files alone."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events*")):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            length = int.from_bytes(raw[at : at + 8], "little")
            event = Event.FromString(raw[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log"):
                found = {tag: [p for p in points if p[0] < event.step] for tag, points in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, round(value.simple_value, 4)))
    return found


def test_tensorboard_has_every_step_and_evaluation(tmp_path: Path) -> None:
    with Trackers(["tensorboard"], tmp_path, {"train": {"seed": 1}}) as tell:
        for step in (1, 2):
            tell(progress(step, evaluated=step == 2))
    found = scalars(tmp_path / FOLDER)
    assert found["train/loss"] == [(1, 1.0), (2, 0.5)]
    assert found["train/tokens_per_second"] == [(1, 50.0), (2, 50.0)]
    assert found["train/learning_rate"] == [(1, 0.1), (2, 0.1)]
    assert found["eval/accuracy"] == [(2, 0.75)]
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_a_run_that_goes_on_drops_what_was_noted_of_later_steps(tmp_path: Path) -> None:
    for first, last in ((1, 4), (3, 5)):
        time.sleep(1.1 if first > 1 else 0)  # files are named by the second
        with Trackers(["tensorboard"], tmp_path, step=first - 1) as tell:
            for step in range(first, last + 1):
                tell(progress(step))
    assert [step for step, _ in scalars(tmp_path / FOLDER)["train/loss"]] == [1, 2, 3, 4, 5]


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    with Trackers([], tmp_path) as tell:
        tell(progress(1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tensorbord", "no tracker is called 'tensorbord'; did you mean 'tensorboard'?"),
        ("wandb", "wandb is not installed; pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_said_before_training(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(["tensorboard", name])
    assert str(error.value).startswith(f"report_to: {said}")
