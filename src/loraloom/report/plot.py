"""The picture of one run: training and validation loss, and the metric, over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraloom.report.picture import BLUE, ORANGE, SKY, finite, new_figure, tidy, write_picture
from loraloom.report.words import words

PLOT_NAME = "curves.png"


def plot_run(record: Mapping[str, Any], path: str | Path) -> None:
    """Draw ``run.json``'s contents to a PNG.

    The thin line is each step's loss, the thick one its moving average; dots are evaluations. What is not finite is
    left out.
    """
    from matplotlib.ticker import MaxNLocator

    say = words()
    curve, metric = record["curve"], record["metric"]
    losses = [value if finite(value) else math.nan for value in curve["loss"]]
    evaluations = [e for e in curve["evaluations"] if finite(e["loss"]) and finite(e[metric])]
    steps = range(1, len(losses) + 1)
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2)
    dot = "o" if len(losses) == 1 else None  # a line of one point is invisible
    left.plot(steps, losses, color=SKY, alpha=0.6, linewidth=0.8, label=say.each_step)
    left.plot(steps, _smooth(losses), color=BLUE, linewidth=2, marker=dot, label=say.smoothed)
    at = [entry["step"] for entry in evaluations]
    left.plot(at, [entry["loss"] for entry in evaluations], "o--", color=ORANGE, label=say.held_out)
    left.set(title=say.loss, xlabel=say.step)
    left.legend(frameon=False)
    right.plot(at, [entry[metric] for entry in evaluations], "o--", color=ORANGE)
    if evaluations:
        last = evaluations[-1]
        text = f"{last[metric]:.3f}"
        falls = len(evaluations) > 1 and evaluations[-2][metric] > last[metric]
        offset = (-8, -16 if falls else 8)  # on the side where the line does not come from
        right.annotate(text, (last["step"], last[metric]), textcoords="offset points", xytext=offset, ha="right")
    right.set(title=say.on_held_out.format(metric=metric), xlabel=say.step)
    right.margins(y=0.2)
    for axes in (left, right):
        tidy(axes)
        axes.set_xlim(0, 1.02 * len(losses) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    lora = record["options"]["lora"]
    figure.suptitle(
        f"{Path(record['options']['model']).name}: r={lora['r']}, alpha={lora['lora_alpha']:g}, "
        f"dropout={lora['lora_dropout']:g}, {say.rate} {record['options']['learning_rate']:g}"
    )
    write_picture(figure, path)


def _smooth(values: list[float]) -> list[float]:
    """An exponential moving average without the bias towards its start, over a tenth of the steps and at most 20."""
    share = 1 - 1 / min(max(len(values) / 10, 1), 20)
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean = share * mean + (1 - share) * value
            weight = share * weight + (1 - share)
        out.append(mean / weight if weight else math.nan)
    return out
