"""Promises of checkpoints on disk: whole or absent, what comes back is what was written, and the right ones go."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraloom.errors import ConfigError, SaveError
from loraloom.files.atomic import write_files
from loraloom.report.sentences import sentence
from loraloom.training import early_stopping
from loraloom.training.checkpointing import folders
from loraloom.training.checkpointing.folders import MANIFEST_NAME, STATE_NAME, TENSORS_NAME

ADAPTER = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}"}


def adapter(folder: Path) -> None:
    write_files(folder, ADAPTER)


def write(folder: Path, step: int, **state: object) -> Path:
    return folders.write(folder, step, adapter, {"a/b": torch.arange(4.0)}, state)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Whole ------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 2).to(torch.bfloat16),
        "count": torch.tensor(7),
        "members": torch.tensor([3, 1]),
        "turned": torch.randn(2, 3).T,
        "bytes": torch.get_rng_state(),
    }
    tensors["view"] = tensors["half"][1:]
    state = {"curve": {"loss": [0.1, math.nan, -math.inf, 1 / 3], "none": None, "flag": True}, "text": "é"}
    path = folders.write(tmp_path / "a" / "run", 12, adapter, tensors, state)
    assert path == tmp_path / "a" / "run" / "checkpoint-12"
    assert names(path) == sorted([*ADAPTER, TENSORS_NAME, STATE_NAME, MANIFEST_NAME])
    found = folders.read(path)
    assert (found.step, found.state["text"], found.state["curve"]["flag"]) == (12, "é", True)
    assert str(found.state["curve"]["loss"]) == str(state["curve"]["loss"])  # NaN differs from itself
    back = found.tensors()
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)


def test_the_first_metric_of_an_evaluation_is_still_the_first(tmp_path: Path) -> None:
    measured = {"step": 1, "loss": 0.5, "f1": 0.2, "accuracy": 0.9}  # the first beside the loss is what is watched
    path = write(tmp_path, 1, curve={"evaluations": [measured]})
    (found,) = folders.read(path).state["curve"]["evaluations"]
    assert list(found) == list(measured)
    assert early_stopping.watched(found, None) == "f1"


def test_the_manifest_is_what_anybody_can_check(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    text = "".join(f"{entry['sha256']}  {name}\n" for name, entry in manifest.items())
    done = subprocess.run(["sha256sum", "-c"], input=text, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("OK") == 4
    assert all((path / name).stat().st_size == entry["bytes"] for name, entry in manifest.items())


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 3, place=1)
    path = write(tmp_path, 3, place=2)
    assert folders.read(path).state["place"] == 2
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / TENSORS_NAME).write_bytes((p / TENSORS_NAME).read_bytes()[:-1]), "has [0-9]+ bytes and had"),
        (lambda p: (p / STATE_NAME).write_bytes((p / STATE_NAME).read_bytes().replace(b"3", b"4")), "json is damaged"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"weighty"), "adapter_model.safetensors is damaged"),
        (lambda p: (p / "adapter_config.json").unlink(), "it has no adapter_config.json"),
        (lambda p: (p / MANIFEST_NAME).unlink(), "it has no manifest.json"),
        (lambda p: (p / MANIFEST_NAME).write_text("{"), "is not what loraloom writes"),
        (lambda p: (p / MANIFEST_NAME).write_text("[]"), "is not what loraloom writes"),
        (lambda p: (p / MANIFEST_NAME).write_text('{"state.json": 3}'), "is not what loraloom writes"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_one_that_is_not_whole_is_refused_with_what_is_wrong(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    path = write(tmp_path, 3)
    assert folders.is_whole(path)
    damage(path)
    assert not folders.is_whole(path)
    with pytest.raises(ConfigError, match=f"checkpoint-3 is no whole checkpoint: .*{said}"):
        folders.read(path)


def test_the_format_of_a_later_version_is_refused_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 2)
    monkeypatch.setattr(folders, "FORMAT", folders.FORMAT + 1)
    path = write(tmp_path, 3)
    monkeypatch.undo()
    said = (
        f"{path}: the checkpoint is of format {folders.FORMAT + 1}, and this version of loraloom reads {folders.FORMAT}"
    )
    for read in (lambda: folders.read(path), lambda: folders.newest(tmp_path)):  # never the one before it
        with pytest.raises(ConfigError, match=said):
            read()


# The newest ---------------------------------------------------------------------------------------------------------


def test_the_newest_is_that_of_the_most_steps_whatever_the_names_sort_like(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-200").write_text("no folder")
    found = folders.newest(tmp_path)
    assert found is not None
    assert found.step == 100
    assert folders.newest(tmp_path / "nothing") is None


def test_damaged_ones_are_named_and_passed_over(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoint-3" / STATE_NAME).unlink()
    (tmp_path / "checkpoint-2" / TENSORS_NAME).write_bytes(b"")
    notes: list[str] = []
    found = folders.newest(tmp_path, lambda message: notes.append(sentence(message)))
    assert found is not None
    assert found.step == 1
    assert len(notes) == 2
    assert notes[0] == f"{tmp_path}/checkpoint-3 is no whole checkpoint: it has no state.json; it is skipped"
    assert notes[1].startswith(f"{tmp_path}/checkpoint-2 is no whole checkpoint: state.safetensors has 0 bytes")


# Old ones go --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (1, [], [5]),
        (2, [], [4, 5]),
        (3, [1], [1, 4, 5]),
        (2, [2], [2, 5]),
        (1, [2], [2, 5]),
        (9, [], [1, 2, 3, 4, 5]),
        (1, [5], [5]),
    ],
)
def test_the_newest_and_those_to_keep_stay_whatever_the_limit(
    tmp_path: Path, limit: int, keep: list[int], left: list[int]
) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    folders.rotate(tmp_path, limit, keep)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


def test_what_killed_runs_left_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path, 3)
    others = ["checkpoint-9", ".checkpoint-9", ".checkpoint-9.notes", "logs"]
    for name in [".checkpoint-4.0123abcd", ".checkpoint-12.ffffffff", *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    folders.clean(tmp_path)
    assert names(tmp_path) == sorted(["checkpoint-3", *others])
    folders.clean(tmp_path / "nothing")


def test_all_can_be_forgotten(tmp_path: Path) -> None:
    write(tmp_path, 3)
    write(tmp_path, 4)
    (tmp_path / "mine").write_text("x")
    folders.forget(tmp_path)
    assert names(tmp_path) == ["mine"]


def test_a_copy_is_the_same_in_another_folder(tmp_path: Path) -> None:
    there = folders.read(write(tmp_path / "a", 3, best=1.5))
    copied = folders.read(folders.copy(there, tmp_path / "b"))
    assert copied.path == tmp_path / "b" / "checkpoint-3"
    assert copied.state == there.state
    for name in names(there.path):
        assert (copied.path / name).read_bytes() == (there.path / name).read_bytes()


# A full disk ----------------------------------------------------------------------------------------------------------

FILLED = """
import resource, sys
import torch
from loraloom.errors import SaveError
from loraloom.files.atomic import write_files
from loraloom.training.checkpointing import folders

folder, limit, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
files = {"adapter_model.safetensors": b"w" * 300, "adapter_config.json": b"{}"}
try:
    folders.write(folder, 4, lambda to: write_files(to, files), {"a": torch.zeros(size)}, {"curve": [0.5] * 100})
except SaveError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 200, 1000, 2000])
def test_on_a_full_disk_nothing_is_left_and_those_before_are_whole(tmp_path: Path, limit: int) -> None:
    write(tmp_path, 3)
    done = subprocess.run(
        [sys.executable, "-c", FILLED, str(tmp_path), str(limit), "1000"], capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout.startswith(f"{tmp_path}/checkpoint-4: the checkpoint cannot be written (")
    assert "File too large" in done.stdout
    assert "those that were there are unchanged" in done.stdout
    assert names(tmp_path) == ["checkpoint-3"]
    assert folders.is_whole(tmp_path / "checkpoint-3")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != limit


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError, match="checkpoint-1: the checkpoint cannot be written"):
        write(tmp_path / "file", 1)
