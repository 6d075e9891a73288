"""The test of a search: rows that chose nothing, looked at once, when the choice is made.

The winner is measured beside the runner-up and the answers that any configuration has to beat. Each figure has an
interval, and so has each difference, on the same rows. If a configuration was trained with several seeds, figures are
means over them and the intervals hold the noise of seeds too; otherwise they are about these very adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraloom.inference.evaluation import Evaluator
from loraloom.inference.intervals import Interval, SeedNoise, Seeds
from loraloom.training.setup import Setup
from loraloom.tuning.bar import measure_bar
from loraloom.tuning.judge import Against, Judge
from loraloom.tuning.state import TRIALS, damaged
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import name_of


@dataclass(frozen=True)
class FinalTest:
    """``figure`` is the winner's, the mean over its ``seeds``."""

    metric: str
    rows: int
    seeds: int
    figure: Interval
    against: list[Against]


def final_test(
    setup: Setup,
    metric: str,
    configurations: Sequence[Sequence[Trial]],
    noise: SeedNoise | None,
    folder: Path,
    *,
    head: bool = True,
) -> FinalTest | None:
    """Measure the winner beside others; None without test rows, or if no adapter of the winner is whole.

    Args:
        configurations: the seeds of the winner, then those of the others.
        noise: of one seed, from the rows that chose.
        folder: of the search.
        head: measure a new head on the frozen model as well, which is fitted again.
    """
    evaluator = setup.test_evaluator()
    if evaluator is None:
        return None
    seen = _figures(setup, evaluator, configurations, metric, folder)
    winner, *others = seen
    if not (mine := seen[winner]):
        return None
    judge = Judge.of(setup, evaluator, metric, noise)
    answers = measure_bar(setup, evaluator, head=head).baselines(metric)
    against = judge.against(mine, {number: seen[number] for number in others}, answers)
    return FinalTest(metric, judge.rows, len(mine), judge.figure(mine), against)


def _figures(
    setup: Setup, evaluator: Evaluator, configurations: Sequence[Sequence[Trial]], metric: str, folder: Path
) -> dict[int, Seeds]:
    """First trial → the metric of each seed's adapter on the test rows, in one pass. Damaged adapters are left out."""
    with setup.temporary_adapters() as model:
        names: dict[int, list[str]] = {group[0].number: [] for group in configurations}
        for group in configurations:
            for trial in group:
                name, path = name_of(trial.number), folder / TRIALS / name_of(trial.number)
                if trial.state != "finished" or damaged(path, trial.files):
                    continue
                if name not in model.peft_config:
                    model.load_adapter(path, name)
                names[group[0].number].append(name)
        every = [name for group in names.values() for name in group]
        found = dict(zip(every, evaluator.figures(every, evaluator.parts), strict=True)) if every else {}
    measured = {number: [found[name][metric] for name in group] for number, group in names.items()}
    return {number: [one for one in seeds if math.isfinite(one[0])] for number, seeds in measured.items()}
