"""Promises of the command line when the work fails: one message, exit code 1, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloom import PeftModel
from loraloom.models.load import load_base
from loraloom.tasks import TASKS
from loraloom.training.run_record import RUN_NAME

WEIGHTS = "adapter_model.safetensors"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loraloom.cli", *map(str, arguments)]


def classify(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    return ["train", "--model", model, "--data", data, "--task", "seq-cls", "--output", output, *more]


def test_ctrl_c_saves_what_is_there_and_says_how(encoder_folder: Path, reviews: Path, tmp_path: Path) -> None:
    arguments = classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 10**6, "--eval-steps", 5)
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    threading.Timer(120, process.kill).start()
    for line in process.stdout:
        if line.startswith("step 5 of"):
            process.send_signal(signal.SIGINT)
            break
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "stopping after this step" in said
    record = json.loads((tmp_path / "run" / RUN_NAME).read_bytes())
    assert f"stopped at step {record['steps']} of 1000000" in said.splitlines()[-1]
    assert f"saved in {tmp_path / 'run'}" in said
    assert record["state"] == "interrupted"
    assert record["steps"] == len(record["curve"]["loss"]) == record["curve"]["evaluations"][-1]["step"] >= 5
    assert (tmp_path / "run" / "curves.png").is_file()
    base, _ = load_base(str(encoder_folder), TASKS["seq-cls"], "float32", record["data"]["labels"])
    model = PeftModel.from_pretrained(base, tmp_path / "run")
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_ctrl_c_while_the_model_is_loading_leaves_nothing(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraloom.training.setup.load_base", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run"))
    assert (ended.code, ended.err) == (1, "error: stopped\n")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_said_and_the_adapter_from_before_is_still_there(
    call: Callable[..., Any],
    encoder_folder: Path,
    reviews: Path,
    tmp_path: Path,
    snapshot: Callable[[Path], dict[str, str]],
) -> None:
    arguments = classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 2)
    assert call(*arguments).code == 0
    before = snapshot(tmp_path)
    scratch = tmp_path.parent / f"{tmp_path.name}-scratch"
    scratch.mkdir()
    done = subprocess.run(
        command(*arguments, "--overwrite", "--seed", 1),
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch), "MPLCONFIGDIR": str(scratch)},
        # No file may grow beyond this, wherever it lies: every write of the adapter fails.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    for part in (f"error: {tmp_path / 'run'}", "cannot be written", "what was there is unchanged", str(scratch)):
        assert part in message
    assert "please report it" not in message
    # What TensorBoard shows of the run that failed is beside it.
    assert {name: what for name, what in snapshot(tmp_path).items() if name in before} == before
    assert {Path(name).parts[1] for name in snapshot(tmp_path).keys() - before.keys()} <= {"tensorboard"}
    assert not list(scratch.glob("loraloom-rescued*"))


def test_an_output_lost_in_the_middle_of_training_sends_the_adapter_elsewhere(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraloom.report.terminal import Meter

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    seen = Meter.__call__

    def lose(meter: Meter, progress: Any) -> None:
        seen(meter, progress)
        if progress.step == 1:
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run").write_text("a file where the folder should be")

    monkeypatch.setattr(Meter, "__call__", lose)
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 2))
    assert ended.code == 1
    (rescued,) = scratch.glob("loraloom-rescued-*")
    assert ended.err.count("\n") == 1
    assert f"The trained adapter is saved in {rescued} instead" in ended.err
    assert sorted(os.listdir(rescued)) == ["adapter_config.json", WEIGHTS, RUN_NAME, "usage.json"]
    assert call("inspect", rescued).code == 0


def test_a_plot_that_cannot_be_written_is_said_with_what_is_saved(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraloom.report.terminal import Meter

    monkeypatch.setattr(Meter, "__call__", lambda *_: (tmp_path / "run" / "curves.png").mkdir(exist_ok=True))
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 2))
    assert ended.code == 1
    assert "curves.png: cannot be written" in ended.err
    assert f"the adapter and {RUN_NAME} are saved in {tmp_path / 'run'}" in ended.err
    assert (tmp_path / "run" / WEIGHTS).exists()


def test_training_that_diverges_says_the_step_and_keeps_the_weights_from_before(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    options = ["--max-steps", 200, "--lr", 1e30, "--warmup-ratio", 0]
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run", *options))
    assert ended.code == 1
    record = json.loads((tmp_path / "run" / RUN_NAME).read_bytes())
    assert record["state"] == "failed"
    assert f"error: step {record['steps'] + 1}: the loss is" in ended.err
    assert "lower the learning rate" in ended.err
    assert f"after step {record['steps']} is saved in {tmp_path / 'run'}" in ended.err
    assert ended.err.count("\n") == 1


def test_an_error_that_nobody_foresaw_is_one_line_and_the_trace_is_there_for_the_asking(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the moon is full\nand so on")

    monkeypatch.setattr("loraloom.training.setup.load_base", fail)
    arguments = classify(encoder_folder, reviews, tmp_path / "run")
    ended = call(*arguments)
    assert ended.code == 1
    assert ended.err == (
        "error: unexpected, please report it: RuntimeError: the moon is full (LORALOOM_TRACEBACK=1 shows where)\n"
    )
    monkeypatch.setenv("LORALOOM_TRACEBACK", "1")
    assert "in fail" in call(*arguments).err
    monkeypatch.setattr("loraloom.training.setup.load_base", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    monkeypatch.delenv("LORALOOM_TRACEBACK")
    ended = call(*arguments)
    assert ended.code == 1
    assert ended.err.startswith("error: out of memory; lower batch_size or max_length")


def test_a_reader_that_closes_the_pipe_hears_no_complaint(trained: Path) -> None:
    first = subprocess.Popen(command("inspect", trained, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.close()
    assert first.stderr is not None
    assert first.stderr.read() == b""
    assert first.wait(timeout=60) == 1


def test_an_error_of_the_system_that_nobody_foresaw_names_the_file(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "some/file")

    monkeypatch.setattr("loraloom.training.setup.load_base", fail)
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run"))
    assert ended.code == 1
    assert ended.err == (
        "error: some/file: cannot be read or written (Input/output error); run the same command again\n"
    )
