"""A thousand whole searches on each table: is what they claim true? One table of targets, and a JSON file.

Usage: ``python benchmarks/search/calibrate.py [--tables late,noisy] [--searches 1000] [--trials 16] [--rows 200]
[--test 400] [--rules NAME ...] [--results DIR]``. What was measured before of other tables and rules stays in
``search-calibration.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import data_sets  # noqa: F401  (the path to the modules beside it)
import numpy as np
from population import Claim, Outcome, Population, Search
from strategies import STRATEGIES
from tables import HERE, Table

import common

#: True differences below ``EQUAL`` are none; what is ``WORSE`` than the bar harms; ``MORE`` above it is to be found.
EQUAL, WORSE, MORE = 0.002, 0.01, 0.05
NAME = "search-calibration"
#: Cases that a share needs.
LEAST = 20


@dataclass(frozen=True)
class Measured:
    """One line: ``value`` with its standard ``error`` over ``cases``, and whether it is from ``least`` to ``most``."""

    figure: str
    least: float
    most: float
    value: float
    error: float
    cases: int

    @property
    def met(self) -> bool:
        return self.least - 1e-9 <= self.value <= self.most + 1e-9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", default=",".join(sorted(path.stem for path in HERE.glob("*.npz"))))
    parser.add_argument("--searches", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--rules", nargs="*", default=["loraloom", "all in full"], choices=list(STRATEGIES))
    parser.add_argument("--folder", type=Path, default=HERE)
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    given = parser.parse_args()
    path = given.results / f"{NAME}.json"
    found: dict[str, Any] = json.loads(path.read_text())["tables"] if path.exists() else {}
    lines = []
    for name in given.tables.split(","):
        population = Population(Table.read(given.folder / f"{name}.npz"))
        for rule in given.rules:
            started = time.perf_counter()
            made = {"trials": given.trials, "rows": given.rows, "test": given.test}
            all_seeds = searches(population, rule, given.searches, **made)
            one_seed = searches(population, rule, math.ceil(given.searches / 5), **made, seeds=0)
            measured = figures(all_seeds, one_seed)
            found.setdefault(name, {})[rule] = {
                **made,
                "searches": given.searches,
                "seconds": round(time.perf_counter() - started),
                "figures": [{**asdict(one), "met": one.met} for one in measured],
                "besides": besides(all_seeds),
            }
            lines += [[name, rule, *line(one)] for one in measured]
    common.print_table(lines, ["table", "rule", "figure", "target", "measured", "cases", ""])
    print(common.write(NAME, {"tables": found}, given.results))


def searches(population: Population, rule: str, count: int, **more: int) -> list[Outcome]:
    return [Search(population, rule, np.random.default_rng(number), **more).outcome() for number in range(count)]


def figures(found: Sequence[Outcome], one_seed: Sequence[Outcome]) -> list[Measured]:
    """The targets, and what was measured. ``one_seed``: of searches without further seeds."""
    claims = [claim for one in found for claim in one.claims if claim.found.seeds > 1]
    alone = [claim for one in one_seed for claim in one.claims]
    out = [
        share(f"holds: {about}", [claim.holds for claim in claims if claim.about == about], 0.93, 0.98)
        for about in sorted({claim.about for claim in claims if claim.about.startswith("better")})
    ]
    out.append(share("wrong one named better", [claim.wrong for claim in claims], 0, 0.025))
    out.append(share("one seed: claims about configurations", [claim.found.seeds > 1 for claim in alone], 0, 0))
    out.append(share("one seed, these adapters: holds, test rows", tested(alone), 0.93, 1))
    equal = [claim for claim in claims if "runner-up" in claim.about and abs(claim.truth) < EQUAL]
    out.append(share(f"not told apart, below {EQUAL}", [not claim.found.clear for claim in equal], 0.8, 1))
    harm = [one.value is not None and one.value < one.bar - WORSE for one in found]
    out.append(share(f"recommends more than {WORSE} below untrained", harm, 0, 0))
    missed = [one.value is None for one in found if one.best_tried > one.bar + MORE]
    out.append(share(f"nothing learned, though {MORE} more", missed, 0, 0.01))
    return [one for one in [*out, closed(found)] if one.cases >= LEAST]


def tested(claims: Sequence[Claim]) -> list[bool]:
    return [one.holds for one in claims if one.about.startswith("better") and one.about.endswith("test rows")]


def share(figure: str, cases: Sequence[bool], least: float, most: float) -> Measured:
    value = float(np.mean(cases)) if cases else math.nan
    return Measured(figure, least, most, value, math.sqrt(value * (1 - value) / max(len(cases), 1)), len(cases))


def closed(found: Sequence[Outcome]) -> Measured:
    """Of the gap between the usual start and the best of the space; who is recommended nothing stays at the start."""
    gap = np.array([one.best - one.usual for one in found])
    won = np.array([0.0 if one.value is None else one.value - one.usual for one in found])
    value = float(won.sum() / gap.sum())
    error = float(np.std(won - value * gap) / gap.mean() / math.sqrt(len(gap)))  # of a ratio of means
    return Measured("gap to the best of the space closed", 0.95, math.inf, value, error, len(found))


def besides(found: Sequence[Outcome]) -> dict[str, Any]:
    """Figures without a target."""
    known = [one for one in found if one.value is not None]

    def about(words: str) -> list[Claim]:
        return [claim for one in known for claim in one.claims if claim.about == words]

    kinds = sorted({claim.about for one in known for claim in one.claims})
    return {
        "optimism of the winner's figure": float(np.mean([one.stated - (one.value or 0.0) for one in known])),
        "holds": {words: float(np.mean([claim.holds for claim in about(words)])) for words in kinds},
        "median width": {
            words: float(np.median([claim.found.high - claim.found.low for claim in about(words)])) for words in kinds
        },
        "told apart": {words: float(np.mean([claim.found.clear for claim in about(words)])) for words in kinds},
    }


def line(one: Measured) -> list[str]:
    ends = [f"{end:.0%}" if end in (0, 1) else f"{100 * end:.3g} %" for end in (one.least, one.most)]
    target = f"{ends[0]} to {ends[1]}"
    if one.most == one.least:
        target = ends[0]
    elif one.most >= 1:
        target = f"at least {ends[0]}"
    elif one.least == 0:
        target = f"at most {ends[1]}"
    measured = f"{100 * one.value:.1f} ± {100 * one.error:.1f} %"
    return [one.figure, target, measured, str(one.cases), "met" if one.met else "MISSED"]


if __name__ == "__main__":
    main()
