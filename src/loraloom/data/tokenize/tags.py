"""Tagged words: their tokens, with the tag's number on the first token of each word.

This file knows how words become tokens and where each word begins. It does not know what tags mean, nor files,
batches or models.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from loraloom.data.example import IGNORE, EncodedRow, Encoder, Example, Settings, refused, tokenize
from loraloom.data.rows import unseen


class TagEncoder(Encoder):
    """``Tagged`` to token ids and one label per token: the tag's place in ``settings.labels``, or ``IGNORE``.

    The words are joined by spaces and tokenized as one text, which every tokenizer supports and which matches
    pretraining. A row over length may be split between words.
    """

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        super().__init__(tokenizer, settings)
        self.ids = {name: number for number, name in enumerate(settings.labels)}

    def tokens(self, records: Sequence[Any]) -> list[Any]:
        return tokenize(self.tokenizer, [" ".join(record.tokens) for record in records])

    def encode_one(self, record: Any, tokens: Any) -> EncodedRow:
        names = [str(tag) for tag in record.tags]
        if new := [name for name in names if name not in self.ids]:
            return EncodedRow(error=unseen("tag", new[0], self.ids))
        first = first_pieces(record.tokens, tokens)
        labels = [IGNORE] * len(tokens.ids)
        for word, place in first.items():
            labels[place] = self.ids[names[word]]
        merged = len(first) < len(names)
        if not first:
            return EncodedRow(problem="the tokenizer finds no token in 'tokens'")
        overlong, limit = len(tokens.ids) > self.settings.max_length, self.settings.max_length
        if not overlong:
            return EncodedRow([Example(tokens.ids, labels)], merged=merged)
        if instead := refused(lambda: len(tokens.ids), self.settings):
            return instead
        parts = _parts(tokens.special_tokens_mask, sorted(first.values()), limit)
        if self.settings.overlong == "truncate":
            parts = parts[:1]
        examples = [Example([tokens.ids[i] for i in part], [labels[i] for i in part]) for part in parts]
        return EncodedRow([one for one in examples if any(x != IGNORE for x in one.labels)], True, merged)  # type: ignore[union-attr]


def first_pieces(words: Sequence[str], tokens: Any) -> dict[int, int]:
    """Word → the first token that starts in it, of ``words`` joined by spaces.

    Words without their own token (of characters that the tokenizer drops, or within another word's token) are missing.
    """
    starts = [0, *accumulate(len(word) + 1 for word in words)][:-1]
    found: dict[int, int] = {}
    for place, ((start, stop), special) in enumerate(zip(tokens.offsets, tokens.special_tokens_mask, strict=True)):
        if special or start == stop:
            continue
        word = bisect_right(starts, start) - 1
        if start >= starts[word] + len(words[word]):  # starts with the space before its word
            if stop <= start + 1 or word + 1 == len(words):
                continue  # only the space
            word += 1
        found.setdefault(word, place)
    return found


def _parts(special: Sequence[int], firsts: Sequence[int], limit: int) -> list[list[int]]:
    """The tokens of each part: the special ones at both ends, and as many words between them as fit.

    A word that is too long for a part continues in the next one.
    """
    body = [place for place, mark in enumerate(special) if not mark]
    start, end = body[0], body[-1] + 1
    front, back = range(start), range(end, len(special))
    room = limit - len(front) - len(back)
    parts = []
    while start < end:
        stop = min(start + room, end)
        if stop < end:
            stop = max((first for first in firsts if start < first <= stop), default=stop)
        parts.append([*front, *range(start, stop), *back])
        start = stop
    return parts
