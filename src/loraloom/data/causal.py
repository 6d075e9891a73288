"""Causal language models: which tokens of a text, a prompt with its completion, or a chat carry the loss.

This file knows boundaries in texts and windows of tokens; what a chat template writes is known to ``chat``. It
does not know files, batches or models.

A text is trained on in full, a pair on every token that starts in its completion. Both are tokenized as one
text, so that the tokens are those the model would see, with the tokenizer's special tokens, and both end with
the end-of-text token, which is added where the tokenizer has one and has not put it there itself.

Over ``max_length``, with ``split``: a text becomes windows, each opening with the tokenizer's special tokens and
with one token of the window before, which is not trained on again; so every token is trained on once, and from
something that goes before it. A pair keeps its prompt in the first window only (repeated, it would be followed by
words that do not follow it); each later window opens with up to half of ``max_length`` of what goes before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraloom.data.example import IGNORE, Encoded1, Example, Settings, over_length, tokenize
from loraloom.data.records import Pair, Record, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraloom.data.rows import Row


class CausalEncoder:
    """``Text`` and ``Pair`` to token ids and one label per token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.notes: list[str] = []

    def encode(self, records: Sequence[tuple[Row, Record]]) -> list[Encoded1]:
        parts = [_parts(record) for _, record in records]
        texts = [prompt + completion for prompt, completion, _ in parts]
        return [
            self._completed(tokens, len(prompt), column)
            for (prompt, _, column), tokens in zip(parts, tokenize(self.tokenizer, texts), strict=True)
        ]

    def _completed(self, tokens: Any, boundary: int, column: str) -> Encoded1:
        ids, targets, front = _targets(tokens, boundary)
        body = [span for span, special in zip(tokens.offsets, tokens.special_tokens_mask, strict=True) if not special]
        merged = any(start < boundary < end for start, end in body)
        if not any(start >= boundary for start, _ in body):
            return Encoded1(
                merged=merged,
                problem=f"no token starts in {column!r}: the tokenizer knows none of its characters, or joins it "
                f"to the end of the prompt; where a prompt ends in a space, move that space to the start of the "
                f"completion",
            )
        end = self.tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
            targets.append(end)
        return fitted(ids, targets, front, self.settings, merged=merged, what=repr(column), whole=boundary == 0)


def fitted(
    ids: list[int],
    targets: list[int],
    front: int,
    settings: Settings,
    *,
    merged: bool,
    what: str,
    whole: bool,
) -> Encoded1:
    """The example or examples of a row that may be over length, by ``settings.overlong``.

    ``front`` is the number of special tokens that open the row, ``what`` names what is trained on in messages;
    ``whole`` says that there is no prompt.
    """
    limit = settings.max_length
    overlong = len(ids) > limit
    if overlong and settings.overlong == "error":
        return Encoded1(overlong=True, merged=merged, error=over_length(len(ids), settings))
    if overlong and settings.overlong == "drop":
        return Encoded1(overlong=True, merged=merged)
    if overlong and settings.overlong == "split":
        first = next((place for place, target in enumerate(targets) if target != IGNORE), len(ids))
        if first >= limit:
            return Encoded1(
                overlong=True,
                merged=merged,
                error=f"the prompt alone has {first} tokens, where max_length is {limit}, so the row cannot be split; "
                f"raise max_length, or shorten the prompt",
            )
        context = 1 if whole else max(1, (limit - front) // 2)
        return Encoded1(_windows(ids, targets, front, limit, context), overlong=True, merged=merged)
    # The first position is never predicted, so a target there trains nothing.
    if all(target == IGNORE for target in targets[1:limit]):
        return Encoded1(
            overlong=overlong,
            merged=merged,
            problem=f"nothing of {what} is left to train on within max_length={limit}; raise max_length, "
            f"or shorten the prompts",
        )
    return Encoded1([Example(ids[:limit], targets[:limit])], overlong=overlong, merged=merged)


def _windows(ids: list[int], targets: list[int], front: int, limit: int, context: int) -> list[Example]:
    """Windows of at most ``limit`` tokens over the row; each target is in exactly one of them."""
    windows = [Example(ids[:limit], targets[:limit])]
    done = limit
    opening = ids[:front]
    while done < len(ids):
        start = max(front, done - context)
        stop = min(len(ids), start + limit - front)
        labels = [IGNORE] * (front + done - start) + targets[done:stop]
        windows.append(Example(opening + ids[start:stop], labels))
        done = stop
    return windows


def _parts(record: Record) -> tuple[str, str, str]:
    """(prompt, completion, the name of the completion in messages); the prompt of a plain text is empty."""
    if isinstance(record, Pair):
        return record.prompt, record.completion, "completion"
    assert isinstance(record, Text)
    return "", record.text, "text"


def _targets(tokens: Any, boundary: int) -> tuple[list[int], list[int], int]:
    """Ids; ids with ``IGNORE`` on each token before ``boundary`` and on the special tokens in front; their number."""
    ids: list[int] = list(tokens.ids)
    targets: list[int] = []
    front = 0
    in_front = True
    for token, (start, _), special in zip(ids, tokens.offsets, tokens.special_tokens_mask, strict=True):
        # Special tokens have no place in the text: in front they open the prompt, behind they end the row.
        in_front = in_front and bool(special)
        front += in_front
        masked = in_front if special else start < boundary
        targets.append(IGNORE if masked else token)
    return ids, targets, front
