"""Train one adapter with a function, with rows and a metric of your own, and use it.

Usage: ``python examples/train_from_code.py [FOLDER]``
"""

from __future__ import annotations

import sys
from pathlib import Path

import loraloom
import tiny

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/train-from-code")


def first_letter(predictions: list[str], references: list[str]) -> float:
    """The share of answers that begin as the right one does."""
    return sum(p[:1] == r[:1] for p, r in zip(predictions, references, strict=True)) / len(references)


run = loraloom.train(
    model=tiny.model(folder / "model"),
    data=tiny.rows() * 4,  # a list of dicts, a DataFrame, a datasets.Dataset, or the path of a file
    validation=tiny.rows(),
    task="causal-lm",
    output=folder / "run",
    target_modules="all-linear",
    learning_rate=5e-3,
    epochs=20,
    metrics=["loss", first_letter],
    overwrite=True,
)
print(f"loss {run.metrics['loss']:.3f}, first letter right {run.metrics['first_letter']:.0%}, adapter in {run.adapter}")
print(f"after 10 steps the loss was {run.curve['loss'][9]:.3f}")
