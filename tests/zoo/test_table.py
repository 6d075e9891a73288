"""The table of a whole run: what it must hold; and every cell of it, with ``-m sweep``, or in pieces: ``ZOO=3/8``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from zoo import table
from zoo.reasons import UNBUILT, lines_named


def every_cell() -> list[str]:
    cells = sorted(table.read()["cells"])
    chosen = os.environ.get("ZOO", "")
    if "/" in chosen:
        number, of = map(int, chosen.split("/"))
        return cells[number - 1 :: of]
    return [cell for cell in cells if not chosen or cell.split("/")[0] in chosen.split(",")]


@pytest.mark.sweep
@pytest.mark.slow
@pytest.mark.parametrize("cell", every_cell())
def test_every_model_type_does_as_peft_does(cell: str) -> None:
    from zoo.sweep import failures

    assert failures(cell) == []


def test_the_table_that_is_kept_has_no_failure_few_skips_and_two_hundred_types() -> None:
    record = table.read()
    cells, counts = record["cells"], table.outcomes(record["cells"])
    assert record["format"] == table.FORMAT
    assert counts["FAIL"] == 0
    assert counts["skip"] <= table.SKIPS * (counts["skip"] + counts["ok"])
    assert len(table.built(cells)) >= 200
    assert not [name for name, why in table.unbuilt(cells).items() if not why.startswith("skip: ")]
    assert table.unbuilt(cells).keys() <= UNBUILT.keys()


def test_every_cell_of_the_table_has_every_check_or_a_reason() -> None:
    for cell, found in table.read()["cells"].items():
        assert ("build" in found) or found.keys() - {"dtype"} == table.CHECKS.keys(), cell
        for outcome in found.values():
            assert outcome in ("ok", "float32") or outcome.startswith(("n/a: ", "skip: ")), (cell, outcome)


def test_the_table_knows_every_type_of_the_installed_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    record = table.read()
    if transformers.__version__ != record["versions"]["transformers"]:
        pytest.skip("the table is of another transformers")
    from zoo.kinds import model_types

    assert {cell.split("/")[0] for cell in record["cells"]} == set(model_types())


def test_the_page_on_models_is_made_from_the_table() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(table.read())


@pytest.mark.parametrize("line", lines_named())
def test_a_reason_for_a_skip_names_a_line_that_is_there(line: str) -> None:
    """The file is in the installed package and has that many lines."""
    path, _, number = line.partition(":")
    package, _, rest = path.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    text = (Path(spec.submodule_search_locations[0]) / rest).read_text(encoding="utf-8")
    assert len(text.splitlines()) >= int(number)
