"""Promises of the small programs in ``examples/``: each runs as it stands, in seconds, and learns."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    def call(name: str) -> str:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name, str(folder)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def number(out: str, pattern: str) -> float:
    found = re.findall(pattern, out)
    assert found, out
    return float(found[-1])


def test_a_loop_on_a_pack_trains_three_adapters_that_write_what_they_learned(run: Callable[[str], str]) -> None:
    out = run("pack_loop.py")
    assert number(out, r"r32 (\d\.\d+)") < 0.3
    assert "r32 writes: The capital of Japan is Tokyo" in out


def test_training_from_code_takes_rows_and_a_metric(run: Callable[[str], str]) -> None:
    out = run("train_from_code.py")
    assert number(out, r"(?:^|\n)loss (\d\.\d+)") < 0.5
    assert "first letter right 100%" in out


def test_a_search_from_code_says_what_to_use(run: Callable[[str], str]) -> None:
    out = run("tune_from_code.py")
    assert "to use: {'lora.r':" in out
    assert "its adapter is in" in out


@pytest.mark.parametrize("name", ["transformers_trainer.py", "accelerate_loop.py"])
def test_it_trains_inside_other_loops(name: str, run: Callable[[str], str]) -> None:
    assert number(run(name), r"(?:^|\n)loss (\d\.\d+)") < 2.0


def test_it_trains_inside_trl(run: Callable[[str], str]) -> None:
    pytest.importorskip("trl", reason="needs trl")
    out = run("trl_trainers.py")
    first, last = (float(found) for found in re.findall(r"margins (-?\d+\.\d+) to (-?\d+\.\d+)", out)[0])
    assert last > max(first, 0.1)
