"""Two texts in one input, and their separator."""

from __future__ import annotations

from typing import Any

NOTE = (
    "the tokenizer puts nothing between two texts of one row: a line break is put there, which whoever uses the "
    "adapter must do as well"
)


def gap(tokenizer: Any) -> str:
    """The separator to append to the first of two texts.

    Empty if the tokenizer separates them by special tokens, as those of encoders do. Those of decoders mostly do not:
    "It rains." and "It is dry." would become "It rains.It is dry."
    """
    which = tokenizer("a", "b").encodings[0].sequence_ids
    last = max((i for i, part in enumerate(which) if part == 0), default=-1)
    return "" if None in which[last + 1 : which.index(1) if 1 in which else None] else "\n"
