"""The benchmark runs from end to end on a tiny shape and writes what it says it writes."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def lifecycle(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    before = set(sys.modules)
    with warnings.catch_warnings():
        yield importlib.import_module("lifecycle")
    for name in {"lifecycle", "common"} - before:
        sys.modules.pop(name, None)


def test_a_tiny_run_measures_both_libraries_and_writes_the_figures(lifecycle, tmp_path, capsys) -> None:
    shape = ["--layers", "1", "--width", "64", "--vocabulary", "32", "--rank", "2"]
    figures = lifecycle.main([*shape, "--repetitions", "1", "--results", str(tmp_path)])
    record = json.loads((tmp_path / "lifecycle.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["lifecycle.json"]
    assert record["figures"] == figures
    assert record["shape"] == {"layers": 1, "width": 64, "vocabulary": 32, "rank": 2, "repetitions": 1}
    assert record.keys() == {"command", "date", "figures", "machine", "shape"}
    assert record["machine"].keys() >= {"processor", "cores", "threads", "python", "torch", "peft", "loraloom"}
    assert figures.keys() == {"inject", "load", "switch", "save", "import"}
    for operation, goal in {"inject": 5, "load": 10, "switch": 20, "save": 2}.items():
        figure = figures[operation]
        assert figure["goal"] == goal
        seconds = figure["seconds"]
        assert seconds.keys() == {"peft", "loraloom"}
        assert all(len(values) == 1 and values[0] > 0 for values in seconds.values())
        ratio = seconds["peft"][0] / seconds["loraloom"][0]
        assert figure["times faster"] == pytest.approx({"median": ratio, "min": ratio, "max": ratio})
    ours, torchs = (figures["import"]["seconds"][name][0] for name in (lifecycle.NAMES, "import torch"))
    assert figures["import"]["times torch"]["median"] == pytest.approx(ours / torchs)
    assert figures["import"]["goal"] == 1.25
    shown = capsys.readouterr().out
    for operation in ("inject", "load", "switch", "save", "import"):
        assert f"\n{operation}" in shown
    assert str(tmp_path / "lifecycle.json") in shown


def test_contenders_take_turns_and_the_first_turn_does_not_count(lifecycle) -> None:
    taken: list[str] = []

    def contender(name: str):
        def prepare():
            taken.append(f"prepare {name}")
            return lambda: taken.append(name)

        return prepare

    seconds = importlib.import_module("common").alternate({name: contender(name) for name in "ab"}, 2)
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert taken == [
        *("prepare b", "b", "prepare a", "a"),
        *("prepare a", "a", "prepare b", "b"),
        *("prepare b", "b", "prepare a", "a"),
    ]
