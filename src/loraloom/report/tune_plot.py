"""The pictures of a search: the curve of every configuration and where the leaders ended; and all of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from loraloom.inference.intervals import Interval
from loraloom.report.format import figure as digits
from loraloom.report.picture import MIDDLE, finite, lay_out, new_figure, roomy, spread, tidy, window, write_picture
from loraloom.report.tune_marks import (
    Mark,
    draw_bars,
    interval_of,
    legend,
    mark_of,
    name_of,
    scale,
    tested_mark,
    to_beat,
)
from loraloom.report.words import Words, words
from loraloom.tuning.ranking import originals
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import Verdict

SEARCH_NAME = "search.png"
#: Configurations that are listed beside the curves, the leaders first.
LISTED = 12
#: Configurations up to which those that were stopped are numbered in the picture.
NUMBERED = 16
#: How far below its row, in rows, the figure on test rows is.
TESTED_BELOW = 0.32


def plot_search(found: Verdict, path: str | Path) -> None:
    """Draw each configuration's metric on the held-out rows over its steps and, beside it, where the leaders ended.

    Ends have 95 % intervals. A curve that was stopped ends in a bar, one that failed in a cross; further seeds of a
    configuration are part of its interval, and have no curve.
    """
    say, metric = words(), found.metric
    firsts = {number: group[0] for number, group in originals(found.trials).items()}
    listed = [firsts[number] for number in found.ranking[:LISTED]]
    figure = new_figure(10, 4.6 + 0.13 * len(listed))
    left, right = figure.subplots(1, 2, width_ratios=[1.45, 1])
    _curves(left, found, list(firsts.values()), say)
    title = say.configurations if len(firsts) > 1 else say.on_held_out
    left.set(title=title.format(metric=metric, count=len(firsts)), xlabel=say.step)
    _leaders(right, found, listed, say)
    legend(figure, found, list(firsts.values()), say, curves=True)
    _number_ends(figure, left, found, listed, say)
    write_picture(figure, path)


def _curves(axes: Any, found: Verdict, firsts: Sequence[Trial], say: Words) -> None:
    from matplotlib.ticker import MaxNLocator

    tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    curves = {trial.number: points for trial in firsts if (points := _points(trial, found.metric))}
    alive = [n for n in curves if found.trial(n).state != "failed"] or list(curves)
    seen = [value for n in alive for _, value in curves[n]]
    low, high = _limits(axes, [*window(seen, [value for _, value in to_beat(found)], 0.5)], found.metric)
    for n in reversed(found.ranking):  # the best last, so that it lies on top
        if n not in curves:
            continue
        mark = mark_of(found, found.trial(n), say)
        steps, values = zip(*curves[n], strict=True)
        end = min(max(values[-1], low), high)  # one that blew up ends at the picture's edge
        between = {"stopped": "", "finished": "."}.get(found.trial(n).state, ".") if mark.width < 1.5 else mark.marker
        axes.plot(steps, [*values[:-1], end], **mark.curve(marker=between, markersize=5))
        axes.plot(steps[-1:], [end], **mark.curve(linestyle=""), zorder=3, clip_on=False)
    axes.margins(x=0.04)
    axes.set_ylim(low, high)
    draw_bars(axes, found, say)


def _limits(axes: Any, values: Sequence[float], metric: str) -> tuple[float, float]:
    """Of the metric's axis, with some room around ``values``."""
    low, high = min(values), max(values)
    if scale(axes, values, metric):
        room = (high / low) ** 0.08
        return low / room, high * room
    return roomy(low, high, 0.08)


def _points(trial: Trial, metric: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value in trial.points(metric) if finite(value)]


def _leaders(axes: Any, found: Verdict, listed: Sequence[Trial], say: Words) -> None:
    """A row for each of ``listed``: its number and values, and where it ended, with its interval."""
    tested, shown, aside = _tested(found), list[float](), list[float]()
    for place, trial in enumerate(listed):
        mark, score = mark_of(found, trial, say), found.scores[trial.number]
        if trial.state == "failed" or not score.values:
            continue
        sure = interval_of(found, trial.number)
        (shown if trial.state == "finished" else aside).append(score.mean)
        shown += _bar(axes, place, mark, score.mean, sure)
        if trial.number in tested:
            hollow = tested_mark(mark.colour)
            shown += _bar(axes, place + TESTED_BELOW, hollow, tested[trial.number].value, tested[trial.number])
    low, high = window(shown or aside or [0.0, 1.0], aside)
    axes.set_xlim(*roomy(low, high, 0.08))
    axes.set_ylim(len(listed) - 0.3, -0.7)
    axes.set_yticks(range(len(listed)), [name_of(found, trial) for trial in listed], fontsize=8.5)
    _row_texts(axes, found, listed, say)
    tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(found.metric)
    more = len(found.ranking) - len(listed)
    axes.set_title(say.first_leaders.format(count=len(listed)) if more else say.leaders)


def _bar(axes: Any, height: float, mark: Mark, value: float, sure: Interval | None) -> list[float]:
    """A point and its interval. Returns what has to be seen."""
    if sure is not None:
        axes.plot([sure.low, sure.high], [height, height], color=mark.colour, linewidth=max(mark.width, 1.2))
    axes.plot([value], [height], **mark.dot())
    return [] if sure is None else [sure.low, sure.high]


def _row_texts(axes: Any, found: Verdict, listed: Sequence[Trial], say: Words) -> None:
    """Names in the colour of their marks, and what became of those that did not end."""
    for trial, name in zip(listed, axes.get_yticklabels(), strict=True):
        mark = mark_of(found, trial, say)
        name.set_color(MIDDLE if trial.state == "stopped" else mark.colour)
        name.set_fontweight("bold" if trial.number == found.best.number else "normal")
    low, high = axes.get_xlim()
    for place, trial in enumerate(listed):
        if trial.state not in ("stopped", "failed"):
            continue
        words = (say.stopped_at if trial.state == "stopped" else say.failed_at).format(share=trial.step / trial.steps)
        value = found.scores[trial.number].mean if trial.state == "stopped" else math.nan
        seen = low < value < high
        if finite(value) and not seen:
            words += f", {digits(value)}"
        right = seen and value < (low + high) / 2
        axes.annotate(
            words, (value if seen else high, place), xytext=(8 if right else -8 if seen else 0, 0),
            textcoords="offset points", ha="left" if right else "right", va="center", fontsize=8.5, color=MIDDLE,
        )  # fmt: skip


def _tested(found: Verdict) -> dict[int, Interval]:
    """Configuration → its figure on rows that chose nothing."""
    if found.test is None:
        return {}
    others = {one.trial: one.figure for one in found.test.against if one.trial is not None}
    return {found.best.number: found.test.figure, **others}


def _number_ends(figure: Any, axes: Any, found: Verdict, listed: Sequence[Trial], say: Words) -> None:
    """The numbers of ``listed`` right of where their curves end, moved apart where they would lie on each other.

    Of many configurations those that were stopped have none: numbers in the middle would lie on other curves.
    """
    if len(found.ranking) > NUMBERED:
        listed = [trial for trial in listed if trial.state == "finished"]
    lay_out(figure)
    ends = {t.number: points[-1] for t in listed if t.state != "failed" and (points := _points(t, found.metric))}
    apart = 12 * figure.dpi / 72  # points in pixels
    for _, group in groupby(sorted(ends, key=lambda n: (ends[n], n)), key=lambda n: ends[n][0]):
        numbers = list(group)
        heights = [float(axes.transData.transform(ends[n])[1]) for n in numbers]
        order = sorted(range(len(numbers)), key=lambda i: (heights[i], numbers[i]))
        places = spread([heights[i] for i in order], apart)
        up = max(0.0, axes.bbox.y0 + apart / 2 - places[0])  # none below the picture
        for i, place in zip(order, places, strict=True):
            mark = mark_of(found, found.trial(numbers[i]), say)
            axes.annotate(
                str(numbers[i]), ends[numbers[i]], xytext=(15, place + up - heights[i]), textcoords="offset pixels",
                va="center", fontsize=9, color=MIDDLE if mark.width < 1 else mark.colour, annotation_clip=False,
                weight="bold" if numbers[i] == found.best.number else "normal",
            )  # fmt: skip
