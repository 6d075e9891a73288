"""One hyperparameter of a search: a few choices or a range. Values are plain; their meaning is ``space``'s business."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from loraloom.errors import ConfigError, nearest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

#: A value is at the edge of a range if it is nearer to an end than this share of the range.
EDGE = 0.05
#: The share of the first configurations that take the best known value.
FAVOURED = 0.4


def label(value: Any) -> Any:
    """``value`` in tables and in the study: itself, or names with commas between, or JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        return ",".join(value)
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class Categorical:
    """A few values. ``values`` maps labels to them; ``order`` are the ordered labels, low to high."""

    values: dict[Any, Any]
    order: tuple[Any, ...] = ()

    @property
    def size(self) -> int | None:
        return len(self.values)

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(list(self.values))

    def holds(self, label: Any) -> bool:
        return label in self.values

    def grid(self, key: str) -> list[Any]:
        return list(self.values)

    def edge(self, value: Any) -> str | None:
        if value not in self.order or len(self.order) < 2:
            return None
        return {self.order[0]: "low", self.order[-1]: "high"}.get(value)

    def point(self, share: float, liked: list[Any]) -> Any:
        """A label: the first of ``liked`` for a small ``share`` of 1, the others evenly."""
        labels = liked or list(self.values)
        if share < FAVOURED or len(labels) == 1:
            return labels[0]
        return labels[1 + int((share - FAVOURED) / (1 - FAVOURED) * (len(labels) - 1))]

    def raw(self) -> Any:
        return list(self.values.values())


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both among them; whole ones where both are whole."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    #: its values are numbers, whose order is known
    order: ClassVar[tuple[Any, ...]] = ()

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def size(self) -> int | None:
        step = self.step or (1 if self.whole else 0)
        return round((self.high - self.low) / step) + 1 if step else None

    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution, IntDistribution

        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def holds(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high and abs(self._number(value) - value) < 1e-9

    def grid(self, key: str) -> list[Any]:
        if self.size is None:
            raise ConfigError(
                f"space.{key}: a grid needs choices or a step, and {self} has neither; "
                "give a list, or search with tpe or random"
            )
        return [self._number(self.low + i * (self.step or 1)) for i in range(self.size)]

    def edge(self, value: Any) -> str | None:
        place = self._place(value)
        return "low" if place <= EDGE else "high" if place >= 1 - EDGE else None

    def point(self, share: float, liked: list[Any], factor: float = 1.0) -> Any:
        """A number: the one ``liked`` for a ``share`` of 0, and from there evenly over all but the ends.

        ``factor`` times that, as far as the range goes.
        """
        centre = self._place(liked[0]) if liked else 0.5
        centre = centre if 0 <= centre <= 1 else 0.5
        place = centre if share == 0 else EDGE + (1 - 2 * EDGE) * ((centre + share) % 1)
        if factor != 1.0:
            place = min(max(self._place(self._at(place) * factor), EDGE), 1 - EDGE)
        return self._number(float(f"{self._at(place):.3g}"))

    def raw(self) -> Any:
        out: dict[str, Any] = {"log" if self.log else "range": [self.low, self.high]}
        return out | ({"step": self.step} if self.step else {})

    def _number(self, value: float) -> float:
        if self.step:
            value = self.low + round((value - self.low) / self.step) * self.step
        value = round(value) if self.whole else float(f"{value:.12g}")  # 0.30000000000000004 is 0.3
        return min(max(value, self.low), self.high)

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value

    def _at(self, place: float) -> float:
        """The inverse of ``_place``."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        found = low + place * (high - low)
        return math.exp(found) if self.log else found

    def _place(self, value: float) -> float:
        """Where ``value`` lies between the ends, from 0 to 1."""
        if self.log and value <= 0:
            return -1.0
        low, high = self._scaled(self.low), self._scaled(self.high)
        return (self._scaled(value) - low) / (high - low)

    def __str__(self) -> str:
        words = ", evenly in its logarithm" if self.log else f" in steps of {self.step:g}" if self.step else ""
        return f"{'whole numbers ' if self.whole else ''}from {self.low:g} to {self.high:g}{words}"


def read_range(name: str, raw: Mapping[str, Any]) -> Range:
    """``{log: [low, high]}`` or ``{range: [low, high]}`` with an optional ``step``.

    Raises:
        ConfigError: begins with ``name``.
    """
    kinds = [kind for kind in ("log", "range") if kind in raw]
    for key in raw:
        if key not in ("log", "range", "step"):
            raise ConfigError(f"{name}: {key!r} is no key of a range{nearest(str(key), ('log', 'range', 'step'))}")
    if len(kinds) != 1:
        raise ConfigError(f"{name}: must be {{log: [low, high]}} or {{range: [low, high]}}, found {dict(raw)!r}")
    ends, step = raw[kinds[0]], raw.get("step")
    if not isinstance(ends, list | tuple) or len(ends) != 2 or not all(_is_number(end) for end in ends):
        raise ConfigError(f"{name}: {kinds[0]} needs two numbers, [low, high], found {ends!r}")
    low, high = ends
    if low >= high:
        raise ConfigError(f"{name}: {kinds[0]} needs its low end below its high end, found {list(ends)!r}")
    if kinds == ["log"]:
        if low <= 0:
            raise ConfigError(f"{name}: a log range must begin above 0, found {low}; use range, or a low end above 0")
        if step is not None:
            raise ConfigError(f"{name}: a log range has no step, found {step!r}; give a list of choices")
    if isinstance(low, float) or isinstance(high, float):
        low, high = float(low), float(high)
    if step is not None:
        if not _is_number(step) or step <= 0:
            raise ConfigError(f"{name}: step must be a number above 0, found {step!r}")
        if isinstance(low, int) and not isinstance(step, int):
            low, high = float(low), float(high)
        count = (high - low) / step
        if abs(count - round(count)) > 1e-9 * max(1, count) or count < 1:
            last = low + math.floor(count + 1e-9) * step
            raise ConfigError(f"{name}: steps of {step:g} from {low:g} do not reach {high:g}; the last is {last:g}")
    return Range(low, high, log=kinds == ["log"], step=step)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
