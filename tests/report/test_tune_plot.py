"""Promises of the pictures of a search: all its configurations, with their intervals, and no text on another."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.report import words
from loraloom.report.importance_plot import plot_importance
from loraloom.report.picture import drawable
from loraloom.report.session import pictures
from loraloom.report.tradeoff_plot import plot_tradeoff
from loraloom.report.tune_marks import interval_of
from loraloom.report.tune_plot import plot_search
from loraloom.tuning.bar import Bar
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import Verdict, verdict

STEPS = 120


def trial(number: int, score: float, state: str = "finished", metric: str = "accuracy", seed: int = 0) -> Trial:
    """A rate that is the higher the better the score, up to a size that does not follow from it."""
    rate, r = 1e-4 * 2.0**number, 2 ** (number % 5 + 1)
    options = TrainConfig(model="m", data="d", task="seq-cls", output="o", learning_rate=rate, seed=seed)
    values = {"lora.r": r, "lora.lora_alpha": "2r", "train.learning_rate": rate}
    step = {"finished": STEPS, "stopped": 40, "failed": 30}[state]
    evaluations = [{"step": s, "loss": 1.0, metric: score * (0.5 + s / step / 2)} for s in (20, step)]
    curve = Curve([2.0 - s / 100 for s in range(step)], [rate] * step, evaluations)
    one = Trial(number, values, options, STEPS, step, state, "", curve, 12_345 * r, 49_380 * r, 10.0 + r)  # type: ignore[arg-type]
    if state == "finished":
        one.parts = {metric: [score, *(score * (1 + 0.004 * (-1) ** part) for part in range(20))]}
    return one


def search(count: int = 16, metric: str = "accuracy", failed: int = 1, seeds: int = 2) -> Verdict:
    better = 1 if metric == "accuracy" else -1
    middle = 0.6 if metric == "accuracy" else 20.0
    states = ["failed"] * failed + ["stopped"] * (count - failed - min(4, count - failed)) + ["finished"] * count
    trials = [trial(i, middle * (1 + better * i / 4 / count), states[i], metric) for i in range(count)]
    for seed in range(1, seeds):
        for first in trials[-2:]:
            again = trial(first.number, first.points(metric)[-1][1] + 0.06 * seed, "finished", metric, seed)
            again.number, again.repeats = 100 * seed + first.number, first.number
            trials.append(again)
    constant = [0.3 if metric == "accuracy" else 60.0] * 21
    return verdict(trials, metric, bar=Bar(400, answers={"always 'a'": {metric: constant}}))


def texts_apart(axes: Any) -> bool:
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    return not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def told(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("count", "metric"), [(4, "accuracy"), (64, "accuracy"), (16, "perplexity")])
def test_the_search_shows_every_configuration_and_how_it_ended(
    count: int, metric: str, tmp_path: Path, figures: list[Figure]
) -> None:
    found = search(count, metric)
    plot_search(found, tmp_path / "search.png")
    with Image.open(tmp_path / "search.png") as image:
        assert (image.format, image.width) == ("PNG", 1200)
    left, right = figures[0].axes
    curves = [line for line in left.lines if len(line.get_xdata()) == 2 and line.get_linestyle() != ":"]
    ends = [line.get_marker() for line in left.lines if len(line.get_xdata()) == 1]
    assert len(curves) == count - 1
    assert len(ends) == count
    assert (ends.count("|"), ends.count("X"), ends.count("o")) == (count - 5 if count > 5 else 0, 1, 1)
    widest = max(curves, key=lambda line: line.get_linewidth())
    assert widest.get_xdata()[-1] == STEPS
    names = [name.get_text() for name in right.get_yticklabels()]
    assert [name.partition(":")[0] for name in names] == [str(n) for n in found.ranking[:12]]
    assert texts_apart(left)


def test_a_configuration_of_several_seeds_has_the_interval_of_rows_and_seeds(
    tmp_path: Path, figures: list[Figure]
) -> None:
    several, one = search(), search(seeds=1)
    best = several.best.number
    wide, narrow = interval_of(several, best), interval_of(one, best)
    assert wide is not None
    assert narrow is not None
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low) > 0
    by = "95 % interval, by the held-out rows"
    for found, said in ((several, f"{by} and the seeds"), (one, by)):
        plot_search(found, tmp_path / "search.png")
        assert said in told(figures[-1])
    drawn = [line.get_xdata() for line in figures[0].axes[1].lines if len(line.get_xdata()) == 2]
    assert [wide.low, wide.high] in [list(pair) for pair in drawn]
    assert interval_of(several, several.ranking[-1]) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_the_tradeoff_names_the_front_in_size_and_time(metric: str, tmp_path: Path, figures: list[Figure]) -> None:
    found = search(64, metric)
    plot_tradeoff(found, tmp_path / "tradeoff.png")
    left, right = figures[0].axes
    front = [found.trial(n).parameters for n in found.pareto]
    assert list(left.lines[0].get_xdata()) == front
    named = {text.get_text().partition(":")[0] for text in left.texts if ":" in text.get_text()}
    assert named == {str(n) for n in {*found.pareto, found.best.number, found.runner_up.number}}  # type: ignore[union-attr]
    assert left.get_xscale() == "log"
    for axes in (left, right):
        assert texts_apart(axes)
    assert told(figures[0])[:2] == ["recommended", "runner-up"]


def test_importance_is_drawn_where_something_mattered_and_pictures_that_no_longer_hold_are_removed(
    tmp_path: Path, figures: list[Figure]
) -> None:
    for old in ("pareto.png", "importance.png"):
        (tmp_path / old).write_bytes(b"of before")
    few = search(4)
    assert [path.name for path in pictures(few, tmp_path, "")] == ["search.png", "tradeoff.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["search.png", "tradeoff.png"]
    found = search(16)
    assert found.mattered[0] == "train.learning_rate"
    assert [path.name for path in pictures(found, tmp_path, "")][2:] == ["importance.png"]
    bars, chance = figures[-1].axes[0].patches, figures[-1].axes[0].lines[0]
    assert sorted(bar.get_width() for bar in bars) == sorted(found.importance.values())
    assert list(chance.get_xdata()) == [min(found.chance[name], 1.0) for name in found.importance]
    for name, share in found.importance.items():
        assert (name in found.mattered) == (share > found.chance[name])


@pytest.mark.filterwarnings("error")
def test_what_was_never_measured_or_all_alike_is_drawn_too(tmp_path: Path) -> None:
    alone = verdict([trial(0, 0.5)], "accuracy")
    nowhere = verdict([trial(0, 0.5, "stopped"), trial(1, math.nan, "failed")], "accuracy")
    for found in (alone, nowhere):
        plot_search(found, tmp_path / "search.png")
        plot_tradeoff(found, tmp_path / "tradeoff.png")
    plot_importance(search(16, "perplexity"), tmp_path / "importance.png")


@pytest.mark.filterwarnings("error")
def test_words_are_chinese_where_the_locale_is_and_a_font_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert words.words() is words.ENGLISH
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    has_font = drawable("留") == "留"
    assert words.words() is (words.CHINESE if has_font else words.ENGLISH)
    plot_search(search(4), tmp_path / "search.png")
    for name, english in vars(words.ENGLISH).items():
        if isinstance(english, str):
            chinese = getattr(words.CHINESE, name)
            assert english.count("{") == chinese.count("{")
            assert chinese != english, name
    assert drawable("α and \U0010fffd") == "α and ?"
