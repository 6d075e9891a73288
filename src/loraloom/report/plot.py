"""The picture of one run: training and validation loss, and the metric, over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.files.atomic import write_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_NAME = "curves.png"


def plot_run(record: Mapping[str, Any], path: str | Path) -> None:
    """Draw ``run.json``'s contents to a PNG.

    The thin line is each step's loss, the thick one its moving average; dots are evaluations. What is not finite is
    left out.
    """
    from matplotlib.figure import Figure  # the figure alone: no window system, no global state
    from matplotlib.ticker import MaxNLocator

    curve, metric = record["curve"], record["metric"]
    losses = [value if _finite(value) else math.nan for value in curve["loss"]]
    evaluations = [e for e in curve["evaluations"] if _finite(e["loss"]) and _finite(e[metric])]
    steps = range(1, len(losses) + 1)
    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    dot = "o" if len(losses) == 1 else None  # a line of one point is invisible
    left.plot(steps, losses, color="#b9c7e4", linewidth=0.8, label="training, each step")
    left.plot(steps, _smooth(losses), color="#2f5aa8", linewidth=2, marker=dot, label="training, smoothed")
    at = [entry["step"] for entry in evaluations]
    left.plot(at, [entry["loss"] for entry in evaluations], "o-", color="#d1622b", label="held-out rows")
    left.set(title="loss", xlabel="step")
    left.legend(frameon=False)
    right.plot(at, [entry[metric] for entry in evaluations], "o-", color="#d1622b")
    if evaluations:
        last = evaluations[-1]
        text = f"{last[metric]:.3f}"
        falls = len(evaluations) > 1 and evaluations[-2][metric] > last[metric]
        offset = (-8, -16 if falls else 8)  # on the side where the line does not come from
        right.annotate(text, (last["step"], last[metric]), textcoords="offset points", xytext=offset, ha="right")
    right.set(title=f"{metric} on held-out rows", xlabel="step")
    right.margins(y=0.2)
    for axes in (left, right):
        tidy(axes)
        axes.set_xlim(0, 1.02 * len(losses) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    lora = record["options"]["lora"]
    figure.suptitle(
        f"{Path(record['options']['model']).name}: r={lora['r']}, alpha={lora['lora_alpha']:g}, "
        f"dropout={lora['lora_dropout']:g}, learning rate {record['options']['learning_rate']:g}"
    )
    write_picture(figure, path)


def tidy(axes: Any) -> None:
    """A faint grid, and no frame above and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def write_picture(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` whole or not at all, in the format of the path's ending.

    Raises:
        SaveError: the file cannot be written; what was there is unchanged.
    """
    path = Path(path)
    _literal(figure)
    kind = path.suffix.removeprefix(".") or "png"
    write_files(path.parent, {path.name: lambda aside: figure.savefig(aside, format=kind)})


def _literal(figure: Any) -> None:
    """Draw all text as it is: matplotlib reads a folder's name or a pattern with two ``$`` as a formula."""
    words = [figure.get_suptitle() and figure._suptitle, *(text for one in figure.legends for text in one.get_texts())]
    for axes in figure.axes:
        words += [axes.title, axes.xaxis.label, axes.yaxis.label]
        words += axes.get_legend().get_texts() if axes.get_legend() else []
    for text in words:
        if text:
            text.set_parse_math(False)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


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
