"""Questions about texts: windows of the context with the question, and the answer's tokens in each.

This file knows how a long context is cut into windows, and maps between tokens and positions in the text: from an
answer to tokens for training, from tokens to text for evaluation. It does not know files, batches or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loraloom.data.example import EncodedRow, Encoder, Example, Settings, refused, tokenize
from loraloom.data.records import Asked
from loraloom.data.tokenize.labels import NOTE, gap


@dataclass(frozen=True, slots=True)
class Window:
    """One input: the question and a part of its context.

    From place ``first`` on, ``ids`` are the context's from its token ``start`` on, as many as there are ``offsets``,
    which are their characters in the context.
    """

    ids: list[int]
    types: list[int] | None
    first: int
    start: int
    offsets: list[tuple[int, int]]

    def span(self, answer: tuple[int, int] | None) -> list[int]:
        """[first, last] of an answer given in tokens of the context; [0, 0] if it is not completely in this window."""
        if answer is None or answer[0] < self.start or answer[1] >= self.start + len(self.offsets):
            return [0, 0]
        return [place - self.start + self.first for place in answer]


class AnswerEncoder(Encoder):
    """``Asked`` to windows of at most ``max_length`` tokens, with [first, last] token of the first of its answers.

    [0, 0], the position of the CLS token in many models, means that the answer is not in this window, or that there is
    none. Windows of one context overlap by ``stride`` tokens. ``truncate`` and ``split`` both use windows; no part of a
    context is dropped.
    """

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        super().__init__(tokenizer, settings)
        self._gap = gap(tokenizer)
        self.notes = [NOTE] if self._gap else []

    def windows(self, records: Sequence[Asked]) -> list[list[Window]]:
        """The windows of each record, in the order of its examples."""
        return [self._windows(tokens) for tokens in self.tokens(records)]

    def tokens(self, records: Sequence[Any]) -> list[Any]:
        questions = [record.question + self._gap for record in records]
        return tokenize(self.tokenizer, questions, [record.context for record in records])

    def encode_one(self, record: Any, tokens: Any) -> EncodedRow:
        inside = [i for i, which in enumerate(tokens.sequence_ids) if which == 1]
        if not inside:
            return EncodedRow(problem="the tokenizer finds no token in 'context'")
        around, limit = len(tokens.ids) - len(inside), self.settings.max_length
        if around >= limit:
            return EncodedRow(
                error=f"the question takes {around} tokens with the special ones, which leaves no room for the context "
                f"within max_length={limit}; raise max_length or shorten the question"
            )
        overlong = len(tokens.ids) > limit
        if overlong and (instead := refused(lambda: len(tokens.ids), self.settings)):
            return instead
        answer = None
        if record.answers:
            text, start = record.answers[0]
            answer = _answer([tokens.offsets[i] for i in inside], start, start + len(text))
            if answer is None:
                return EncodedRow(problem="the tokenizer finds no token in the answer")
        windows = self._windows(tokens)
        spans = [window.span(answer) for window in windows]
        if answer is not None and all(span == [0, 0] for span in spans):
            return EncodedRow(
                overlong=overlong,
                problem="no window holds the whole answer, so that it would be taught that there is none; raise stride "
                "or max_length",
            )
        return EncodedRow([Example(w.ids, span, w.types) for w, span in zip(windows, spans, strict=True)], overlong)

    def _windows(self, tokens: Any) -> list[Window]:
        which: list[int | None] = tokens.sequence_ids
        typed = "token_type_ids" in self.tokenizer.model_input_names and any(tokens.type_ids)
        inside = [i for i, sequence in enumerate(which) if sequence == 1]
        begin, end = inside[0], inside[-1] + 1
        room = self.settings.max_length - len(which) + end - begin
        # With a long question the room may be less than the stride: then windows overlap by half.
        step = room - min(self.settings.stride, room // 2)
        windows = []
        for start in range(begin, end, step):
            stop = min(start + room, end)
            places = [*range(begin), *range(start, stop), *range(end, len(which))]
            windows.append(
                Window(
                    ids=[tokens.ids[i] for i in places],
                    types=[tokens.type_ids[i] for i in places] if typed else None,
                    first=begin,
                    start=start - begin,
                    offsets=list(tokens.offsets[start:stop]),
                )
            )
            if stop == end:
                break
        return windows


def _answer(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int] | None:
    """The first and the last token that overlap the characters ``start:stop``."""
    touching = [i for i, (begin, end) in enumerate(offsets) if begin < stop and end > start and begin < end]
    return (touching[0], touching[-1]) if touching else None
