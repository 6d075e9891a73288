"""Texts that belong together: the tokens of each by itself, one behind the other, and how many each has.

This file does not know files, batches or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.data.example import EncodedRow, Encoder, Example, refused
from loraloom.data.records import Record, Related
from loraloom.data.rows import Row


class RelatedEncoder(Encoder):
    """``Related`` to the ids of all its texts, each cut to ``max_length`` and with its own special tokens.

    ``labels`` are the lengths of the texts, as whole numbers; or as floats, with the score behind them.
    """

    def encode(self, records: Sequence[tuple[Row, Record]]) -> list[EncodedRow]:
        related = [record for _, record in records if isinstance(record, Related)]
        texts = [text for record in related for text in record.texts]
        limit = self.settings.max_length
        found = iter(self.tokenizer(texts, truncation=True, max_length=limit, padding=False).encodings if texts else ())
        return [self._encode(record, [next(found) for _ in record.texts]) for record in related]

    def _encode(self, record: Related, tokens: list[Any]) -> EncodedRow:
        if empty := [number for number, one in enumerate(tokens, 1) if all(one.special_tokens_mask)]:
            return EncodedRow(problem=f"the tokenizer finds no token in text {empty[0]}")
        overlong = any(one.overflowing for one in tokens)
        longest = max(sum(part.special_tokens_mask.count(0) for part in (one, *one.overflowing)) for one in tokens)
        if overlong and (instead := refused(lambda: longest, self.settings, splits=False)):
            return instead
        lengths = [len(one.ids) for one in tokens]
        labels = lengths if record.score is None else [*map(float, lengths), record.score]
        return EncodedRow([Example([i for one in tokens for i in one.ids], labels)], overlong=overlong)
