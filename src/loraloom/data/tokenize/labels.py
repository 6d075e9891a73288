"""Classification and regression of texts and of pairs of texts: their tokens and labels.

This file knows what a label becomes: the number of its class, one 0 or 1 for each class, or a number itself. It does
not know files, batches or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.data.example import EncodedRow, Encoder, Example, Settings, refused, tokenize
from loraloom.data.records import Labelled
from loraloom.data.rows import unseen
from loraloom.data.shape.labels import NUMBER, SEVERAL, SINGLE

NOTE = (
    "the tokenizer puts nothing between two texts of one row: a line break is put there, which whoever uses the "
    "adapter must do as well"
)


def gap(tokenizer: Any) -> str:
    """The separator to append to the first of two texts.

    Empty if the tokenizer separates them by special tokens, as those of encoders do. Those of decoders mostly do not:
    "It rains." and "It is dry." would become "It rains.It is dry."
    """
    which = tokenizer("a", "b").encodings[0].sequence_ids
    last = max((i for i, part in enumerate(which) if part == 0), default=-1)
    return "" if None in which[last + 1 : which.index(1) if 1 in which else None] else "\n"


def class_names(label: str | int | float | list[str | int]) -> list[str]:
    """The classes that a label names, as text: ``1``, ``1.0`` and ``"1"`` are one class."""
    parts = label if isinstance(label, list) else [label]
    return [str(int(part)) if isinstance(part, float) and part.is_integer() else str(part) for part in parts]


class LabelEncoder(Encoder):
    """``Labelled`` to token ids and a label.

    One class: its place in ``settings.labels``. Several: 0.0 or 1.0 for each of ``settings.labels``. Regression: the
    number. ``settings.problem_type`` says which; without it there is one class each.
    """

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        super().__init__(tokenizer, settings)
        #: the separator of a pair; None before the first pair
        self._between: str | None = None
        self.problem = settings.problem_type or SINGLE
        self.ids = {name: number for number, name in enumerate(settings.labels)}

    def tokens(self, records: Sequence[Any]) -> list[Any]:
        """Cut to ``max_length``; of a pair, the longer text is cut first."""
        texts = [one.text if one.second is None else (self._first(one), one.second) for one in records]
        return tokenize(self.tokenizer, texts, truncation=True, max_length=self.settings.max_length)

    def encode_one(self, record: Any, tokens: Any) -> EncodedRow:
        label, error = self._label(record.label)
        if error:
            return EncodedRow(error=error)
        if all(tokens.special_tokens_mask):
            return EncodedRow(problem="the tokenizer finds no token in 'text'")
        overlong = bool(tokens.overflowing)
        if overlong and (instead := refused(lambda: self._count(record), self.settings, splits=False)):
            return instead
        # Segments, if the tokenizer has them and there is a second one.
        types = tokens.type_ids if "token_type_ids" in self.tokenizer.model_input_names else []
        return EncodedRow([Example(tokens.ids, label, types if any(types) else None)], overlong=overlong)

    def _count(self, record: Labelled) -> int:
        return len(self.tokenizer(self._first(record), record.second, truncation=False, verbose=False).input_ids)

    def _first(self, record: Labelled) -> str:
        """The text, with the separator if there is a second one."""
        if record.second is None:
            return record.text
        if self._between is None:
            self._between = gap(self.tokenizer)
            self.notes += [NOTE] if self._between else []
        return record.text + self._between

    def _label(self, label: str | int | float | list[str | int]) -> tuple[int | float | list[float], str]:
        """The label of the example, or what is wrong with it."""
        if self.problem == NUMBER:
            if isinstance(label, int | float):
                return float(label), ""
            return 0, f"the label must be a number for regression, found {label!r}"
        if isinstance(label, list) and self.problem == SINGLE:
            return 0, f"the label must be one class, found the list {label!r}; problem_type {SEVERAL} takes lists"
        names = class_names(label)
        for name in names:
            if name not in self.ids:
                return 0, unseen("label", name, self.ids)
        if self.problem == SINGLE:
            return self.ids[names[0]], ""
        wanted = {self.ids[name] for name in names}
        return [float(number in wanted) for number in range(len(self.ids))], ""
