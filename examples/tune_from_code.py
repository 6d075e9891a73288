"""Which configuration should I use? A search with a function, over a space of your own.

Usage: ``python examples/tune_from_code.py [FOLDER]``
"""

from __future__ import annotations

import sys
from pathlib import Path

import loraloom
import tiny

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tune-from-code")
search = loraloom.tune(
    model=tiny.model(folder / "model"),
    data=tiny.rows() * 8,
    validation=tiny.rows(),
    task="causal-lm",
    output=folder / "search",
    trials=4,
    epochs=25,
    space={"lora.r": [2, 8], "train.learning_rate": {"log": [3e-3, 1e-2]}},
    target_modules="all-linear",
    metric="loss",
    finalists=1,
    seeds=0,
    allow_shared_rows=True,  # the same eight rows train and judge
    overwrite=True,
)
for trial in sorted(search.table, key=lambda trial: trial["metric"]):
    print(f"r={trial['lora.r']}  rate={trial['train.learning_rate']:.4f}  loss={trial['metric']:.3f}  {trial['state']}")
print(f"to use: {search.best}; its adapter is in {search.adapter}")
