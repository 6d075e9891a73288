"""A table: configurations of one data set, each trained in full with several seeds, and what was measured of each.

``train_loss [config, seed, step]`` are the losses of training. ``loss`` and ``hit [config, seed, point, row]`` are each
held-out row's loss and whether it was right, at ``points`` (steps; 0 is before the first). Losses are kept in bfloat16.
A causal model's row has the mean loss of its tokens, ``tokens [row]`` says how many, and it has no hits.
``label [row]`` is the right class of each row, for classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "tables"


@dataclass
class Table:
    """``meta``: name, task, steps, points, configurations with their sizes and seconds, seeds, commit, processor."""

    meta: dict[str, Any]
    train_loss: np.ndarray
    loss: np.ndarray
    hit: np.ndarray | None
    tokens: np.ndarray
    label: np.ndarray | None = None

    @classmethod
    def read(cls, path: Path) -> Table:
        with np.load(path) as found:
            meta = json.loads(bytes(found["meta"]))
            rows = len(found["tokens"])
            hit = np.unpackbits(found["hit"], axis=-1, count=rows).astype(bool) if "hit" in found else None
            label = found.get("label")
            return cls(meta, found["train_loss"].astype(np.float32), decode(found["loss"]), hit, found["tokens"], label)

    def write(self, path: Path) -> None:
        arrays = {
            "meta": np.frombuffer(json.dumps(self.meta, sort_keys=True).encode(), np.uint8),
            "train_loss": self.train_loss.astype(np.float16),
            "loss": encode(self.loss),
            "tokens": self.tokens.astype(np.uint16),
        }
        if self.hit is not None:
            arrays["hit"] = np.packbits(self.hit, axis=-1)
        if self.label is not None:
            arrays["label"] = self.label.astype(np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **arrays)


def encode(loss: np.ndarray) -> np.ndarray:
    """bfloat16, of which the two bytes lie apart: high ones are much alike and pack well. [2, ...]

    Rounded up or down at random, with a fixed seed: rows near chance have nearly one loss, and a mean over them would
    otherwise keep the error of each.
    """
    bits = loss.astype(np.float32).view(np.uint32)
    up = np.random.default_rng(0).integers(0, 1 << 16, bits.shape, dtype=np.uint32)
    high = np.where(np.isfinite(loss), (bits + up) >> 16, 0x7FC0).astype(np.uint16)
    return np.stack([(high >> 8).astype(np.uint8), (high & 255).astype(np.uint8)])


def decode(code: np.ndarray) -> np.ndarray:
    return ((code[0].astype(np.uint32) << 24) | (code[1].astype(np.uint32) << 16)).view(np.float32)
