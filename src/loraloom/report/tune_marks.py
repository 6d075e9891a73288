"""How a configuration is drawn in the pictures of a search: its mark, its interval, and the answer to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraloom.inference.intervals import Interval
from loraloom.report.format import brief
from loraloom.report.picture import BLUE, DARK, GREEN, GREY, MIDDLE, ORANGE, PURPLE, finite, plain_log
from loraloom.report.words import Words
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.tuning.judge import Judge, seed_noise
from loraloom.tuning.ranking import originals
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import Verdict

#: A span of values this many times its best is drawn on a log scale: first or diverging perplexities would flatten
#: the rest.
LOG_SPAN = 3.0
#: Characters of a legend that is too wide for four columns.
WIDE_LEGEND = 150


@dataclass(frozen=True)
class Mark:
    """Colour, marker, line style and width say the same thing, so that any one of them suffices."""

    word: str
    colour: str
    marker: str
    line: str = "-"
    width: float = 1.2
    size: float = 6.0
    filled: bool = True
    #: the marker of a point that ends no curve
    point: str = ""

    def curve(self, **more: Any) -> dict[str, Any]:
        """Keywords of a line with markers."""
        inner = self.colour if self.filled else "white"
        return {
            "color": self.colour, "linestyle": self.line, "linewidth": self.width, "marker": self.marker,
            "markersize": self.size, "markerfacecolor": inner, "markeredgecolor": self.colour,
            "markeredgewidth": 2.0 if self.marker == "|" else 1.0,
        } | more  # fmt: skip

    def dot(self) -> dict[str, Any]:
        """Keywords of a point alone."""
        return self.curve(linestyle="", marker=self.point or self.marker, markersize=6 if self.point else self.size)


def mark_of(found: Verdict, trial: Trial, say: Words) -> Mark:
    """By the role of ``trial`` in the verdict, or else its state."""
    if trial.number == found.best.number:
        return Mark(say.best if found.recommended else say.highest, ORANGE, "o", "-", 2.8, 8)
    if found.runner_up is not None and trial.number == found.runner_up.number:
        return Mark(say.runner_up, BLUE, "s", "--", 2.0, 7)
    if trial.state == "finished":
        return Mark(say.finished, DARK, "^", "-", 1.1, 6)
    if trial.state == "failed":
        return Mark(say.failed, PURPLE, "X", ":", 1.1, 7)
    return Mark(say.stopped, GREY, "|", "-", 0.9, 11, point="v")


def interval_of(found: Verdict, number: int) -> Interval | None:
    """Of a configuration that was trained to its end: by the held-out rows, and by its seeds if they are several."""
    parts = [t.parts.get(found.metric) for t in originals(found.trials)[number] if t.state == "finished"]
    seeds = [one for one in parts if one]
    if not seeds or not found.rows:
        return None
    noise = found.noise or seed_noise([score for score in found.scores.values() if score.finished])
    made = Judge(found.metric, found.rows, noise).figure(seeds)
    return made if finite(made.high - made.low) else None


def name_of(found: Verdict, trial: Trial, **shape: int) -> str:
    """``"7: r=8 q-v 1.5e-3"``, by ``brief`` with ``shape``."""
    return shorten(f"{trial.number}: {brief(trial.values, found.params, **shape)}")


def to_beat(found: Verdict) -> list[tuple[str, float]]:
    """What the best has to beat, in words, and its figure: the hardest first."""
    baselines = [(one.words, one.figure.value) for one in found.against if one.trial is None]
    return baselines or ([] if found.gain is None else [(found.gain.bar_words, found.gain.bar)])


def draw_bars(axes: Any, found: Verdict, say: Words) -> None:
    """A dotted line at each answer to beat that the picture has room for."""
    low, high = axes.get_ylim()
    for words, value in to_beat(found):
        if not low <= value <= high:
            continue
        text = say.to_beat.format(bar=shorten(say.answer(words)))
        axes.axhline(value, color=MIDDLE, linestyle=":", linewidth=1.4, zorder=1)
        axes.annotate(
            text, (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 4), textcoords="offset points",
            ha="right", fontsize=8.5, color=MIDDLE, zorder=1.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )  # fmt: skip


def shorten(text: str, most: int = 42) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def scale(axes: Any, values: Sequence[float], metric: str) -> bool:
    """A log scale where the worst is many times the best; True if so."""
    wide = not greater_is_better(metric) and bool(values) and min(values) > 0 and max(values) > LOG_SPAN * min(values)
    if wide:
        axes.set_yscale("log")
        plain_log(axes.yaxis)
    return wide


def legend(
    figure: Any, found: Verdict, firsts: Sequence[Trial], say: Words, *, curves: bool = False, front: bool = False
) -> None:
    """One entry for each mark below the picture, the most important first."""
    from matplotlib.lines import Line2D

    order = {number: place for place, number in enumerate(found.ranking)}
    marks = [mark_of(found, one, say) for one in sorted(firsts, key=lambda one: order[one.number])]
    handles = [
        Line2D([], [], label=mark.word, **(mark.curve() if curves else mark.dot())) for mark in dict.fromkeys(marks)
    ]
    several = any(len(found.scores[one.number].values) > 1 for one in firsts)
    if any(one.parts for one in firsts):
        handles.append(Line2D([], [], label=say.bars_seeds if several else say.bars, color=DARK, linewidth=1.4))
    if curves and found.test is not None:
        handles.append(Line2D([], [], label=say.tested.format(rows=found.test.rows), **tested_mark(DARK).dot()))
    if front:
        handles.append(Line2D([], [], label=say.front, color=GREEN, linestyle="--", linewidth=1.4))
    columns = 4 if sum(len(str(handle.get_label())) for handle in handles) < WIDE_LEGEND else 3
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def tested_mark(colour: str) -> Mark:
    """Of a figure on rows that chose nothing."""
    return Mark("", colour, "D", width=1.0, size=5, filled=False)
