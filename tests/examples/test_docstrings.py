"""Promises of the quickstart's corpus: real docstrings, clean labels, the same bytes every time."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from loraloom import tasks
from loraloom.data.read.sources import resolve
from loraloom.data.shape.shapes import recognise

SCRIPT = Path(__file__).parents[2] / "examples" / "docstrings.py"


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docstrings_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(corpus: ModuleType) -> list[dict[str, str]]:
    return corpus.collect()


def test_the_rows_are_thousands_of_distinct_clean_docstrings(rows: list[dict[str, str]]) -> None:
    assert 4_000 < len(rows) < 8_000
    texts = [row["text"] for row in rows]
    assert len(set(texts)) == len(texts)
    assert min(map(len, texts)) > 40
    assert all(text == " ".join(text.split()) for text in texts)


def test_every_area_has_rows_and_none_has_a_third_of_them(corpus: ModuleType, rows: list[dict[str, str]]) -> None:
    counts = Counter(row["label"] for row in rows)
    assert list(counts) == list(corpus.AREAS)
    assert len(counts) == 11
    assert min(counts.values()) > 80
    assert max(counts.values()) < len(rows) / 3


def test_a_known_docstring_has_the_area_of_its_module(rows: list[dict[str, str]]) -> None:
    import heapq
    import threading

    areas = {row["text"]: row["label"] for row in rows}
    assert areas[" ".join((heapq.merge.__doc__ or "").split())] == "data types"
    assert areas[" ".join((threading.Barrier.__doc__ or "").split())] == "concurrency"


def test_no_module_is_in_two_areas(corpus: ModuleType) -> None:
    modules = [module for names in corpus.AREAS.values() for module in names.split()]
    assert [module for module, count in Counter(modules).items() if count > 1] == []


def test_a_library_is_read_without_its_tests_and_never_run_wherever_it_is_installed(
    corpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "test" / "lib"
    kept = "A function of the package, described in one sentence."
    left_out = "A function of the tests, described in one sentence."
    files = {"json/decoder.py": kept, "json/tests/helper.py": left_out, "textwrap.py": kept + "  And\n  more."}
    for name, docstring in files.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        body = f'raise RuntimeError("this file was run")\ndef f():\n    """{docstring}"""\n'
        (library / name).write_text(body, encoding="utf-8")
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    assert corpus.collect() == [
        {"text": kept + " And more.", "label": "text"},
        {"text": kept, "label": "email and web data"},
    ]


def test_the_script_writes_the_same_bytes_every_time_and_they_can_be_trained_on(
    corpus: ModuleType, rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "collect", lambda: rows)
    train, held = corpus.write(tmp_path / "new" / "a")
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "b")], check=True, capture_output=True)
    for path in (train, held):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    parts = [list(resolve(path)[0]) for path in (train, held)]
    assert len(parts[1]) == 800
    written = [json.dumps(row.fields, sort_keys=True) for part in parts for row in part]
    assert sorted(written) == sorted(json.dumps(row, sort_keys=True) for row in rows)
    shape = recognise(parts[0], tasks.get("seq-cls"))
    assert (shape.name, shape.problem_type) == ("text-label", "single_label_classification")
    for part in parts:
        assert {shape.read(row).label for row in part} == set(corpus.AREAS)


def test_a_python_without_its_sources_is_told_so(
    corpus: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(SystemExit, match="only 0 docstrings found"):
        corpus.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
