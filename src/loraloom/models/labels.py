"""Whether a trained classifier head fits the classes of the data: by their names, never only by their number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_GENERIC = re.compile(r"LABEL_\d+")
#: Maximum number of names in a message.
SHOWN = 5


def known_labels(config: Any) -> list[str]:
    """The classes of a model's head by number, as its config names them."""
    found = getattr(config, "id2label", None) or {}
    return [str(found[number]) for number in sorted(found)]


def generic(names: Sequence[str]) -> bool:
    """``LABEL_0``, ``LABEL_1``, ...: the classes have no names."""
    return all(_GENERIC.fullmatch(name) for name in names)


def as_the_model(names: Sequence[str], config: Any) -> list[str] | None:
    """``names`` of the data in the order of the model's classes; None if the model has other classes.

    Case and word separators are ignored if the names remain distinct. Integers from 0 on match the classes of a model
    without names.
    """
    known = known_labels(config)
    if len(known) != len(names):
        return None
    if generic(known) and set(names) == {str(number) for number in range(len(names))}:
        return sorted(names, key=int)
    for plain in (str, _plain):
        place = {plain(name): number for number, name in enumerate(known)}
        mine = {plain(name): name for name in names}
        if len(place) == len(known) and len(mine) == len(names) and place.keys() == mine.keys():
            return sorted(names, key=lambda name: place[plain(name)])
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.casefold())


def in_order(names: Sequence[str], config: Any) -> bool:
    """Whether class ``i`` of the data is class ``i`` of the model."""
    return as_the_model(names, config) == list(names)
