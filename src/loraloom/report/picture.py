"""How all pictures look: colours, fonts, labels that do not overlap, and files that are written whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.files.atomic import write_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Colours that people with any colour vision tell apart (Okabe and Ito 2008). They differ in lightness too, and no
#: picture relies on them alone: markers and line styles say the same.
ORANGE, BLUE, SKY, GREEN, PURPLE = "#d55e00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7"
DARK, MIDDLE, GREY, PALE = "#333333", "#666666", "#9a9fa8", "#c4c8d0"
#: Fonts with Chinese characters, of Linux, Windows and macOS. matplotlib's own has none.
CHINESE = (
    *("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB"),
    *("Heiti SC", "STHeiti", "Arial Unicode MS"),
)
DPI = 120
#: Pixels above or below its point and its interval from which on a label has a line to it.
FAR = 30


def new_figure(width: float, height: float) -> Figure:
    """Of ``width`` by ``height`` inches, without a window system or global state."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1), dpi=DPI)


def tidy(axes: Any) -> None:
    """A faint grid, and no frame above and on the right."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plain_log(axis: Any, words: Callable[[float], str] = "{:g}".format, ticks: Sequence[float] = (1, 2, 5)) -> None:
    """Ticks of a log scale at these multiples of the powers of ten, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axis.set_minor_locator(NullLocator())


def write_picture(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` whole or not at all, in the format of the path's ending.

    Raises:
        SaveError: the file cannot be written; what was there is unchanged.
    """
    path = Path(path)
    prepare_texts(figure)
    kind = path.suffix.removeprefix(".") or "png"
    write_files(path.parent, {path.name: lambda aside: figure.savefig(aside, format=kind)})


def lay_out(figure: Figure) -> None:
    """Find where everything is, for what is placed by pixels."""
    prepare_texts(figure)
    figure.draw_without_rendering()


def prepare_texts(figure: Figure) -> None:
    """Draw all text as it is, in fonts that have its characters.

    matplotlib reads a folder's name or a pattern with two ``$`` as a formula, and draws a box for a missing character.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        prepare_text(text)


def prepare_text(text: Any) -> None:
    text.set_parse_math(False)
    if not _covers(text.get_text(), families()[:1]):
        text.set_fontfamily(families())
        text.set_text(drawable(text.get_text()))


@cache
def families() -> list[str]:
    """matplotlib's own font and, for characters that it lacks, those installed that have Chinese ones."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CHINESE if name in installed)]


def drawable(text: str) -> str:
    """``text`` with a question mark for each character that no font has."""
    return "".join(one if _covers(one, families()) else "?" for one in text)


def _covers(text: str, names: Sequence[str]) -> bool:
    return text.isascii() or all(any(ord(one) in _characters(name) for name in names) for one in text if one != "\n")


@cache
def _characters(name: str) -> frozenset[int]:
    from matplotlib import font_manager, ft2font

    return frozenset(ft2font.FT2Font(font_manager.findfont(name)).get_charmap())


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Rising heights, moved so that neighbours are ``apart``: the mean of moving up as needed and moving down."""
    up, down = list(heights), list(heights)
    for i in range(1, len(up)):
        up[i] = max(up[i], up[i - 1] + apart)
    for i in reversed(range(len(down) - 1)):
        down[i] = min(down[i], down[i + 1] - apart)
    return [(one + other) / 2 for one, other in zip(up, down, strict=True)]


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def window(main: Sequence[float], others: Sequence[float], share: float = 1.5) -> tuple[float, float]:
    """The range of ``main``, and of ``others`` as far as they are not ``share`` times that range outside it."""
    low, high = min(main), max(main)
    room = share * max(high - low, 1e-9 + 0.02 * max(abs(high), abs(low)))
    near = [value for value in others if low - room <= value <= high + room]
    return min([low, *near]), max([high, *near])


@dataclass(frozen=True)
class Label:
    """Text beside the point (x, y), whose interval reaches from ``low`` to ``high``."""

    x: float
    y: float
    low: float
    high: float
    text: str
    colour: str


def roomy(low: float, high: float, share: float) -> tuple[float, float]:
    """Limits of an axis around values, with ``share`` of their range on both sides."""
    room = share * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def place_labels(axes: Any, labels: Sequence[Label], bars: Sequence[tuple[float, float, float]]) -> None:
    """Write each label beside its point: where it covers no label and no bar, if there is such a place.

    ``bars`` are (x, low, high). The limits and scales of ``axes`` must be final.
    """
    lay_out(axes.figure)
    pixels = axes.transData.transform
    ends = [(pixels((x, low)), pixels((x, high))) for x, low, high in bars]
    taken = [Box(low[0] - 6, low[1] - 6, high[0] + 6, high[1] + 6) for low, high in ends]
    inside = Box(*axes.bbox.extents)
    for label in labels:
        point = label.x, label.y
        note = axes.annotate(
            label.text, point, xytext=(0, 0), textcoords="offset pixels", fontsize=8.5, color=label.colour, va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )  # fmt: skip
        prepare_text(note)
        extent, at = note.get_window_extent(), pixels(point)
        boxes = [(Box.beside(at, offset, extent.width, extent.height), offset) for offset in _offsets(extent.width)]
        box, offset = min(boxes, key=lambda pair: pair[0].covered(taken) + 10 * pair[0].outside(inside))
        note.xyann = offset
        taken.append(box)
        low, high = pixels((label.x, label.low))[1] - FAR, pixels((label.x, label.high))[1] + FAR
        if not low <= at[1] + offset[1] <= high:
            line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 5}
            near = min(max(0.0, offset[0]), offset[0] + extent.width), offset[1]  # the end of the text that is nearer
            axes.annotate("", point, xytext=near, textcoords="offset pixels", arrowprops=line)


def _offsets(width: float) -> list[tuple[float, float]]:
    """Places of a label's left middle, from the nearest to the farthest, in pixels from its point."""
    found = []
    for far in (11, 24, 38, 54, 72, 92, 114, 140, 170, 200):
        sides = [(12.0, far), (12.0, -far), (-12 - width, far), (-12 - width, -far)]
        found += [*sides, (-width / 2, far + 8.0), (-width / 2, -far - 8.0)]
    return found


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    low: float
    right: float
    high: float

    @classmethod
    def beside(cls, point: Sequence[float], offset: tuple[float, float], width: float, height: float) -> Box:
        left, middle = point[0] + offset[0], point[1] + offset[1]
        return cls(left, middle - height / 2, left + width, middle + height / 2)

    def covered(self, others: Sequence[Box]) -> float:
        """The area that it shares with ``others``."""
        return math.fsum(
            max(min(self.right, one.right) - max(self.left, one.left), 0.0)
            * max(min(self.high, one.high) - max(self.low, one.low), 0.0)
            for one in others
        )

    def outside(self, frame: Box) -> float:
        """The area that lies outside ``frame``."""
        return (self.right - self.left) * (self.high - self.low) - self.covered([frame])
