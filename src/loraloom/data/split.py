"""Selection of rows: those held out for evaluation, and those of an epoch if sources have weights.

Uses only row numbers, so no row has to be in memory. The selection depends only on the arguments, on every machine: a
resumed run must hold out the same rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from loraloom.errors import ConfigError, DataError

Array = npt.NDArray[Any]

#: Maximum weight; a larger one is a mistake.
MOST = 1000.0


def held_out(
    rows: int,
    amount: float,
    seed: int | str,
    labels: Sequence[str | Sequence[str]] | None = None,
    units: Sequence[int] | None = None,
) -> list[int]:
    """The numbers (from 0, in order) of the rows to hold out at random of ``rows``.

    Args:
        amount: a share (a float between 0 and 1, at least one row) or a number of rows (an int).
        labels: of each row one or several; training keeps at least one row of every label, so that no label is held
            out altogether.
        units: rows of the same unit are held out together or not at all; by default each row is its own. Where units
            do not add up to ``amount``, fewer rows are held out, at least half of them.

    Raises:
        ConfigError: an amount out of range.
        DataError: there are too few rows.
    """
    if isinstance(amount, bool) or not (
        0 < amount < 1 if isinstance(amount, float) else isinstance(amount, int) and amount >= 1
    ):
        raise ConfigError(f"rows to hold out: a share between 0 and 1 or a whole number of rows, not {amount!r}")
    if labels is not None and len(labels) != rows:
        raise ValueError(f"{len(labels)} labels for {rows} rows")
    count = max(1, round(amount * rows)) if isinstance(amount, float) else amount
    order = list(range(rows))
    random.Random(seed).shuffle(order)
    members: dict[int, list[int]] = {}
    for index in order:
        members.setdefault(index if units is None else units[index], []).append(index)
    kept: set[str] = set()
    free = []
    for place, unit in enumerate(members.values()):
        names = {name for index in unit for name in _names(labels, index)}
        # The first unit stays for training also where it has no label at all: something must be left.
        if place and names <= kept:
            free.append(unit)
        kept |= names
    chosen: list[int] = []
    for unit in free:
        if len(chosen) + len(unit) <= count:
            chosen += unit
    if 2 * len(chosen) < count or count > sum(map(len, free)):
        reason = f" with one row of each of {len(kept)} labels kept for training" if labels is not None else ""
        reason += "" if len(members) == rows else f" and {len(members)} groups of rows kept together"
        raise DataError(f"{count} of {rows} rows cannot be held out{reason}; give more rows or hold out fewer")
    return sorted(chosen)


def _names(labels: Sequence[str | Sequence[str]] | None, index: int) -> Sequence[str]:
    found = () if labels is None else labels[index]
    return [found] if isinstance(found, str) else found


def units_of(digests: Array, groups: Array) -> Array:
    """[rows] → the number of each row's unit: rows with the same digest or the same group, 0 for none, are of one unit.

    So are those that are connected through others: a row of two groups' makes them one.
    """
    units = np.unique(digests, return_inverse=True)[1]
    if not groups.any():
        return units
    above = list(range(int(units.max(initial=-1)) + 1))  # a forest: each unit's parent

    def root(unit: int) -> int:
        while above[unit] != unit:
            above[unit] = unit = above[above[unit]]
        return unit

    first: dict[int, int] = {}
    for unit, group in zip(units.tolist(), groups.tolist(), strict=True):
        if group:
            above[root(unit)] = root(first.setdefault(group, unit))
    return np.array([root(unit) for unit in range(len(above))])[units]


def check_weight(weight: object, name: str) -> float:
    """The weight of the source ``name`` as a float; ``ConfigError`` unless it is above 0 and at most ``MOST``."""
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight <= MOST:  # type: ignore[operator]
        raise ConfigError(
            f"weight of {name}: a number above 0 and at most {MOST:g}, not {weight!r} "
            f"(2 means that each of its rows comes twice an epoch, 0.5 that every second one does)"
        )
    return float(weight)  # type: ignore[arg-type]


def weighted(counts: Sequence[int], weights: Sequence[float], seed: int | str) -> list[int]:
    """The row numbers of one epoch, in order, where source k has ``counts[k]`` rows and weight ``weights[k]``.

    Rows are numbered from 0 through all sources. A row of a source with weight w occurs floor(w) times, and once
    more for a fraction of the rows chosen by ``seed`` (rounded to whole rows; a source with rows contributes at least
    one). With all weights 1 these are all rows.
    """
    chosen: list[int] = []
    start = 0
    for number, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        times = math.floor(check_weight(weight, f"source {number + 1}"))
        more = round((weight - times) * count)
        if not times and not more:
            more = min(1, count)
        # A text seed mixes both numbers whole, and a source's choice does not hang on the sizes of others.
        extra = set(random.Random(f"{seed}/{number}").sample(range(count), more))
        for index in range(count):
            chosen.extend([start + index] * (times + (index in extra)))
        start += count
    return chosen
