"""Promises to who has files of an earlier loraloom on disk: they are read, resumed and shown as they were.

``files`` was written by loraloom 0.1.0 (``make`` says how). Each test works on a copy, by commands and public names
alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraloom import PeftModel
from ondisk.cases import FILES, KINDS, RUNS, WEIGHTS, Kind, base, loraloom, near, outputs, processor

MADE = json.loads((FILES / "made.json").read_text())
#: On another processor the last bits differ.
SAME = processor() == MADE["processor"]


@pytest.fixture(autouse=True)
def _a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are where the test runs."""
    monkeypatch.chdir(shutil.copytree(FILES, tmp_path / "disk"))


# -- adapters ---------------------------------------------------------------------------------------------------------


def check_answers(model: torch.nn.Module, name: str, kind: Kind) -> None:
    wanted = load_file("adapters/logits.safetensors")[name]
    if SAME:
        assert torch.equal(outputs(model), wanted)
    tolerance = 1e-5 if kind.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(outputs(model), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_gives_the_logits_that_it_gave_and_is_written_as_it_was(name: str) -> None:
    kind, folder = KINDS[name], Path("adapters") / name
    model = PeftModel.from_pretrained(base(kind, Path()), folder)
    check_answers(model.eval(), name, kind)
    model.save_pretrained("again")
    assert Path("again", WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    then, now = (json.loads((one / "adapter_config.json").read_text()) for one in (folder, Path("again")))
    assert {key: now.get(key) for key in then} == then


def test_two_adapters_that_were_saved_together_are_read_apart_and_together() -> None:
    kind = KINDS["linear"]
    model = PeftModel.from_pretrained(base(kind, Path()), "adapters/two")
    check_answers(model.eval(), "first", kind)
    model.load_adapter("adapters/two/second", "second")
    model.set_adapter("second")
    check_answers(model.eval(), "second", kind)


def test_an_adapter_whose_save_was_killed_half_way_through_its_files_is_the_new_one() -> None:
    left = [path.name for path in Path("adapters/interrupted").iterdir() if path.name.startswith(".")]
    assert len(left) == 2, "a journal, and a file that it names"
    model = PeftModel.from_pretrained(base(KINDS["rslora"], Path()), "adapters/interrupted")
    check_answers(model.eval(), "rslora", KINDS["rslora"])
    config = json.loads(Path("adapters/interrupted/adapter_config.json").read_text())
    assert config["use_rslora"] is True


# -- runs -------------------------------------------------------------------------------------------------------------

#: Run → the step after which it is resumed, where that is not 6; none where nothing is left to train.
RESUMED: dict[str, list[int]] = {"within": [7], "stopped": [7], "best": [8], "saved": []}


def record(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "run.json").read_text())
    return found


def check_end(folder: str, name: str) -> None:
    """The adapter in ``folder`` is the one that the run ``name`` came to when nobody killed it."""
    found, wanted = Path(folder, WEIGHTS), Path("ends", f"{name}.safetensors")
    if SAME:
        assert found.read_bytes() == wanted.read_bytes()
    near(found, wanted, name)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_comes_to_the_adapter_of_one_that_was_not(name: str) -> None:
    folder = f"train/{name}"
    assert loraloom(["train", f"{folder}.yaml", "--resume"]) == 0
    check_end(folder, name)
    found = record(folder)
    assert (found["state"], found["resumed_at"]) == ("finished", RESUMED.get(name, [6]))
    assert [path.name for path in Path(folder).rglob(".*")] == [], "nothing is left of what was killed"


def test_a_run_is_resumed_by_the_run_file_in_its_own_folder_and_only_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", "train/within/run.yaml"]
    assert loraloom(command) == 2
    assert "checkpoint-7" in capsys.readouterr().err
    assert loraloom([*command, "--resume"]) == 0
    check_end("train/within", "within")
    said = capsys.readouterr().out
    before = Path("train/within", WEIGHTS).stat()
    assert loraloom([*command, "--resume"]) == 0
    assert Path("train/within", WEIGHTS).stat() == before, f"finished, and not written again: {said}"


def test_a_run_is_never_mixed_with_one_of_other_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert loraloom(["train", "train/checkpoint.yaml", "--resume", "--set", "train.learning_rate=0.02"]) == 2
    assert "learning_rate is 0.02 and was 0.01" in capsys.readouterr().err
    assert loraloom(["train", "train/checkpoint.yaml", "--resume", "--set", "data.train=stars.jsonl"]) == 2


def test_a_run_is_resumed_in_a_folder_that_was_moved() -> None:
    moved = Path("elsewhere/deep")
    shutil.copytree("train/checkpoint", moved)
    assert loraloom(["train", "train/checkpoint.yaml", "--resume", "--output", str(moved)]) == 0
    check_end(str(moved), "checkpoint")
