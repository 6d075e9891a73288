"""Classification and regression of texts and of pairs of texts: their tokens and labels.

This file knows what a label becomes: the number of its class, one 0 or 1 for each class, or a number itself. It does
not know files, batches or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from loraloom.data.example import CHUNK, EncodedRow, Encoder, Example, Settings, refused
from loraloom.data.records import Labelled, Record
from loraloom.data.rows import Row
from loraloom.data.shape.labels import NUMBER, SEVERAL, SINGLE
from loraloom.data.tokenize import pairs
from loraloom.errors import nearest


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

    def encode(self, records: Sequence[tuple[Row, Record]]) -> list[EncodedRow]:
        texts: list[Any] = []
        for _, record in records:
            assert isinstance(record, Labelled)
            texts.append(record.text if record.second is None else (self._first(record), record.second))
        encoded = []
        for (_, record), tokens in zip(records, self._tokens(texts), strict=True):
            assert isinstance(record, Labelled)
            label, error = self._label(record.label)
            overlong = bool(tokens.overflowing)
            if error:
                encoded.append(EncodedRow(error=error))
            elif all(tokens.special_tokens_mask):
                encoded.append(EncodedRow(problem="the tokenizer finds no token in 'text'"))
            elif overlong and (instead := refused(partial(self._count, record), self.settings, splits=False)):
                encoded.append(instead)
            else:
                types = segments(self.tokenizer, tokens)
                encoded.append(EncodedRow([Example(tokens.ids, label, types)], overlong=overlong))
        return encoded

    def _tokens(self, texts: list[Any]) -> list[Any]:
        """Cut to ``max_length``; of a pair, the longer text is cut first."""
        found: list[Any] = []
        for start in range(0, len(texts), CHUNK):
            found += self.tokenizer(
                texts[start : start + CHUNK], truncation=True, max_length=self.settings.max_length, padding=False
            ).encodings
        return found

    def _count(self, record: Labelled) -> int:
        return len(self.tokenizer(self._first(record), record.second, truncation=False, verbose=False).input_ids)

    def _first(self, record: Labelled) -> str:
        """The text, with the separator if there is a second one."""
        if record.second is None:
            return record.text
        if self._between is None:
            self._between = pairs.gap(self.tokenizer)
            self.notes += [pairs.NOTE] if self._between else []
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
                return 0, (
                    f"the label {name!r} is never seen in training, which has {len(self.ids)} labels"
                    f"{nearest(name, self.ids)}"
                )
        if self.problem == SINGLE:
            return self.ids[names[0]], ""
        wanted = {self.ids[name] for name in names}
        return [float(number in wanted) for number in range(len(self.ids))], ""


def segments(tokenizer: Any, tokens: Any) -> list[int] | None:
    """``token_type_ids`` if the tokenizer gives them and there is a second segment."""
    types: list[int] = tokens.type_ids
    return types if "token_type_ids" in tokenizer.model_input_names and any(types) else None
