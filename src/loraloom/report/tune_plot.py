"""Two pictures of a search: the curve of every trial, and quality against parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraloom.report.format import count, params
from loraloom.report.plot import tidy, write_picture
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.tuning.ranking import originals
from loraloom.tuning.verdict import Verdict

SEARCH_NAME = "search.png"
PARETO_NAME = "pareto.png"

#: The colour of each state, as in the picture of one run: blue learns, grey is past.
COLOURS = {"finished": "#2f5aa8", "running": "#6d8fc9", "waiting": "#b9c7e4", "stopped": "#c9ccd3", "failed": "#d9a79c"}
BEST = "#d1622b"
#: Characters of a hyperparameter's value in a label.
WIDE = 12
#: Leaders that have their number beside their curve.
LABELLED = 8
#: A span of values this many times its best is drawn on a log scale: diverging perplexities would flatten the rest.
LOG_SPAN = 20.0


def plot_search(found: Verdict, path: str | Path) -> None:
    """Draw each trial's metric on the held-out rows over its steps, the best one bold.

    Stopped trials are pale, failed ones end in a cross; further seeds of a configuration are left out.
    """
    from matplotlib.figure import Figure  # the figure alone: no window system, no global state
    from matplotlib.ticker import MaxNLocator

    firsts = [group[0] for group in originals(found.trials).values()]
    metric, known, best = found.metric, found.scores, found.best.number
    figure = Figure(figsize=(10, 5), layout="constrained", dpi=120)
    axes = figure.subplots()
    seen: list[float] = []
    labelled: set[str] = set()
    # The best last, so that it lies on top.
    for trial in sorted(firsts, key=lambda t: (t.number == best, t.state == "finished", t.number)):
        points = [(step, value) for step, value in trial.points(metric) if math.isfinite(value)]
        if not points:
            continue
        steps, values = [step for step, _ in points], [value for _, value in points]
        seen += values
        style: dict[str, Any] = {"color": COLOURS[trial.state], "linewidth": 1.2, "marker": "."}
        text: str | None = trial.state if trial.state not in labelled else None
        if trial.number == best:
            style = {"color": BEST, "linewidth": 2.8, "marker": "o", "markersize": 5}
            text = f"trial {trial.number}: {params(trial.values, found.params, WIDE, between=' ')}"
        else:
            labelled.add(trial.state)
        axes.plot(steps, values, label=text, **style)
        if trial.state == "failed":
            axes.plot(steps[-1:], values[-1:], "x", color="#b0503a", markersize=7)
    axes.set(title=f"{metric} on held-out rows, {len(firsts)} configurations", xlabel="step")
    tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.03, y=0.08)
    _scale(axes, seen, metric)
    # Numbers in the middle of the picture would lie on the curves of trials that continued.
    furthest = max((score.share for score in known.values() if score.values), default=0.0)
    lead = [n for n in found.ranking if known[n].values and known[n].share == furthest][:LABELLED]
    ends = {t.number: t.points(metric)[-1] for t in firsts if t.number in lead}
    ends = {number: end for number, end in ends.items() if math.isfinite(end[1])}
    _number_ends(figure, axes, ends, best)
    handles, texts = axes.get_legend_handles_labels()
    # The best was drawn last.
    figure.legend(handles[::-1], texts[::-1], loc="outside lower center", ncols=5, frameon=False)
    write_picture(figure, path)


def plot_pareto(found: Verdict, path: str | Path) -> None:
    """Draw the metric against the adapter's parameters; bars are the noise, the line joins what nothing beats in both.

    Only configurations that are measured like the best one are drawn: finished ones, or all if none finished.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    metric, known = found.metric, found.scores
    figure = Figure(figsize=(8, 5.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    firsts = {number: group[0] for number, group in originals(found.trials).items()}
    drawn = [n for n in found.ranking if known[n].values and known[n].finished == known[found.best.number].finished]
    line = [firsts[n].parameters for n in found.pareto], [known[n].mean for n in found.pareto]
    axes.plot(*line, "--", color="#8a93a5", linewidth=1.2, zorder=1, label="nothing smaller is as good")
    special = {found.runner_up.number: ("runner-up", COLOURS["finished"], 8)} if found.runner_up else {}
    special[found.best.number] = "best" if found.learned else "highest", BEST, 10
    for number in drawn:
        score, trial, front = known[number], firsts[number], number in found.pareto
        word, colour, large = special.get(number, ("", COLOURS["running" if front else "stopped"], 6))
        axes.errorbar(
            trial.parameters, score.mean, score.noise or None, fmt="o", color=colour, markersize=large, capsize=3,
            zorder=3 if word else 2,
            label=f"{word}, trial {number}: {params(trial.values, found.params, WIDE, between=' ')}" if word else None,
        )  # fmt: skip
        if word or front:
            at = (trial.parameters, score.mean)
            axes.annotate(str(number), at, textcoords="offset points", xytext=(8, 5), fontsize=9)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15, y=0.25)
    axes.set(title=f"{metric} against size", xlabel="adapter parameters", ylabel=f"{metric} on held-out rows")
    tidy(axes)
    _scale(axes, [known[n].mean for n in drawn], metric)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)
    write_picture(figure, path)


def _scale(axes: Any, values: Sequence[float], metric: str) -> None:
    """A log scale where the worst is many times the best: a perplexity that blew up would flatten all the others."""
    if not greater_is_better(metric) and values and min(values) > 0 and max(values) > LOG_SPAN * min(values):
        axes.set_yscale("log")


def _number_ends(figure: Any, axes: Any, ends: Mapping[int, tuple[int, float]], best: int) -> None:
    """The trials' numbers right of where their curves end, moved apart where they would lie on each other."""
    figure.draw_without_rendering()  # the layout is known only now; a plain canvas draws nothing
    heights = {number: float(axes.transData.transform(end)[1]) for number, end in ends.items()}
    order = sorted(heights, key=lambda n: (heights[n], n))
    apart = 13 * figure.dpi / 72  # points in pixels
    spread = _spread([heights[n] for n in order], apart)
    up = max(0.0, axes.bbox.y0 + apart / 2 - spread[0]) if spread else 0.0  # none below the picture
    for number, at in zip(order, spread, strict=True):
        axes.annotate(
            str(number),
            ends[number],
            textcoords="offset pixels",
            xytext=(12, at + up - heights[number]),
            va="center",
            fontsize=9,
            color=BEST if number == best else "#444444",
            weight="bold" if number == best else "normal",
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], apart: float) -> list[float]:
    """Rising heights, moved so that neighbours are ``apart``: the mean of moving up as needed and moving down."""
    up, down = list(heights), list(heights)
    for i in range(1, len(up)):
        up[i] = max(up[i], up[i - 1] + apart)
    for i in reversed(range(len(down) - 1)):
        down[i] = min(down[i], down[i + 1] - apart)
    return [(one + other) / 2 for one, other in zip(up, down, strict=True)]
