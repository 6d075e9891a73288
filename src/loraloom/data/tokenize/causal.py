"""Causal language models: which tokens of a text, a prompt with its completion, or a chat carry the loss.

This file knows boundaries in texts and windows of tokens; chat templates are in ``chat``. It does not know files,
batches or models.

A text is trained in full, a pair on every token that starts in its completion. Both are tokenized as one text with the
tokenizer's special tokens, so that the tokens are those of inference. Both end with the end-of-text token, which is
added if the tokenizer has one and does not add it itself.

Over ``max_length``, with ``split``: a text becomes windows. Each starts with the tokenizer's special tokens and with
one token of the window before, which is not trained again; so every token is trained once, with a context. A pair has
its prompt only in the first window; each later window starts with up to half of ``max_length`` of the text before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from loraloom.data.example import IGNORE, EncodedRow, Encoder, Settings, fitted, tokenize, windows
from loraloom.data.records import Chat, Pair, Record, Text
from loraloom.data.tokenize.chat import ChatEncoder
from loraloom.data.tokenize.templates import find_template


class CausalEncoder(Encoder):
    """``Text``, ``Pair`` and ``Chat`` to token ids and one label per token."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        super().__init__(tokenizer, settings)
        self._chat: ChatEncoder | None = None
        if settings.chat_template is not None:
            find_template(tokenizer, settings.chat_template)  # report a broken template before any row is read

    def tokens(self, records: Sequence[Any]) -> Iterator[Any]:
        """An ``Encoding`` of each text and pair, the encoded row of each conversation."""
        chats = [record for record in records if isinstance(record, Chat)]
        if chats and self._chat is None:
            self._chat = ChatEncoder(self.tokenizer, self.settings)
            self.notes = self._chat.notes
        encoded = iter(self._chat.encode(chats) if self._chat is not None else [])
        texts = ["".join(_parts(record)[:2]) for record in records if not isinstance(record, Chat)]
        written = iter(tokenize(self.tokenizer, texts))
        return (next(encoded if isinstance(record, Chat) else written) for record in records)

    def encode_one(self, record: Any, tokens: Any) -> EncodedRow:
        if isinstance(record, Chat):
            return tokens  # type: ignore[no-any-return]
        prompt, _, column = _parts(record)
        return self._completed(tokens, len(prompt), column)

    def _completed(self, tokens: Any, boundary: int, column: str) -> EncodedRow:
        ids, targets, front = _targets(tokens, boundary)
        body = [span for span, special in zip(tokens.offsets, tokens.special_tokens_mask, strict=True) if not special]
        merged = any(start < boundary < end for start, end in body)
        if not any(start >= boundary for start, _ in body):
            return EncodedRow(
                merged=merged,
                problem=f"no token starts in {column!r}: the tokenizer knows none of its characters, or joins it "
                f"to the end of the prompt; where a prompt ends in a space, move that space to the start of the "
                f"completion",
            )
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
            targets.append(end)
        limit = self.settings.max_length
        if self.settings.overlong != "split" or len(ids) <= limit:
            return fitted(ids, targets, self.settings, merged=merged, what=repr(column))
        prompt = next(place for place, target in enumerate(targets) if target != IGNORE)
        if prompt >= limit:
            return EncodedRow(
                overlong=True,
                merged=merged,
                error=f"the prompt alone has {prompt} tokens, where max_length is {limit}, so the row cannot be "
                f"split; raise max_length, or shorten the prompt",
            )
        context = (limit - front) // 2 if boundary else 1
        return EncodedRow(windows(ids, targets, limit, front, context), overlong=True, merged=merged)


def _parts(record: Record) -> tuple[str, str, str]:
    """(prompt, completion, the name of the completion in messages); the prompt of a plain text is empty."""
    if isinstance(record, Pair):
        return record.prompt, record.completion, "completion"
    assert isinstance(record, Text)
    return "", record.text, "text"


def _targets(tokens: Any, boundary: int) -> tuple[list[int], list[int], int]:
    """Ids; ids with ``IGNORE`` on each token before ``boundary`` and on the special tokens in front; their number."""
    special = tokens.special_tokens_mask
    front = special.index(0) if 0 in special else len(special)
    # Special tokens have no position in the text: they are before the prompt or at the end of the row.
    targets = [
        IGNORE if (place < front if mark else start < boundary) else token
        for place, (token, (start, _), mark) in enumerate(zip(tokens.ids, tokens.offsets, special, strict=True))
    ]
    return list(tokens.ids), targets, front
