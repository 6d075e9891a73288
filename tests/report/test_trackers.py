"""Promises of trackers: each has every figure of a run, one that fails ends no training, and nothing else is sent."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from loraloom.config.train import TrainConfig
from loraloom.engine.loop import StepEvent
from loraloom.errors import ConfigError
from loraloom.report.session import train_run
from loraloom.report.trackers import FOLDER, check, tracking


def progress(step: int, evaluated: int | None = None) -> StepEvent:
    """``evaluated`` is the step of the last evaluation."""
    found = {"loss": 0.5, "accuracy": 0.75} if evaluated == step else None
    return StepEvent("default", step, 9, 1.0 / step, 0.1, 100 * step, 2.0 * step, found)


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
    with tracking(["tensorboard"], tmp_path, {"train": {"seed": 1}}) as tell:
        for step in (1, 2):
            tell(progress(step, evaluated=2 if step == 2 else None))
    found = scalars(tmp_path / FOLDER)
    assert found["train/loss"] == [(1, 1.0), (2, 0.5)]
    assert found["train/tokens_per_second"] == [(1, 50.0), (2, 50.0)]
    assert found["train/learning_rate"] == [(1, 0.1), (2, 0.1)]
    assert found["eval/accuracy"] == [(2, 0.75)]
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_a_run_that_goes_on_drops_what_was_noted_of_later_steps(tmp_path: Path) -> None:
    for first, last in ((1, 4), (3, 5)):
        time.sleep(1.1 if first > 1 else 0)  # files are named by the second
        with tracking(["tensorboard"], tmp_path) as tell:
            for step in range(first, last + 1):
                tell(progress(step))
    assert [step for step, _ in scalars(tmp_path / FOLDER)["train/loss"]] == [1, 2, 3, 4, 5]


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    with tracking([], tmp_path) as tell:
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


class Fake:
    """A tracker as accelerate's are, that keeps what it is told; ``fails`` are the methods that raise."""

    name = "fake"
    made: list[Fake]
    fails: set[str]

    def __init__(self, project: str, **named: str) -> None:
        self.project, self.named, self.told, self.ended = project, named, [], []
        self.options: dict[str, Any] = {}
        self.tracker = SimpleNamespace(finish=lambda exit_code: self.ended.append(exit_code))
        self.made.append(self)

    def _may(self, what: str) -> None:
        if what in self.fails:
            raise OSError(f"no {what}.\nand more of it")

    def start(self) -> None:
        self._may("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._may("options")
        self.options = values

    def log(self, values: dict[str, float], step: int) -> None:
        self._may("log")
        self.told.append((step, values))

    def finish(self) -> None:
        self._may("finish")
        self.ended.append(0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type[Fake]]:
    """Put in the place of a tracker that is not installed here."""
    from accelerate import tracking

    def make(name: str, *fails: str) -> type[Fake]:
        kind = type(name, (Fake,), {"name": name, "fails": set(fails), "made": []})
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
        monkeypatch.setattr(tracking, "_available_trackers", [*tracking._available_trackers, name])
        return kind

    return make


@pytest.mark.parametrize(("name", "called"), [("wandb", "name"), ("trackio", "name"), ("mlflow", "run_name")])
def test_a_tracker_has_figures_options_and_the_name_of_the_run(
    name: str, called: str, fake: Callable[..., type[Fake]], tmp_path: Path
) -> None:
    kind = fake(name)
    lora = {"r": 4, "target_modules": ["q", "v"], "rank_pattern": {"^q|v$": 2}, "bias": None}
    with tracking([name], tmp_path / "run", {"seed": 1, "lora": lora, "metrics": ["f1"]}) as tell:
        for step in (1, 2):
            tell(progress(step, evaluated=2 if step == 2 else None))
    (one,) = kind.made
    assert (one.project, one.named) == ("loraloom", {called: "run"})
    assert one.options == {
        "seed": 1,
        "lora.r": 4,
        "lora.target_modules": '["q", "v"]',
        "lora.rank_pattern": '{"^q|v$": 2}',
        "lora.bias": None,
        "metrics": '["f1"]',
    }
    figures = {"train/loss": 1.0, "train/learning_rate": 0.1, "train/tokens_per_second": 50.0}
    assert one.told[0] == (1, figures)
    assert one.told[1] == (2, {**figures, "train/loss": 0.5, "eval/loss": 0.5, "eval/accuracy": 0.75})
    assert one.ended == [0]


def test_a_tracker_that_does_not_start_is_said_before_the_first_step_and_the_others_end(
    fake: Callable[..., type[Fake]], tmp_path: Path
) -> None:
    good, _ = fake("trackio"), fake("wandb", "start")
    with pytest.raises(ConfigError) as error, tracking(["trackio", "wandb"], tmp_path):
        pytest.fail("it was entered")
    assert str(error.value) == (
        "report_to: wandb does not start (OSError: no start); log in with wandb login, or set WANDB_MODE=offline, "
        "or leave it out"
    )
    assert len(good.made[0].ended) == 1


def test_a_tracker_that_fails_on_the_way_is_said_once_and_the_others_are_told_on(
    fake: Callable[..., type[Fake]], tmp_path: Path
) -> None:
    bad, good, said = fake("wandb", "log"), fake("trackio", "finish"), list[str]()
    picky = fake("swanlab", "options")
    with tracking(["wandb", "trackio", "swanlab"], tmp_path, {"seed": 1}, said.append) as tell:
        for step in (1, 2):
            tell(progress(step))
    assert said == [
        "report_to: swanlab did not take the options (OSError: no options)",
        "report_to: wandb failed at step 1 (OSError: no log); training continues without it",
        "report_to: trackio did not end well (OSError: no finish)",
    ]
    assert bad.made[0].ended == []
    assert [step for step, _ in good.made[0].told] == [step for step, _ in picky.made[0].told] == [1, 2]


def test_a_folder_that_tensorboard_cannot_write_is_said_and_nothing_ends(tmp_path: Path) -> None:
    said = list[str]()
    (tmp_path / FOLDER).write_text("a file")
    with tracking(["tensorboard"], tmp_path, log=said.append) as tell:
        tell(progress(1))
        tell(progress(2))
    assert [text.startswith("report_to: tensorboard does not start (") for text in said] == [True]


def test_a_run_that_failed_is_no_success(fake: Callable[..., type[Fake]], tmp_path: Path) -> None:
    kind = fake("wandb")
    with pytest.raises(KeyboardInterrupt), tracking(["wandb"], tmp_path) as tell:
        tell(progress(1))
        raise KeyboardInterrupt
    assert kind.made[0].ended == [1]


def test_mlflow_is_given_names_that_it_takes(fake: Callable[..., type[Fake]], tmp_path: Path) -> None:
    kind = fake("mlflow")
    with tracking(["mlflow"], tmp_path) as tell:
        given = progress(1, evaluated=1)
        assert given.evaluation is not None
        given.evaluation["f(x), %"] = 1.0
        tell(given)
    assert set(kind.made[0].told[0][1]) >= {"train/loss", "eval/accuracy", "eval/f_x__ _"}


def test_a_training_goes_on_without_a_tracker_that_fails_and_does_not_begin_with_one_that_does_not_start(
    fake: Callable[..., type[Fake]], decoder_folder: Path, chats: Path, tmp_path: Path
) -> None:
    def options(tracker: str) -> TrainConfig:
        output = str(tmp_path / tracker)
        given = {"model": str(decoder_folder), "data": str(chats), "task": "causal-lm", "output": output}
        return TrainConfig(**given, max_steps=2, report_to=[tracker])

    fails, good, kind = fake("wandb", "log"), fake("trackio"), fake("mlflow", "start")
    with pytest.raises(ConfigError, match=r"report_to: mlflow does not start \(OSError: no start\)"):
        train_run(options("mlflow"), Console(quiet=True))
    assert not (tmp_path / "mlflow").exists()
    with (tmp_path / "log").open("w") as log:
        result = train_run(options("wandb"), Console(file=log, width=200))
    assert result is not None
    assert result.record["state"] == "finished"
    assert "wandb failed at step 1 (OSError: no log); training continues" in (tmp_path / "log").read_text()
    train_run(options("trackio"), Console(quiet=True))
    train_run(options("trackio"), Console(quiet=True), resume=True)  # has come to its end
    assert [len(one.made) for one in (fails, good, kind)] == [1, 1, 1]
    assert [step for step, _ in good.made[0].told] == [1, 2]
