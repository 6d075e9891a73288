"""A row of tokens that may exceed ``max_length``: unchanged, cut, or split into windows.

This file knows token ids and labels. It does not know texts or tokenizers.
"""

from __future__ import annotations

from dataclasses import replace

from loraloom.data.example import IGNORE, EncodedRow, Example, Settings, refused


def fitted(ids: list[int], targets: list[int], settings: Settings, *, merged: bool, what: str) -> EncodedRow:
    """The row as one example, cut to ``max_length`` unless a longer row is an error or dropped.

    ``what`` is the word for the trained part, in messages.
    """
    limit = settings.max_length
    overlong = len(ids) > limit
    if overlong and (instead := refused(lambda: len(ids), settings)):
        return replace(instead, merged=merged)
    # The first position is never predicted, so a target there trains nothing.
    if all(target == IGNORE for target in targets[1:limit]):
        return EncodedRow(
            overlong=overlong,
            merged=merged,
            problem=f"nothing of {what} is left to train on within max_length={limit}; raise max_length, "
            f"or shorten the prompts",
        )
    return EncodedRow([Example(ids[:limit], targets[:limit])], overlong=overlong, merged=merged)


def windows(ids: list[int], targets: list[int], limit: int, front: int, context: int) -> list[Example]:
    """Windows of at most ``limit`` tokens over the row; every target is in exactly one of them.

    Each window after the first starts with the row's first ``front`` tokens (the special ones) and with up to
    ``context`` tokens before it, none of which is trained again.
    """
    made = [Example(ids[:limit], targets[:limit])]
    done = limit
    while done < len(ids):
        start = max(front, done - context)
        stop = min(len(ids), start + limit - front)
        labels = [IGNORE] * (front + done - start) + targets[done:stop]
        made.append(Example(ids[:front] + ids[start:stop], labels))
        done = stop
    return [example for example in made if any(label != IGNORE for label in example.labels[1:])]  # type: ignore[index]
