"""Quality against the adapter's size, and against the time that its training took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from loraloom.report.format import count
from loraloom.report.picture import (
    DARK,
    GREEN,
    MIDDLE,
    Label,
    new_figure,
    place_labels,
    plain_log,
    roomy,
    tidy,
    window,
    write_picture,
)
from loraloom.report.tune_marks import draw_bars, interval_of, legend, mark_of, name_of
from loraloom.report.words import Words, words
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.tuning.ranking import goodness, originals
from loraloom.tuning.selection import pareto
from loraloom.tuning.verdict import Verdict

TRADEOFF_NAME = "tradeoff.png"
#: Configurations of a front that are named.
NAMED = 6


def plot_tradeoff(found: Verdict, path: str | Path) -> None:
    """Draw the metric against parameters and against seconds of training, with 95 % intervals.

    A line joins the front: configurations that none beats in both. Those that were stopped are grey and on no front,
    because they were measured earlier.
    """
    say, groups = words(), originals(found.trials)
    drawn = [n for n in found.ranking if found.scores[n].values and groups[n][0].state != "failed"]
    sizes = {n: float(groups[n][0].parameters) for n in drawn}
    times = {n: fmean(trial.seconds for trial in groups[n]) for n in drawn}
    figure = new_figure(10, 5.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, across, word in ((left, sizes, say.parameters), (right, times, say.seconds)):
        _scatter(axes, found, across, say)
        tidy(axes)
        axes.set_xlabel(word)
    left.set_ylabel(say.on_held_out.format(metric=found.metric))
    _limit(left, found, drawn, say)
    figure.suptitle(say.tradeoff.format(metric=found.metric))
    front = any(len(_front(found, across)) > 1 for across in (sizes, times))
    legend(figure, found, [groups[n][0] for n in drawn], say, front=front)
    left.set_xscale("log")
    for axes, across in ((left, sizes), (right, times)):
        _name(axes, found, across, say)
    write_picture(figure, path)


def _level(found: Verdict, drawn: Iterable[int]) -> list[int]:
    """Those that came as far as the best one, so that they can be compared with it."""
    return [n for n in drawn if found.scores[n].finished == found.scores[found.best.number].finished]


def _front(found: Verdict, across: Mapping[int, float]) -> list[int]:
    return pareto({n: (across[n], goodness(found.metric, found.scores[n].mean)) for n in _level(found, across)})


def _scatter(axes: Any, found: Verdict, across: Mapping[int, float], say: Words) -> None:
    front = _front(found, across)
    line = [across[n] for n in front], [found.scores[n].mean for n in front]
    axes.plot(*line, drawstyle="steps-post", color=GREEN, linestyle="--", linewidth=1.4, zorder=1)
    for n in reversed(found.ranking):  # the best last, so that it lies on top
        if n not in across:
            continue
        mark, sure, value = mark_of(found, found.trial(n), say), interval_of(found, n), found.scores[n].mean
        if sure is not None:
            axes.plot([across[n]] * 2, [sure.low, sure.high], color=mark.colour, linewidth=1.2)
        axes.plot([across[n]], [value], **mark.dot())


def _limit(axes: Any, found: Verdict, drawn: Sequence[int], say: Words) -> None:
    """Show those that ended, with their intervals, and the others as far as they lie near them."""
    level = _level(found, drawn)
    spans = {n: interval_of(found, n) for n in level}
    main = [at for n, one in spans.items() for at in ((one.low, one.high) if one else (found.scores[n].mean,))]
    rest = [found.scores[n].mean for n in drawn if n not in level]
    low, high = window(main, rest, 0.5)
    low, high = roomy(low, high, 0.1)
    axes.set_ylim(low, high)
    outside = sum(not low <= value <= high for value in rest)
    if outside:
        words = say.lower if greater_is_better(found.metric) else say.higher
        at = (0.02, 0.02) if greater_is_better(found.metric) else (0.02, 0.96)
        axes.annotate(words.format(count=outside), at, xycoords="axes fraction", fontsize=8.5, color=MIDDLE)
    draw_bars(axes, found, say)


def _name(axes: Any, found: Verdict, across: Mapping[int, float], say: Words) -> None:
    """The names of the best, the runner-up and the front beside their points, which get room for them."""
    firm = [found.best.number, *([found.runner_up.number] if found.runner_up else [])]
    named = [*firm, *(n for n in _front(found, across) if n not in firm)][: NAMED + len(firm)]
    low, high = axes.get_ylim()
    _make_room(axes, [across[n] for n in across if low <= found.scores[n].mean <= high])
    bars, labels = [], []
    for n in across:
        sure, value = interval_of(found, n), found.scores[n].mean
        below, above = (sure.low, sure.high) if sure is not None else (value, value)
        if above >= low and below <= high:
            bars.append((across[n], below, above))
        if n in named:
            trial = found.trial(n)
            text, colour = name_of(found, trial, most=3), mark_of(found, trial, say).colour
            labels.append(Label(across[n], value, below, above, text, colour))
    place_labels(axes, sorted(labels, key=lambda label: label.colour == DARK), bars)


def _make_room(axes: Any, values: Sequence[float]) -> None:
    least, most = min(values), max(values)
    if axes.get_xscale() == "log":
        room = max((most / least) ** 0.25, 1.3)
        axes.set_xlim(least / room, most * room)
        near = most * room**2 < 10 * least
        plain_log(axes.xaxis, count, (1, 1.5, 2, 3, 4, 5, 6, 8) if near else (1, 2, 3, 5))
    else:
        room = max(0.2 * (most - least), 0.1 * most, 1e-3)
        axes.set_xlim(least - room, most + room)
