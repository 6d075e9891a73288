"""From examples to batches: which rows form a batch, and the padded tensors.

This file knows lengths, order and padding. It does not know texts, tokenizers or models, and does not use the global
random generators: an order depends only on the arguments.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from loraloom.data.example import IGNORE, Example
from loraloom.data.task import Layout

#: Batches whose rows are sorted by length together. More means less padding, fewer means more shuffling.
CHUNK = 50


def bucketed(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch as row indices, each row exactly once, rows of a batch of similar length.

    Rows are shuffled, then sorted by length within groups of ``CHUNK`` batches, then the order of the batches is
    shuffled. All batches have ``batch_size`` rows except one with the remainder. The result depends only on the four
    arguments.
    """
    # A text seed mixes both numbers whole; a sum would make epoch 1 of seed 0 the same as epoch 0 of seed 1.
    generator = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    generator.shuffle(order)
    batches = []
    for start in range(0, len(order), batch_size * CHUNK):
        stretch = sorted(order[start : start + batch_size * CHUNK], key=lengths.__getitem__)
        batches += _cut(stretch, batch_size)
    generator.shuffle(batches)
    return batches


def evaluation_batches(lengths: Sequence[int], batch_size: int, *, alike: bool = False) -> list[list[int]]:
    """All rows in batches by length, longest first: the least padding, and the most memory at once.

    With ``alike`` the rows of a batch have the same length, so that there is no padding.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    if not alike:
        return _cut(order, batch_size)
    return [batch for _, rows in groupby(order, lengths.__getitem__) for batch in _cut(list(rows), batch_size)]


def _cut(order: list[int], batch_size: int) -> list[list[int]]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The share, 0 to 1, of the positions in ``batches`` that is padding."""
    places = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    tokens = sum(lengths[row] for batch in batches for row in batch)
    return 1 - tokens / places if places else 0.0


def collate(examples: Sequence[Example], pad_id: int, layout: Layout) -> dict[str, Tensor]:
    """Tensors of one batch (at least one example), padded on the right to its longest example.

    ``input_ids`` [rows, longest] are filled with ``pad_id``, ``attention_mask`` [rows, longest] is 1 on tokens and 0 on
    padding, and ``token_type_ids`` [rows, longest] are there where an example has them, filled with 0; all int64.
    ``labels`` are int64, or float32 where they are numbers or several classes: [rows] or [rows, numbers of a row] of
    the layout ``row``, [rows, longest] of ``token`` and [rows, longest target] of ``target``, with ``IGNORE`` on the
    padding.
    """
    width = max(len(example.input_ids) for example in examples)
    # Not ids == pad_id: many tokenizers pad with the end-of-text token, which is a real token at the end.
    mask = [[1] * len(example.input_ids) for example in examples]
    found = {
        "input_ids": torch.tensor([_padded(example.input_ids, width, pad_id) for example in examples]),
        "attention_mask": torch.tensor([_padded(row, width, 0) for row in mask]),
    }
    if any(example.token_type_ids is not None for example in examples):
        types = [example.token_type_ids or [0] * len(example.input_ids) for example in examples]
        found["token_type_ids"] = torch.tensor([_padded(row, width, 0) for row in types])
    return {**found, "labels": _labels([example.labels for example in examples], width, layout)}


def _labels(labels: Sequence[int | float | list[int] | list[float]], width: int, layout: Layout) -> Tensor:
    if layout != "row":
        rows = [row for row in labels if isinstance(row, list)]
        if layout == "target":
            width = max(map(len, rows))
        return torch.tensor([_padded(row, width, IGNORE) for row in rows], dtype=torch.int64)
    first = labels[0][0] if isinstance(labels[0], list) else labels[0]
    return torch.tensor(labels, dtype=torch.float32 if isinstance(first, float) else torch.int64)


def _padded(values: Sequence[float], width: int, filler: int) -> list[float]:
    return [*values, *[filler] * (width - len(values))]
