"""Which hyperparameters mattered, beside the level that chance gives them, and which of their values did well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from loraloom.report.format import label, shown
from loraloom.report.picture import BLUE, DARK, PALE, PURPLE, new_figure, plain_log, tidy, write_picture
from loraloom.report.tune_marks import scale
from loraloom.report.words import Words, words
from loraloom.tuning.ranking import Comparison, compare
from loraloom.tuning.verdict import Verdict

IMPORTANCE_NAME = "importance.png"
#: Hyperparameters that mattered whose values are drawn.
DRAWN = 2
#: Numbers that span this many times are drawn on a log scale.
WIDE = 10.0
TITLE = 10.5


def plot_importance(found: Verdict, path: str | Path) -> None:
    """Draw each hyperparameter's importance, and the metric against the values of those that mattered most.

    Only for a verdict in which at least one mattered: with shuffled scores some hyperparameter leads as well.
    """
    say, drawn = words(), found.mattered[:DRAWN]
    figure = new_figure(10, 4.4)
    bars, *others = figure.subplots(1, 1 + len(drawn), width_ratios=[1.2, *[1] * len(drawn)])
    for axes in others[1:]:
        axes.sharey(others[0])
    _bars(bars, found, say)
    comparison = compare(found.trials, found.metric)
    for axes, name in zip(others, drawn, strict=True):
        _values(axes, found, comparison, name, say)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    write_picture(figure, path)


def _bars(axes: Any, found: Verdict, say: Words) -> None:
    names = list(found.importance)
    for mattered, colour, hatch, word in ((True, BLUE, "", say.mattered), (False, PALE, "///", say.not_mattered)):
        places = [place for place, name in enumerate(names) if (name in found.mattered) == mattered]
        lengths = [found.importance[names[place]] for place in places]
        axes.barh(places, lengths, 0.6, color=colour, hatch=hatch, edgecolor="white", label=word if places else None)
    chance = [min(found.chance[name], 1.0) for name in names]  # of few trials a shuffle may give more than all
    tick = {"color": DARK, "linestyle": "", "marker": "|", "markeredgewidth": 2.2}
    axes.plot(chance, range(len(names)), markersize=22, **tick)
    axes.plot([], [], markersize=12, label=say.chance, **tick)
    axes.set_yticks(range(len(names)), [label(name) for name in names])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max([*found.importance.values(), *chance]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_title(say.importance, fontsize=TITLE)
    axes.set_xlabel(say.share)
    tidy(axes)
    axes.grid(visible=False, axis="y")


def _values(axes: Any, found: Verdict, comparison: Comparison, name: str, say: Words) -> None:
    """The metric of every trial against its value of ``name``, where most can be compared; with medians of a list."""
    trials = [trial for trial in found.trials if trial.number in comparison.values and name in trial.values]
    alive = [trial for trial in trials if trial.number not in comparison.failed]
    across, ticks = _positions([trial.values[name] for trial in trials])
    where = {trial.number: at for trial, at in zip(trials, across, strict=True)}
    heights = comparison.values
    axes.plot([where[t.number] for t in alive], [heights[t.number] for t in alive], "o", color=BLUE, markersize=5)
    lost = [trial.number for trial in trials if trial.number in comparison.failed]
    word = say.failed if lost and name == found.mattered[0] else None  # once in the legend
    axes.plot([where[n] for n in lost], [heights[n] for n in lost], "X", color=PURPLE, label=word)
    if ticks is None:
        axes.set_xscale("log")
        plain_log(axes.xaxis, lambda value: f"{value:.0e}".replace("e-0", "e-"))
    else:
        axes.set_xticks(range(len(ticks)), ticks)
        axes.margins(x=0.3)
        for place in range(len(ticks)):
            middle = median(heights[n] for n, at in where.items() if at == place)
            axes.plot([place - 0.2, place + 0.2], [middle] * 2, color=DARK, linewidth=2)
    scale(axes, [heights[trial.number] for trial in trials], found.metric)
    axes.set_title(say.after.format(metric=found.metric, share=comparison.share), fontsize=TITLE)
    axes.set_xlabel(label(name))
    tidy(axes)


def _positions(values: Sequence[Any]) -> tuple[list[float], list[str] | None]:
    """Where values stand, and the names of places; None for numbers on a log scale."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values) and min(numbers) > 0 and max(numbers) >= WIDE * min(numbers) and len({*numbers}) > 6:
        return numbers, None
    distinct = sorted({shown(v, 12): v for v in values}.items(), key=lambda pair: _order(pair[1]))
    names = [name for name, _ in distinct]
    return [float(names.index(shown(v, 12))) for v in values], names


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return not number, float(value) if number else 0.0, str(value)
