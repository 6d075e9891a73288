"""Warnings about the rows of a run, from counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Shared:
    """``count`` of the ``of`` examples of ``part`` have the tokens of one of ``other``; ``places`` are of the first."""

    part: str
    other: str
    count: int
    of: int
    places: tuple[str, str]

    @property
    def share(self) -> float:
        return self.count / self.of

    @property
    def warning(self) -> str:
        """A sentence."""
        among = f"{rows(self.count, WHAT[self.part])} ({self.share:.1%}) {'is' if self.count == 1 else 'are'} among the"
        return (
            f"{among} {WHAT[self.other]} rows as well, so the evaluation flatters; take them out of one of the two "
            f"(the first is {self.places[0]}, the same as {self.places[1]})"
        )


def shared(part: str, examples: Examples, other: str, others: Examples) -> Shared | None:
    """Examples of ``part`` that the model cannot tell from examples of ``other``; None without any."""
    both = np.isin(examples.digests, _digests(others))
    if not both.any():
        return None
    first = int(np.argmax(both))
    twin = int(np.argmax(others.digests == examples.digests[first]))
    places = examples.where(first), others.where(twin)
    return Shared(part, other, int(both.sum()), len(examples), places)


def repeated(train: Examples) -> list[str]:
    """A warning about training rows with equal tokens."""
    digests = _digests(train)
    twice = len(digests) - len(np.unique(digests))
    return [f"{rows(twice, 'training')} {'is' if twice == 1 else 'are'} the same as another one"] if twice else []


def _digests(examples: Examples) -> Array:
    """Of the rows of ``examples``, each once."""
    table = examples.table
    found: Array = table.digests[np.isin(table.example_rows, np.unique(examples.rows))]
    return found
