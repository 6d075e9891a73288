"""Promises of the output folder on the command line: one run at a time, and its run file whatever becomes of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loraloom.config import runfile
from loraloom.files.lock import LOCK_NAME

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def begun() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the program, and waits for a line that has ``until`` in it."""
    processes: list[subprocess.Popen[str]] = []

    def start(arguments: list[object], until: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "loraloom.cli", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        processes.append(process)
        assert process.stdout is not None
        said = []
        late = threading.Timer(120, process.kill)  # a line that never comes is a failure, not a wait without end
        late.start()
        for line in process.stdout:
            said.append(line)
            if until in line:
                late.cancel()
                return process
        raise AssertionError((said, process.communicate()[1]))

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def names(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if not name.startswith("checkpoint-")} - {"tensorboard"}


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(
    world: Any, call: Callable[..., Any], begun: Callable[..., subprocess.Popen[str]]
) -> None:
    folder = world.tmp / "out"
    going = ["--max-steps", 10**6, "--eval-steps", 5, "--save-steps", 5, "--report-to", "none"]
    first = begun(world.train(*going), "step 5 of")
    told = (
        rf"error: output: another run is under way in {re.escape(str(folder))} \(process {first.pid}, since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\); wait for its end, or give another folder with --output\n"
    )
    for arguments in (
        world.train(),
        world.train("--overwrite"),
        world.train(*going, "--resume"),
        world.train("--dry-run"),
        world.tune(),
    ):
        ended = call(*arguments)
        assert ended.code == 2, ended
        assert re.fullmatch(told, ended.err), ended.err
    assert first.poll() is None
    assert call(*world.train("--output", world.tmp / "another")).code == 0
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    assert (folder / LOCK_NAME).exists()
    assert runfile.read(folder / "run.yaml").options.max_steps == 10**6
    assert not (folder / WEIGHTS).exists()
    begun(world.train(*going, "--resume"), "resuming from").send_signal(signal.SIGTERM)


def test_a_second_search_in_a_folder_is_refused_and_so_is_a_run(
    world: Any, call: Callable[..., Any], begun: Callable[..., subprocess.Popen[str]]
) -> None:
    first = begun(world.tune("--max-steps", 10**6), "trial 1 starts")
    for arguments in (world.tune("--max-steps", 10**6), world.tune("--overwrite"), world.train()):
        ended = call(*arguments)
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended
        assert f"error: output: another run is under way in {world.tmp / 'out'} (process {first.pid}, " in ended.err
    assert first.poll() is None


def test_of_two_that_begin_at_once_one_trains_and_the_other_is_refused(world: Any, call: Callable[..., Any]) -> None:
    command = [sys.executable, "-m", "loraloom.cli", *map(str, world.train("--max-steps", 400, "--report-to", "none"))]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=120)[1] for one in both]
    assert sorted(one.returncode for one in both) == [0, 2], said
    assert any("error: output: another run is under way in" in text for text in said)
    assert names(world.tmp / "out") == {
        "adapter_config.json",
        WEIGHTS,
        "run.json",
        "run.yaml",
        "usage.json",
        "curves.png",
    }
    assert call("inspect", world.tmp / "out").code == 0


def test_a_run_that_fails_leaves_the_run_file_that_gives_it_again(
    world: Any, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = ["--max-steps", 200, "--lr", 1e30, "--warmup-ratio", 0, "--r", 3, "--report-to", "none"]
    ended = call(*world.train(*diverging))
    assert (ended.code, "the loss is" in ended.err) == (1, True)
    kept = runfile.read(world.tmp / "out" / "run.yaml").options
    assert (kept.learning_rate, kept.lora.r, kept.max_steps, kept.overwrite) == (1e30, 3, 200, False)
    assert kept.max_length is not None  # nothing is left open
    again = call("train", world.tmp / "out" / "run.yaml", "--output", world.tmp / "again")
    assert again.err == ended.err.replace(str(world.tmp / "out"), str(world.tmp / "again"))

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("loraloom.training.trainer.advance", fail)
    ended = call(*world.train("--output", world.tmp / "third"))
    assert (ended.code, ended.err.startswith("error: out of memory")) == (1, True)
    assert os.listdir(world.tmp / "third") == ["run.yaml"]
    monkeypatch.undo()
    assert call(*world.train("--output", world.tmp / "third", "--resume")).code == 0  # it is in nobody's way
    assert call(*world.train("--output", world.tmp / "fourth", "--dry-run")).code == 0
    assert not (world.tmp / "fourth").exists()


def test_the_run_file_is_there_before_the_first_step_and_the_adapter_before_keeps_its_own(
    world: Any, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = world.tmp / "out"
    assert call(*world.train("--seed", 1)).code == 0
    before = {name: (folder / name).read_bytes() for name in (WEIGHTS, "run.yaml", "run.json")}
    seen = []

    def fail(*_: Any, **__: Any) -> None:
        seen.append(runfile.read(folder / "run.yaml").options.seed)
        raise MemoryError

    monkeypatch.setattr("loraloom.training.trainer.advance", fail)
    assert call(*world.train("--seed", 2, "--overwrite")).code == 1
    assert seen == [2]
    assert {name: (folder / name).read_bytes() for name in before} == before
    monkeypatch.undo()
    assert call(*world.train("--seed", 2, "--overwrite")).code == 0
    assert runfile.read(folder / "run.yaml").options.seed == 2


def test_a_run_that_is_refused_when_it_would_begin_changes_no_file(
    world: Any, call: Callable[..., Any], refused: Callable[..., None]
) -> None:
    assert call(*world.train("--max-steps", 2, "--save-steps", 1)).code == 0
    (world.tmp / "out" / WEIGHTS).unlink()
    (world.tmp / "out" / "run.json").unlink()
    other = world.lines("rows.jsonl", *[{"text": f"good {i}", "label": "ab"[i % 2]} for i in range(200)])
    arguments = world.train("--max-steps", 2, "--save-steps", 1, "--resume", data=other)
    refused(arguments, "resume: ", "was trained on other data")
    elsewhere = world.train("--max-steps", 2, "--output", world.tmp / "new" / "one", data=other)
    refused([*elsewhere, f"--resume={world.tmp / 'out' / 'checkpoint-1'}"], "resume: ", "was trained on other data")
