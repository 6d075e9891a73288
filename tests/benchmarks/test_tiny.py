"""Benchmarks that measure steps run from end to end on a tiny shape and write what they say they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraloom.lora import matmul

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HALF = "half" if matmul.native("cpu", torch.bfloat16) else "half-without-instructions"


@pytest.mark.parametrize(
    ("script", "result", "keys"),
    [
        ("step", "step", {"shape", "goal", "seconds", "times the floor"}),
        ("pack", "pack", {"shape", "goal", "seconds", "throughput over peft"}),
        ("half", HALF, {"shape", "seconds", "bfloat16 over float32"}),
        ("breakdown", "profile", {"shape", "goal", "floor", "step", "parts", "calls", "times the floor", "limit"}),
    ],
)
def test_a_tiny_run_writes_its_figures(script: str, result: str, keys: set[str], tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), "--tiny", "--repetitions", "1"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / f"{result}.json") in done.stdout
    record = json.loads((tmp_path / f"{result}.json").read_text())
    assert record.keys() == {"command", "date", "figures", "machine"}
    (figure,) = record["figures"]
    assert figure.keys() == keys
    for part in figure.get("parts", figure.get("seconds")).values():
        assert all(number > 0 for number in part) if isinstance(part, list) else isinstance(part, float)
