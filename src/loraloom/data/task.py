"""What reading and tokenising rows ask of a task. The tasks themselves lie above this package, in ``tasks``."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from loraloom.data.example import Encoder, Settings
from loraloom.data.records import Record
from loraloom.data.shape.forms import Form

#: What labels belong to: the row; each of its tokens; or a target with a length of its own.
Layout = Literal["row", "token", "target"]


class RowTask(Protocol):
    """The part of ``tasks.base.Task`` that this package reads; what each member means is said there."""

    @property
    def name(self) -> str: ...
    @property
    def forms(self) -> tuple[Form, ...]: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def indivisible(self) -> str: ...
    @property
    def class_word(self) -> str: ...
    @property
    def one_class(self) -> str: ...

    def encoder(self, tokenizer: Any, settings: Settings) -> Encoder: ...
    def class_names(self, record: Record) -> list[str]: ...
