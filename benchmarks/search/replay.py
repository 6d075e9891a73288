"""Strategies on the tables, thousands of times: how good what they pick truly is, and what it costs.

Usage: ``python benchmarks/search/replay.py [--replays 200] [--trials 16] [--rows 200] [--tables late,english]
[--strategies NAME ...]``
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import data_sets  # noqa: F401  (the path to the modules beside it)
import numpy as np
from environment import Env, baseline
from strategies import STRATEGIES
from tables import HERE, Table

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tables", default=",".join(sorted(path.stem for path in HERE.glob("*.npz"))))
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--folder", type=Path, default=HERE)
    given = parser.parse_args()
    lines = []
    for name in given.tables.split(","):
        table = Table.read(given.folder / f"{name}.npz")
        full = np.array([])
        for words in given.strategies:
            started = time.perf_counter()
            seen = np.array([once(table, words, given.trials, given.rows, replay) for replay in range(given.replays)])
            regret, cost, at_chance = seen.T
            full = full if len(full) else regret
            lines.append(
                [
                    name,
                    words,
                    f"{regret.mean():.4f}",
                    f"{(regret - full).mean():+.4f} ± {(regret - full).std() / len(regret) ** 0.5:.4f}",
                    f"{np.quantile(regret, 0.95):.3f}",
                    f"{at_chance.mean():.3f}",
                    f"{cost.mean():.2f}",
                    f"{time.perf_counter() - started:.0f}",
                ]
            )
    common.print_table(lines, ["table", "strategy", "regret", "over the first", "95 %", "at chance", "cost", "s"])


def once(table: Table, words: str, trials: int, rows: int, replay: int) -> tuple[float, float, float]:
    """Regret, cost, and whether it ended at chance although there was better."""
    source, chance = np.random.default_rng([replay, trials]), baseline(table)
    env = Env.draw(table, trials, rows, source)
    chosen = STRATEGIES[words](env, source)
    best = env.truth.mean(1).max()
    value = chance if chosen is None else env.truth[chosen].mean()
    regret = best - chance if chosen is None else env.regret(chosen)
    return regret, env.cost(), best > chance + 0.05 and value < chance + 0.02


if __name__ == "__main__":
    main()
