"""Warnings about the rows of a run, from counts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

from loraloom.data.table.store import LEFT_OUT, MERGED, OVERLONG, UNTRAINED, Examples
from loraloom.data.table.tokenize import Encoded

#: Part → the name of its rows in messages.
WHAT = {"train": "training", "validation": "held-out", "test": "test"}

Array = npt.NDArray[Any]


def rows(count: int, what: str = "") -> str:
    return f"{count:,} {what} row{'' if count == 1 else 's'}".replace("  ", " ")


def done(part: str, flags: Array, max_length: int, overlong: str, windows: bool) -> list[str]:
    """Warnings about the rows of a part, by their ``flags``. ``windows``: the task reads long rows in windows."""
    ways = {"truncate": "cut", "drop": "left out", "split": "split into several"}
    if windows:
        ways |= dict.fromkeys(("truncate", "split"), "read in windows")
    over = {
        OVERLONG: f"over max_length={max_length} tokens and {ways.get(overlong, '')}",
        MERGED: "with a token across the end of the prompt, which is not trained on; end prompts with a space or a "
        "line break, or begin completions with one",
        LEFT_OUT: "not written whole by the chat template (it leaves out, for example, the reasoning of earlier turns)",
        UNTRAINED: "left out, because nothing in them is trained on",
    }
    counts = {flag: int(np.count_nonzero(flags & flag)) for flag in over}
    return [
        f"{rows(count, WHAT[part])} {'is' if count == 1 else 'are'} {over[flag]}"
        for flag, count in counts.items()
        if count
    ]


def reasons(encoded: Encoded, flags: Array) -> str:
    """The reasons why no row is left."""
    found = [f"{reason} (rows like this: {count}; the first is {first})"
             for reason, (count, first) in encoded.problems.items()]  # fmt: skip
    if over := int(np.count_nonzero(flags & OVERLONG)):
        found.append(f"{rows(over)} over max_length")
    if bad := next(encoded.bad_lines(), None):
        first = json.loads(bad)
        place = f"line {first['line']}" if "line" in first else f"row {first['number']}"
        found.append(f"{first['file']}, {place}: {first['reason']}")
    return "; ".join(found) or "none can be encoded"


def repeated(part: str, train: Examples, others: Examples) -> list[str]:
    """Warnings about rows with equal tokens: within training, and in both training and ``part``."""
    found = []
    table = train.table
    chosen = np.isin(table.example_rows, np.unique(train.rows))
    distinct, counts = np.unique(table.digests[chosen], return_counts=True)
    twice = int(counts.sum()) - len(distinct)
    if twice and part == "validation":
        found.append(f"{rows(twice, 'training')} {'is' if twice == 1 else 'are'} the same as another one")
    if shared := int(np.isin(others.digests, distinct).sum()):
        share = shared / len(others)
        found.append(
            f"{rows(shared, WHAT[part])} ({share:.1%}) {'is' if shared == 1 else 'are'} among the training rows as "
            "well, so the evaluation flatters; take them out of one of the two"
        )
    return found
