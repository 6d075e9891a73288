"""Rows for encoder-decoder models: the encoder's input, and the decoder's target.

This file does not know files, batches or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from loraloom.data.example import EncodedRow, Encoder, Example, refused, tokenize


class TranslationEncoder(Encoder):
    """``Translated`` to the source's ids, and the target's as labels, which end in the end-of-text token.

    Both are cut to ``max_length``: the source keeps its special tokens, and a target that is cut has no end token.
    """

    def tokens(self, records: Sequence[Any]) -> Iterable[Any]:
        sources = [record.source for record in records]
        read = tokenize(self.tokenizer, sources, truncation=True, max_length=self.settings.max_length)
        # Target mode: some tokenizers mark the target's language, or use another vocabulary for it.
        return zip(read, tokenize(self.tokenizer, text_target=[record.target for record in records]), strict=True)

    def encode_one(self, record: Any, tokens: Any) -> EncodedRow:
        source, target = tokens
        ids: list[int] = list(source.ids)
        labels: list[int] = list(target.ids)
        if all(source.special_tokens_mask):
            return EncodedRow(problem="the tokenizer finds no token in 'source'")
        if all(target.special_tokens_mask):
            return EncodedRow(problem="the tokenizer finds no token in 'target'")
        end, limit = self.tokenizer.eos_token_id, self.settings.max_length
        if end is not None and end not in labels[-2:]:  # mBART's language follows the end
            labels.append(end)
        rest = source.overflowing
        overlong = bool(rest) or len(labels) > limit
        longest = max(len(ids) + sum(part.special_tokens_mask.count(0) for part in rest), len(labels))
        if overlong and (instead := refused(lambda: longest, self.settings, splits=False)):
            return instead
        return EncodedRow([Example(ids, labels[:limit])], overlong=overlong)
