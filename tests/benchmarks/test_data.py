"""The benchmark of preparing rows runs from end to end on a few and writes what it says it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data.py"


@pytest.mark.parametrize("task", ["causal-lm", "seq-cls"])
def test_a_few_rows_are_prepared_twice_and_the_figures_written(task: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--rows", "6000", "--workers", "2", "--task", task]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "data.json") in done.stdout
    record = json.loads((tmp_path / "data.json").read_text())
    assert record.keys() == {"command", "date", "figures", "machine"}
    figures = record["figures"]
    first, cached = figures["first"], figures["cached"]
    assert (figures["rows"], figures["task"]) == (6000, task)
    assert first["tokens"] == cached["tokens"] > 6000
    assert first["peak bytes"] > first["main bytes"] > 10**7
    assert cached["peak bytes"] == cached["main bytes"]  # no worker was needed
    assert figures["cache bytes"] > 4 * first["tokens"]
