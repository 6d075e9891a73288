"""Whole searches on a table come to claims and targets, and the same seeds to the same ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "search" / "calibrate.py"


def test_a_few_searches_write_the_targets_and_what_was_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--searches", "24", "--tables", "late", "--rules", "all in full"]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "search-calibration.json").read_text())["tables"]["late"]["all in full"]
    measured = {one["figure"]: one for one in record["figures"]}
    assert measured["recommends more than 0.01 below untrained"]["met"]
    assert 0.9 < record["besides"]["holds"]["better than untrained, test rows"] <= 1
    assert "holds: better than untrained, test rows" in done.stdout
