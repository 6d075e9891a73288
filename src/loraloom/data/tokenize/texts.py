"""Texts that belong together: the tokens of each by itself, one behind the other, and how many each has.

This file does not know files, batches or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraloom.data.example import EncodedRow, Encoder, Example, refused, tokenize


class RelatedEncoder(Encoder):
    """``Related`` to the ids of all its texts, each cut to ``max_length`` and with its own special tokens.

    ``labels`` are the lengths of the texts, as whole numbers; or as floats, with the score behind them.
    """

    def tokens(self, records: Sequence[Any]) -> list[list[Any]]:
        texts = [text for record in records for text in record.texts]
        found = iter(tokenize(self.tokenizer, texts, truncation=True, max_length=self.settings.max_length))
        return [[next(found) for _ in record.texts] for record in records]

    def encode_one(self, record: Any, tokens: Any) -> EncodedRow:
        if empty := [number for number, one in enumerate(tokens, 1) if all(one.special_tokens_mask)]:
            return EncodedRow(problem=f"the tokenizer finds no token in text {empty[0]}")
        overlong = any(one.overflowing for one in tokens)
        longest = max(sum(part.special_tokens_mask.count(0) for part in (one, *one.overflowing)) for one in tokens)
        if overlong and (instead := refused(lambda: longest, self.settings, splits=False)):
            return instead
        lengths = [len(one.ids) for one in tokens]
        labels = lengths if record.score is None else [*map(float, lengths), record.score]
        return EncodedRow([Example([i for one in tokens for i in one.ids], labels)], overlong=overlong)
