"""Strategies on the tables, thousands of times: how good what they pick truly is, and what it costs.

Usage: ``python benchmarks/search/replay.py [--replays 200] [--trials 16] [--rows 200] [--tables late,english]
[--strategies NAME ...] [--first 0]``. Every strategy's first three trials are trained with two further seeds each, and
the best mean wins, as in a real search. ``--save`` adds the figures to ``benchmarks/results/search.json``, which holds
those of replays from 1000 on, with 16 and with 64 trials. Rules were chosen on replays before.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import data_sets  # noqa: F401  (the path to the modules beside it)
import numpy as np
from environment import FINALISTS, SEEDS, Env, baseline
from strategies import STRATEGIES
from tables import HERE, Table

import common

HEADS = ["table", "strategy", "regret", "over the first", "95 %", "at chance", "cost", "with seeds", "s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first replay")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tables", default=",".join(sorted(path.stem for path in HERE.glob("*.npz"))))
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for name in given.tables.split(","):
        table = Table.read(given.folder / f"{name}.npz")
        numbers = range(given.first, given.first + given.replays)
        found[name] = compare(table, given.strategies, given.trials, given.rows, numbers)
    lines = [[name, words, *shown(one)] for name, each in found.items() for words, one in each.items()]
    common.print_table(lines, HEADS)
    if given.save:
        last = given.first + given.replays - 1
        save(f"{given.trials} trials, {given.rows} rows, replays {given.first} to {last}", found)


def compare(table: Table, strategies: list[str], trials: int, rows: int, replays: range) -> dict[str, dict[str, Any]]:
    """Strategy → its figures; differences are from the first, on the same replays."""
    found, first = {}, np.array([])
    for words in strategies:
        started = time.perf_counter()
        seen = np.array([once(table, words, trials, rows, replay) for replay in replays])
        regret, at_chance, cost, whole = seen.T
        first = first if len(first) else regret
        found[words] = {
            "replays": len(seen),
            "regret": regret.mean(),
            "regret over the first": (regret - first).mean(),
            "its standard error": (regret - first).std() / len(seen) ** 0.5,
            "regret, 95th percentile": np.quantile(regret, 0.95),
            "ended at chance": int(at_chance.sum()),
            "cost": cost.mean(),
            "cost with further seeds": whole.mean(),
            "seconds": time.perf_counter() - started,
        }
    return found


def once(table: Table, words: str, trials: int, rows: int, replay: int) -> tuple[float, bool, float, float]:
    """Regret; whether it ended at chance although there was better; cost over that of training all, without the
    further seeds of the finalists on either side, and with them."""
    source, chance = np.random.default_rng([replay, trials]), baseline(table)
    env = Env.draw(table, trials, rows, source)
    ranked = STRATEGIES[words](env, source)
    cost = env.steps_paid / env.full_cost
    chosen = env.finish(ranked) if ranked else None
    whole = env.steps_paid / (env.full_cost * (1 + FINALISTS * SEEDS / trials))
    best = env.truth.mean(1).max()
    value = chance if chosen is None else env.truth[chosen].mean()
    regret = best - chance if chosen is None else env.regret(chosen)
    return regret, best > chance + 0.05 and value < chance + 0.02, cost, whole


def shown(one: dict[str, Any]) -> list[str]:
    return [
        f"{one['regret']:.4f}",
        f"{one['regret over the first']:+.4f} ± {one['its standard error']:.4f}",
        f"{one['regret, 95th percentile']:.3f}",
        str(one["ended at chance"]),
        f"{one['cost']:.2f}",
        f"{one['cost with further seeds']:.2f}",
        f"{one['seconds']:.0f}",
    ]


def save(key: str, found: dict[str, dict[str, Any]]) -> None:
    path = common.RESULTS / "search.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for table, each in found.items():
        for words, one in each.items():
            kept = {name: round(float(value), 5) for name, value in one.items() if name != "seconds"}
            known.setdefault(key, {}).setdefault(table, {})[words] = kept
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
