"""The members of a task that reading and tokenising rows need. The tasks are in a higher package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from loraloom.data.example import Encoder, Settings
from loraloom.data.records import Record
from loraloom.data.shape.forms import Form

#: What labels belong to: the row; each of its tokens; or a target of another length.
Layout = Literal["row", "token", "target"]


class RowTask:
    """Defaults of the members."""

    #: the task's name on the command line and in run files
    name: str
    #: shapes of rows, in the order in which they are tried
    forms: tuple[Form, ...]
    #: makes examples of records
    encoder: Callable[[Any, Settings], Encoder]
    #: what carries a label
    layout: Layout = "row"
    #: minimum number of tokens of a row, without special tokens
    min_tokens = 1
    #: why a row cannot be split; empty if it can
    indivisible = ""
    #: rows over length are read in windows with both ``truncate`` and ``split``
    windows = False
    #: the word for a class; empty if labels are no classes
    class_word = ""
    #: the error for ``rows`` rows with the single class ``only``
    one_class = ""

    def class_names(self, record: Record) -> list[str]:
        """The classes that a record names."""
        return []

    def notes(self, labels: Sequence[str]) -> list[str]:
        """Notes about these classes before training."""
        return []
