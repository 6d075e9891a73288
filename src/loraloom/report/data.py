"""The data as a model will see it: rows with their trained tokens in colour, lengths, and notes.

Takes data that is read and tokenised; returns what a terminal shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Group, RenderableType

from loraloom.data.dataset import Data, Part
from loraloom.data.example import IGNORE, Example
from loraloom.report.format import counted
from loraloom.report.screen import Text
from loraloom.tasks.base import Task

#: Styles of trained tokens and of the others; and the marks around trained ones on screens without colours.
TRAINED, SEEN = "bold green", "dim"
MARKS = "⟦", "⟧"
#: Tokens of a row that are shown, of its beginning and of its end; bars of the histogram, and their width.
HEAD, TAIL, BARS, WIDE = 300, 100, 10, 40


def picture(
    data: Data, tokenizer: Any, task: Task, rows: int = 3, max_length: int | None = None, marks: bool = False
) -> RenderableType:
    """The first training rows as the model sees them, what was noticed, and the figures.

    ``marks``: put trained text between ``MARKS``, for screens without colours.
    """
    parts: list[RenderableType] = [Text(note) for note in data.notes]
    parts += [Text(f"warning: {warning}", "yellow") for warning in data.warnings]
    for number in range(min(rows, len(data.train.examples))):
        where = data.train.examples.where(number)
        parts += [Text(f"\n{where}", "bold"), shown(data.train.examples[number], tokenizer, task, data.names, marks)]
    parts += [Text(), *figures(data, task), Text(), histogram(data.train.lengths, max_length)]
    return Group(*parts)


def shown(example: Example, tokenizer: Any, task: Task, names: Sequence[str] = (), marks: bool = False) -> Text:
    """One example: what is trained on in colour, what the model only reads dim."""
    ids, labels = example.input_ids, example.labels
    target = task.shown_target(example, tokenizer, names)
    if target is None:
        assert isinstance(labels, list)
        return _pieces(tokenizer, ids, [int(label) for label in labels], names, marks and not names)
    return _pieces(tokenizer, ids, [IGNORE] * len(ids)).append("\n→ ").append(target, TRAINED)


def _pieces(
    tokenizer: Any, ids: Sequence[int], labels: Sequence[int], names: Sequence[str] = (), marks: bool = False
) -> Text:
    """Runs of tokens that are alike, each decoded as one; a long row without its middle."""
    text = Text()
    cut = len(ids) > HEAD + TAIL
    spans = [range(HEAD), range(len(ids) - TAIL, len(ids))] if cut else [range(len(ids))]
    for part, span in enumerate(spans):
        if part:
            text.append(f" … {len(ids) - HEAD - TAIL:,} tokens … ", "italic")
        for label, group in groupby(span, key=lambda i: labels[i] if names else labels[i] != IGNORE):
            run = [ids[i] for i in group]
            trained = label != IGNORE if names else label  # 0 is a tag like any other
            before, after = MARKS if marks and trained else ("", "")
            text.append(f"{before}{tokenizer.decode(run)}{after}", TRAINED if trained else SEEN)
            if names and trained:
                text.append(f"[{names[label]}]", "green")
            if names:
                text.append(" ")
    return text


def figures(data: Data, task: Task) -> Iterator[Text]:
    """Counts in lines."""
    for what, part in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if part is None:
            continue
        lengths = np.asarray(part.lengths)
        yield Text(
            f"{what:11}{counted(part.rows, 'row')}, {counted(len(part.examples), 'example')}, "
            f"{counted(part.tokens, 'token')}{_share_trained(part, task)}; length {_between(lengths)}"
        )
    yield Text(f"{'padding':11}{data.padding:.1%} of what goes through the model, rows of like length together")
    if data.names:
        yield Text(f"{'labels':11}{', '.join(data.names[:12])}{' …' if len(data.names) > 12 else ''}")


def _between(lengths: np.ndarray) -> str:
    low, high = lengths.min(), lengths.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}, median {int(np.median(lengths)):,}"


def _share_trained(part: Part, task: Task) -> str:
    """Of the first thousand examples, how many tokens carry loss."""
    if task.layout != "token":
        return ""
    some = [part.examples[number] for number in range(min(1000, len(part.examples)))]
    labels = [label for example in some if isinstance(example.labels, list) for label in example.labels]
    trained = sum(label != IGNORE for label in labels)
    return f" ({trained / max(len(labels), 1):.0%} trained on)"


def histogram(lengths: Sequence[int], max_length: int | None = None) -> Text:
    """Rows by their tokens, as bars."""
    found = np.asarray(lengths)
    edges = np.unique(np.linspace(found.min(), found.max() + 1, BARS + 1).astype(int))
    counts, _ = np.histogram(found, bins=edges)
    text = Text("tokens of a row\n", "bold")
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        bar = "█" * round(WIDE * count / max(counts.max(), 1)) or ("▏" if count else "")
        last = f"to {high - 1:,}" if high - 1 > low else ""
        text.append(f"{low:>7,} {last:<10} ").append(bar, "green").append(f" {count:,}\n")
    if max_length is not None and (full := int((found >= max_length).sum())):
        text.append(f"{full:,} of them at max_length={max_length}\n", "yellow")
    text.rstrip()
    return text
