"""Messages as data: a kind and its figures. ``report.sentences`` has the sentence of each kind."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraloom.files import log


@dataclass(frozen=True, init=False)
class Message:
    """``figures`` are plain JSON values: the numbers and names of the sentence."""

    kind: str
    figures: dict[str, Any]

    def __init__(self, kind: str, **figures: Any) -> None:
        vars(self).update(kind=kind, figures=figures)

    def __str__(self) -> str:
        figures = ", ".join(f"{name}={value!r}" for name, value in self.figures.items())
        return f"{self.kind}: {figures}" if figures else self.kind


class Warn(Message):
    """A message about a likely mistake."""


OnEvent = Callable[[Message], None]
#: Writes the sentence of a message.
Describe = Callable[[Message], str]


def ignore(event: object) -> None:
    """A callback that does nothing."""


def logged(on_event: OnEvent, describe: Describe = str) -> OnEvent:
    """``on_event``, and each message to Python's logger too."""

    def both(message: Message) -> None:
        log.LOGGER.log(logging.WARNING if isinstance(message, Warn) else logging.INFO, "%s", describe(message))
        on_event(message)

    return both
