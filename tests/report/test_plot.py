"""Promises of the picture of a run: always there, of the run's own numbers, whatever the run was like."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from loraloom import LoraConfig
from loraloom.report.plot import plot_run


def record(losses: list[float | None], evaluations: list[dict[str, Any]], metric: str = "accuracy") -> dict[str, Any]:
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1).to_dict()
    options = {"model": "models/tiny", "learning_rate": 2e-4, "lora": lora}
    return {"curve": {"loss": losses, "evaluations": evaluations}, "metric": metric, "options": options}


LOSSES: list[float | None] = [2.0 / (1 + step / 10) for step in range(40)]
EVALUATIONS = [{"step": step, "loss": 1.0 - step / 100, "accuracy": step / 50} for step in (10, 20, 40)]


def test_the_picture_is_a_png_with_both_colours_in_it(tmp_path: Path) -> None:
    plot_run(record(LOSSES, EVALUATIONS), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.size == (1200, 480)
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=10**6) or []}
    assert (0x00, 0x72, 0xB2) in colours  # training
    assert (0xD5, 0x5E, 0x00) in colours  # held-out rows


def test_the_lines_are_the_numbers_of_the_record(tmp_path: Path, figures: list[Figure]) -> None:
    plot_run(record(LOSSES, EVALUATIONS), tmp_path / "curves.png")
    left, right = figures[0].axes
    each, smooth, held_out = left.lines
    assert list(each.get_xdata()) == list(range(1, 41))
    assert list(each.get_ydata()) == LOSSES
    assert min(v for v in LOSSES if v) < smooth.get_ydata()[-1] < LOSSES[30]  # type: ignore[operator]
    assert list(held_out.get_xdata()) == list(right.lines[0].get_xdata()) == [10, 20, 40]
    assert list(held_out.get_ydata()) == [e["loss"] for e in EVALUATIONS]
    assert list(right.lines[0].get_ydata()) == [e["accuracy"] for e in EVALUATIONS]
    assert right.get_title() == "accuracy on held-out rows"
    assert [text.get_text() for text in right.texts] == ["0.800"]
    title = figures[0].get_suptitle()
    assert title == "tiny: r=4, alpha=8, dropout=0.1, learning rate 0.0002"
    assert left.get_xlim() == right.get_xlim()


def test_a_run_of_one_step_shows_a_point(tmp_path: Path, figures: list[Figure]) -> None:
    plot_run(record([2.0], [{"step": 1, "loss": 1.0, "accuracy": 0.5}]), tmp_path / "curves.png")
    left = figures[0].axes[0]
    assert left.lines[1].get_marker() == "o"
    assert all(tick == int(tick) for tick in left.get_xticks())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("odd", [math.nan, math.inf, None])
def test_what_is_not_finite_is_left_out(tmp_path: Path, figures: list[Figure], odd: float | None) -> None:
    last = {"step": 40, "loss": odd, "accuracy": odd}
    plot_run(record([*LOSSES[:30], odd], [*EVALUATIONS[:2], last]), tmp_path / "curves.png")
    left, right = figures[0].axes
    assert math.isfinite(left.lines[1].get_ydata()[-1])
    assert list(right.lines[0].get_xdata()) == [10, 20]
    assert [text.get_text() for text in right.texts] == ["0.400"]


@pytest.mark.filterwarnings("error")
def test_a_run_that_was_never_evaluated_has_its_picture(tmp_path: Path) -> None:
    plot_run(record(LOSSES[:3], []), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_folders_name_that_looks_like_a_formula_is_drawn_as_it_is(tmp_path: Path) -> None:
    found = record(LOSSES, EVALUATIONS)
    found["options"]["model"] = r"models/price $\nonsense{ in $ and_more"
    plot_run(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
