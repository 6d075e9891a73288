"""Whether the held-out rows of a search can carry a verdict, checked before any training.

They cannot if they are among the rows that are trained on, if they all have one label, or if they are very few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from loraloom.data.dataset import HELD_OUT, Part
from loraloom.data.example import IGNORE
from loraloom.data.summary import WHAT, Shared
from loraloom.errors import DataError
from loraloom.messages import Message, Warn
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.training.setup import Setup

#: A search is refused if more than this share of the held-out rows, and at least ``LEAST`` of them, are training rows.
SHARED, LEAST = 0.01, 2
#: With fewer rows the 95 % interval of a share of them is wider than 0.2.
FEW = 100


def check(setup: Setup, allow_shared: bool) -> None:
    """
    Raises:
        DataError: the rows that compare trials have one label, or (unless ``allow_shared``) two parts share rows.
    """
    if (only := _only_label(setup, setup.data.validation)) is not None:
        raise DataError(
            f"{_source(setup, 'validation')}: all {len(setup.data.validation.examples)} held-out rows are labelled "
            f"{only}, so no configuration can be told from another; hold out more rows"
        )
    for shared in setup.data.shared:
        if not allow_shared and shared.count >= LEAST and shared.share > SHARED:
            raise _flattering(setup, shared)


def messages(setup: Setup) -> Iterator[Message]:
    """What weakens a verdict on these rows."""
    data = setup.data
    if data.test is not None and (only := _only_label(setup, data.test)) is not None:
        yield Warn("one_class_test", rows=len(data.test.examples), label=only)
    for part, rows in (("validation", data.validation_rows), ("test", data.test_rows)):
        if rows is not None and len(rows) < FEW and greater_is_better(setup.metrics.first):
            yield Warn("few_rows", part=part, rows=len(rows), margin=0.98 / math.sqrt(len(rows)))


def _only_label(setup: Setup, part: Part) -> str | None:
    """The class of all rows of ``part``, or the tag of all their words; None if there are several, or no classes."""
    seen: set[int] = set()
    for example in part.examples if setup.data.names else ():
        labels = example.labels if setup.task.layout == "token" else [example.labels]
        seen |= {label for label in labels if isinstance(label, int) and label != IGNORE}  # type: ignore[union-attr]
        if len(seen) != 1:
            return None
    return repr(setup.data.names[seen.pop()]) if seen else None


def _flattering(setup: Setup, shared: Shared) -> DataError:
    return DataError(
        f"{_source(setup, shared.part)}: {shared.count:,} of {shared.of:,} {WHAT[shared.part]} rows are among the "
        f"{WHAT[shared.other]} rows as well ({shared.places[0]}, is the same as {shared.places[1]}), so figures on "
        "them flatter; take them out of one of the two, or give --allow-shared-rows"
    )


def _source(setup: Setup, part: str) -> Any:
    own = getattr(setup.options, HELD_OUT[part])
    return own if isinstance(own, str) else setup.options.data
