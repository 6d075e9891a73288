"""Rows in, token batches out. ``read`` reads files, ``shape`` makes records of rows, ``tokens`` makes examples of them,
``table`` keeps these, ``batches`` makes tensors; ``rows``, ``records`` and ``example`` are what they hand each other.

Nothing here knows a model, an adapter's weights or the training loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraloom.data.read.sources import Source, read_rows, resolve
from loraloom.data.rows import Row, as_task
from loraloom.data.shape.shapes import Shape, recognise
from loraloom.data.tokens.encode import IGNORE, Encoded1, Encoder, Example, encoder

if TYPE_CHECKING:
    from loraloom.data.batches import Batch, bucketed, collate, evaluation_batches, join, padding_share

__all__ = [
    "IGNORE",
    "Batch",
    "Encoded1",
    "Encoder",
    "Example",
    "Row",
    "Shape",
    "Source",
    "as_task",
    "bucketed",
    "collate",
    "encoder",
    "evaluation_batches",
    "join",
    "padding_share",
    "read_rows",
    "recognise",
    "resolve",
]


def __getattr__(name: str) -> Any:
    # When first used: batches need torch, and the processes that tokenise do not, of which there may be many.
    if name not in __all__:
        raise AttributeError(f"module 'loraloom.data' has no attribute {name!r}")
    from loraloom.data import batches

    return getattr(batches, name)
