"""Promises to who has files of an earlier loraloom on disk: they are read, resumed and shown as they were.

``files`` was written by loraloom 0.1.0 (``make`` says how). Each test works on a copy, by commands and public names
alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraloom import PeftModel
from ondisk.cases import FILES, KINDS, WEIGHTS, Kind, base, outputs, processor

MADE = json.loads((FILES / "made.json").read_text())
#: On another processor the last bits differ.
SAME = processor() == MADE["processor"]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files, which tests may change where no other looks."""
    return Path(shutil.copytree(FILES, tmp_path_factory.mktemp("disk") / "files"))


@pytest.fixture(autouse=True)
def _there(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(disk)


# -- adapters ---------------------------------------------------------------------------------------------------------


def check_answers(model: torch.nn.Module, name: str, kind: Kind) -> None:
    wanted = load_file("adapters/logits.safetensors")[name]
    if SAME:
        assert torch.equal(outputs(model), wanted)
    tolerance = 1e-5 if kind.dtype is torch.float32 else 2e-2
    torch.testing.assert_close(outputs(model), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_gives_the_logits_that_it_gave_and_is_written_as_it_was(name: str, tmp_path: Path) -> None:
    kind, folder = KINDS[name], Path("adapters") / name
    model = PeftModel.from_pretrained(base(kind, Path()), folder)
    check_answers(model.eval(), name, kind)
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    then, now = (json.loads((one / "adapter_config.json").read_text()) for one in (folder, tmp_path))
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
