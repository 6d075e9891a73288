"""Rows in, token batches out: ``rows`` reads files, ``encode`` makes tokens, ``batches`` makes tensors.

Nothing here knows a model, an adapter's weights or the training loop.
"""

from __future__ import annotations

from loraloom.data.batches import Batch, bucketed, collate, evaluation_batches, join, padding_share
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
