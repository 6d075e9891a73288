"""Classification of texts: the text with the tokenizer's special tokens, and the number of its class.

This file does not know files, batches or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraloom.data.example import Encoded1, Example, Settings, over_length, tokenize
from loraloom.data.records import Labelled, Record
from loraloom.errors import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraloom.data.rows import Row


class LabelEncoder:
    """``Labelled`` with one class each to token ids and the class's place in ``settings.labels``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.notes: list[str] = []
        self.ids = {name: number for number, name in enumerate(settings.labels)}

    def encode(self, records: Sequence[tuple[Row, Record]]) -> list[Encoded1]:
        texts = []
        for _, record in records:
            assert isinstance(record, Labelled)
            texts.append(record.text)
        limit = self.settings.max_length
        encoded = []
        for (_, record), tokens in zip(records, tokenize(self.tokenizer, texts, limit), strict=True):
            assert isinstance(record, Labelled)
            name = str(record.label)
            overlong = bool(tokens.overflowing)
            if name not in self.ids:
                encoded.append(
                    Encoded1(
                        error=f"the label {name!r} is never seen in training, which has {len(self.ids)} "
                        f"labels{nearest(name, self.ids)}"
                    )
                )
            elif not tokens.ids:
                encoded.append(Encoded1(problem="the tokenizer finds no token in 'text'"))
            elif overlong and self.settings.overlong in ("error", "split"):
                count = len(tokens.ids) + sum(len(part.ids) for part in tokens.overflowing)
                encoded.append(Encoded1(overlong=True, error=over_length(count, self.settings)))
            elif overlong and self.settings.overlong == "drop":
                encoded.append(Encoded1(overlong=True))
            else:
                encoded.append(Encoded1([Example(tokens.ids, self.ids[name])], overlong=overlong))
        return encoded
