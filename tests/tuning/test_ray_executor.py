"""Promises of workers in processes of their own: the same trials as in one, and a dead one loses its last interval."""

from __future__ import annotations

import builtins
import os
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraloom import PeftModel
from loraloom.engine.slot_state import SlotState
from loraloom.errors import ConfigError, TrainingError
from loraloom.messages import Message
from loraloom.models.load import load_base
from loraloom.tasks import TASKS
from loraloom.training.failures import Interrupted
from loraloom.training.setup import load
from loraloom.tuning import ray_executor, search
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.executor import SearchStatus
from loraloom.tuning.ray_executor import DEATHS, RayExecutor
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import Report, TrialFactory, Worker

Make = Callable[..., TuneConfig]
VALUES = {"lora.r": 4, "train.learning_rate": 3e-3}
GRID = {"lora.r": [2, 4, 8], "train.learning_rate": [1e-3, 5e-3]}


class Watch:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.running: set[int] = set()

    def event(self, message: Message) -> None:
        self.events.append(message.kind)

    def update(self, status: SearchStatus) -> None:
        self.running |= {trial.number for trial in status.running}


@pytest.fixture
def ray() -> Iterator[None]:
    found = pytest.importorskip("ray", reason="needs loraloom[ray]")
    yield
    assert not found.is_initialized()  # what was started is let go


@pytest.fixture
def crews(monkeypatch: pytest.MonkeyPatch) -> list[RayExecutor]:
    """The crews that searches made."""
    made: list[RayExecutor] = []

    class Seen(RayExecutor):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(ray_executor, "RayExecutor", Seen)
    return made


def begin(options: TuneConfig, steps: int) -> tuple[Worker, Trial, list[str]]:
    """A worker in this process, and a trial for it."""
    options = replace(options, train=replace(options.train, max_steps=steps))
    setup = load(options.train)
    options = replace(options, train=setup.options)
    factory = TrialFactory(options, setup)
    trial = Trial(0, VALUES, factory.trial_options(VALUES, 0), steps, state="running")
    return Worker(options, setup, factory), trial, list(setup.data.hashes.values())


def finish(go_on: Callable[[list[tuple[Trial, SlotState | None]]], Report], trial: Trial) -> Report:
    report = go_on([(trial, None)])
    while report.trials[0].state == "running":
        report = go_on([])
    return report


# -- words and options ------------------------------------------------------------------------------------------------


def test_without_ray_the_message_names_what_to_install(classify: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"workers: several workers need Ray; pip install 'loraloom\[ray\]'"):
        search.search(classify(GRID, trials=2, finalists=1, workers=2))
    search.search(classify(GRID, trials=2, finalists=1, seeds=0, slots=2))  # one worker knows nothing of it


@pytest.mark.usefixtures("ray")
def test_an_address_at_which_nobody_answers_is_named(classify: Make) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for address in (f"127.0.0.1:{port}", "junk"):
        with pytest.raises(ConfigError, match=f"ray_address: no Ray cluster answers at {address}"):
            search.search(classify(GRID, trials=2, finalists=1, ray_address=address))


# -- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_trial_is_the_same_to_the_bit_elsewhere_also_when_its_worker_is_killed(classify: Make) -> None:
    options = classify(GRID, trials=2, finalists=1, min_share=0.02)
    here, trial, hashes = begin(options, steps=400)
    expected = finish(lambda enter: here.run(enter, []), trial)

    crew = RayExecutor(here.options, hashes, lambda trials, rate: None, lambda: False)
    try:
        _, trial, _ = begin(options, steps=400)
        trial.goal = 8
        crew.start(0, [(trial, None)], [])
        worker, report = crew.wait()
        assert report is not None
        assert (worker, report.events, report.trials[0].step) == (0, [0], 8)
        crew.start(0, [], [])
        os.kill(crew.places[0].pid, signal.SIGKILL)
        assert crew.wait() == (0, None)
        # From what it handed over, a fresh one goes on.
        enter: list[tuple[Trial, SlotState | None]] = [(report.trials[0], report.states[0])]
        while report.trials[0].state == "running":
            crew.start(0, enter, [])
            _, report = crew.wait()
            assert report is not None
            enter = []
        assert report.trials[0].curve == expected.trials[0].curve
        for key, value in expected.states[0].tensors.items():
            assert torch.equal(report.states[0].tensors[key], value), key
        written = Path(options.train.output) / "trials" / "trial-0"
        assert (written / "adapter_model.safetensors").is_file()  # this process wrote what the worker sent
    finally:
        crew.close()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_two_workers_share_one_search_and_come_to_a_verdict(classify: Make, crews: list[RayExecutor]) -> None:
    options, watch = classify(GRID, trials=6, finalists=2, seeds=1, slots=2, workers=2), Watch()
    result = search.search(options, watch.event, watch.update)
    trials = result.record["trials"]
    assert sum(trial["repeats"] is None for trial in trials) == 6
    assert {trial["state"] for trial in trials} <= {"finished", "stopped"}
    assert all(len(trial["curve"]["loss"]) == trial["steps"] for trial in trials)
    assert watch.running == {trial["number"] for trial in trials}
    assert result.record["machine"]["workers"] == 2
    assert len({place.pid for place in crews[0].places} | {os.getpid()}) == 3
    model, _ = load_base(options.train.model, TASKS["seq-cls"], "float32", ["blame", "praise"])
    done = next(trial["number"] for trial in trials if trial["state"] == "finished")
    PeftModel.from_pretrained(model, result.folder / "trials" / f"trial-{done}")


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_a_search_goes_on_when_a_worker_is_killed(
    classify: Make, crews: list[RayExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, wait = [], RayExecutor.wait

    def kill(crew: RayExecutor) -> tuple[int, Report | None]:
        waits.append(None)
        if len(waits) == 3:
            os.kill(crew.places[1].pid, signal.SIGKILL)
        return wait(crew)

    monkeypatch.setattr(RayExecutor, "wait", kill)
    watch = Watch()
    result = search.search(classify(GRID, trials=6, finalists=2, seeds=1, slots=2, workers=2), watch.event)
    assert "worker_died" in watch.events
    trials = result.record["trials"]
    assert sum(trial["repeats"] is None for trial in trials) == 6
    assert {trial["state"] for trial in trials} <= {"finished", "stopped"}
    assert all(len(trial["curve"]["loss"]) == trial["steps"] for trial in trials)


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_ctrl_c_saves_what_all_workers_have_and_a_worker_that_only_dies_ends_the_search(
    classify: Make, crews: list[RayExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = classify(GRID, trials=6, finalists=2, seeds=0, slots=2, workers=2)
    options = replace(options, train=replace(options.train, max_steps=3000))
    pressed, wait = [], RayExecutor.wait

    def press(crew: RayExecutor) -> tuple[int, Report | None]:
        if not pressed:
            pressed.append(crew)
            os.kill(os.getpid(), signal.SIGINT)
        return wait(crew)

    with monkeypatch.context() as patch:
        patch.setattr(RayExecutor, "wait", press)
        with pytest.raises(Interrupted, match="the same command resumes"):
            search.search(options)
    under_way = list((Path(options.train.output) / "under-way").iterdir())
    assert len(under_way) == 4  # those of both workers

    def hire(crew: RayExecutor) -> Any:
        class Dies:
            def open(self) -> ray_executor.Placement:
                return ray_executor.Placement("here", os.getpid())

            def run(self, *args: Any) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

        return crew._ray.remote(num_cpus=1)(Dies).remote()

    monkeypatch.setattr(RayExecutor, "_hire", hire)
    monkeypatch.setattr(RayExecutor, "_look", lambda crew: None)
    with pytest.raises(TrainingError, match=f"died {DEATHS} times in a row"):
        search.search(options)
    assert len(list((Path(options.train.output) / "under-way").iterdir())) == 4
