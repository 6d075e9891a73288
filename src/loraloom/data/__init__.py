"""Rows in, token batches out: ``rows`` reads files, ``encode`` makes tokens, ``batches`` makes tensors.

Nothing here knows a model, an adapter's weights or the training loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loraloom.data.encode import IGNORE, Encoded, Example, encode
from loraloom.data.rows import (
    Row,
    as_task,
    check_columns,
    check_labels,
    data_hash,
    label_ids,
    label_name,
    label_names,
    read_rows,
    split,
)

if TYPE_CHECKING:
    from loraloom.data.batches import Batch, bucketed, collate, evaluation_batches, join, padding_share

__all__ = [
    "IGNORE",
    "Batch",
    "Encoded",
    "Example",
    "Row",
    "as_task",
    "bucketed",
    "check_columns",
    "check_labels",
    "collate",
    "data_hash",
    "encode",
    "evaluation_batches",
    "join",
    "label_ids",
    "label_name",
    "label_names",
    "padding_share",
    "read_rows",
    "split",
]


def __getattr__(name: str) -> Any:
    # When first used: batches need torch, and the processes that tokenise do not, of which there may be many.
    if name not in __all__:
        raise AttributeError(f"module 'loraloom.data' has no attribute {name!r}")
    from loraloom.data import batches

    return getattr(batches, name)
