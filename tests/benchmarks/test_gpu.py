"""The script for a GPU runs from end to end on a CPU, stops in time, and says what it left out."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    before = set(sys.modules)
    with warnings.catch_warnings():
        yield importlib.import_module("gpu")
    for name in {"gpu", "gpu_sections", "common", "contenders", "pack"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def run(gpu: ModuleType, tmp_path: Path) -> Run:
    def start(*more: str) -> dict[str, Any]:
        gpu.main(["--device", "cpu", "--small", "--repetitions", "1", "--results", str(tmp_path), *more])
        found: dict[str, Any] = json.loads((tmp_path / "gpu-on-cpu.json").read_text())
        return found

    return start


def test_every_section_that_measures_writes_its_figures(run: Run, gpu: ModuleType) -> None:
    measuring = [name for name in gpu.SECTIONS if name != "tests"]
    found = run("--together", "--only", *measuring)
    assert found.keys() == {"machine", "date", "command", "sections"}
    assert list(found["sections"]) == sorted(measuring)
    for section in found["sections"].values():
        assert "failed" not in section, section
        assert section["machine"]["torch"] == torch.__version__
        assert section.keys() >= {"date", "seconds", "figures", "tables", "skipped"}
    step, pack = (found["sections"][name]["figures"][0] for name in ("step-1b", "pack-1b"))
    assert step["seconds"].keys() == {"floor", "peft", "peft, adapters in the base's dtype", "loraloom"}
    assert step["times the floor"]["loraloom"]["median"] > 0
    assert pack["throughput over peft"].keys() == {"1", "2"}
    waits = found["sections"]["waits"]
    assert waits["figures"].keys() == {"floor", "peft", "loraloom", "pack of 2"}
    assert waits["figures"]["loraloom"]["numbers asked for"] > 0
    assert waits["skipped"] == ["where it waits: torch says so of CUDA alone"]


def test_without_time_nothing_is_begun_and_the_reason_is_written(run: Run) -> None:
    found = run("--minutes", "0.1")
    assert len(found["sections"]) == 5
    for section in found["sections"].values():
        (reason,) = section["skipped"]
        assert reason.startswith("all: ")
        assert "s were left" in reason


def test_a_section_that_hangs_or_dies_costs_no_other(
    run: Run, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "import sys, time\nif 'pack-1b' in sys.argv: time.sleep(60)\nsys.exit('the device is gone')\n"
    (tmp_path / "gpu.py").write_text(script)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "SECTIONS", dict.fromkeys(("pack-1b", "waits"), (None, 0.1, 0.5)))
    found = run()["sections"]
    assert found["pack-1b"]["failed"] == "stopped after 0.5 s"
    assert found["waits"]["failed"]
    monkeypatch.setattr(gpu, "SECTIONS", {"waits": (None, 0.1, 60)})
    found = run()["sections"]
    assert found["waits"]["failed"] == "the process ended with 1"
    assert found["waits"]["said"] == ["the device is gone"]


def test_sections_of_an_earlier_run_stay_when_others_are_run_again(run: Run) -> None:
    run("--minutes", "0.1")
    again = run("--minutes", "0.1", "--only", "waits")["sections"]
    assert len(again) == 5


def test_contenders_share_one_set_of_weights(gpu: ModuleType) -> None:
    sections = sys.modules["gpu_sections"]
    shape = sections.Setting("cpu", True, 1, 0.0).shape(sections.STEPS["1b"])
    one, other = shape.base("cpu"), shape.base("cpu")
    assert one is not other
    assert {p.data_ptr() for p in one.parameters()} == {p.data_ptr() for p in other.parameters()}


def test_the_large_shapes_are_those_of_llama(gpu: ModuleType) -> None:
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        models = {name: LlamaForCausalLM(shape.config) for name, shape in sys.modules["gpu_sections"].STEPS.items()}
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()} == {
        "1b": 1_235_814_400,
        "8b": 8_030_261_248,
    }
