"""Whole searches on a table, as a user has them: a rule, further seeds of the finalists, the verdict, the test.

What is decided and claimed comes from the package's own functions. The table is the population: each search draws its
held-out rows, its test rows and the seeds of each configuration from it, with replacement. So draws are independent,
and what is true is known without error: the mean over all rows and seeds of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from environment import Env
from strategies import STRATEGIES
from tables import Table

from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.inference.intervals import Difference, SeedNoise, Seeds
from loraloom.inference.jackknife import Figures, divide
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.tuning import selection
from loraloom.tuning.bar import FROZEN, Bar, learned
from loraloom.tuning.judge import Judge, outcomes, seed_noise
from loraloom.tuning.selection import Selection, select
from loraloom.tuning.trial import Trial

OPTIONS = TrainConfig(model="model", data="data", task="seq-cls", output="output")
#: A diverged configuration is as bad as this loss.
DIVERGED = 30.0


@dataclass(frozen=True)
class Claim:
    """``found`` was stated about what is ``truth``. ``about``: against what, and on which rows."""

    about: str
    found: Difference
    truth: float

    @property
    def holds(self) -> bool:
        return self.found.low - 1e-9 <= self.truth <= self.found.high + 1e-9

    @property
    def wrong(self) -> bool:
        """It tells two apart, and the better one is not the one it names."""
        return self.found.clear and self.found.value * self.truth <= 0


@dataclass
class Outcome:
    """What a search came to, in true goodness. ``value`` is the recommended configuration's; None: none is."""

    value: float | None
    #: what the rows that chose it say of it
    stated: float
    #: of the whole space, and of the configurations that were tried
    best: float
    best_tried: float
    #: of everybody's first configuration, and of the best untrained answer
    usual: float
    bar: float
    claims: list[Claim] = field(default_factory=list)


class Population:
    """A table, and what is true in it. Goodness is being right, or minus the loss."""

    def __init__(self, table: Table) -> None:
        self.table, self.metric = table, "loss" if table.hit is None else "accuracy"
        self.weights = table.tokens / table.tokens.sum()
        self.loss = np.nan_to_num(table.loss, nan=DIVERGED)
        self.hit = None if table.hit is None else table.hit.astype(np.float32)
        end = -self.loss[:, :, -1] if self.hit is None else self.hit[:, :, -1]
        #: [configuration, seed]: goodness at the end
        self.ends = end @ self.weights
        self.truth = self.ends.mean(1)
        #: untrained answers in words → metric → each row's
        self.answers = self._answers()
        rows = np.stack([one[self.metric] for one in self.answers.values()])
        self.bars = dict(zip(self.answers, (self.sign * rows @ self.weights).tolist(), strict=True))

    @property
    def sign(self) -> int:
        return 1 if greater_is_better(self.metric) else -1

    def values(self, configuration: int, seed: int, point: int) -> dict[str, np.ndarray]:
        """Metric → each row's."""
        where = configuration, seed, point
        return {"loss": self.loss[where]} | ({} if self.hit is None else {"accuracy": self.hit[where]})

    def _answers(self) -> dict[str, dict[str, np.ndarray]]:
        label = self.table.label
        if self.hit is None:
            return {FROZEN: {"loss": self.loss[0, 0, 0]}}
        assert label is not None, "the table has no labels of its rows: build it again"
        loss = -np.log(np.bincount(label) / len(label))[label]
        names = self.table.meta["labels"]
        return {f"always {n!r}": {"loss": loss, "accuracy": (label == at) * 1.0} for at, n in enumerate(names)}


@dataclass(frozen=True)
class Rows:
    """Rows drawn from a population. ``kept`` [1 + parts, rows]: weights of all, then without each part."""

    numbers: np.ndarray
    kept: np.ndarray

    @classmethod
    def of(cls, population: Population, numbers: np.ndarray) -> Rows:
        parts = divide(range(len(numbers)))
        kept = np.ones((len(parts) + 1, len(numbers)))
        for place, part in enumerate(parts, 1):
            kept[place, part] = 0.0
        kept *= population.weights[numbers]
        return cls(numbers, kept / kept.sum(1, keepdims=True))

    def figures(self, values: dict[str, np.ndarray]) -> Figures:
        return {metric: (self.kept @ each[self.numbers]).tolist() for metric, each in values.items()}


class Search:
    """One search on ``of``: ``trials`` configurations, ``seeds`` more of each of ``finalists``."""

    def __init__(
        self,
        of: Population,
        rule: str,
        source: np.random.Generator,
        *,
        trials: int = 16,
        rows: int = 200,
        test: int = 400,
        finalists: int = 3,
        seeds: int = 2,
    ) -> None:
        configurations, known, _, pool = of.table.loss.shape
        #: [configuration, seed of the search]: the seed of the table
        self.drawn = source.integers(known, size=(configurations, 1 + seeds))
        seen, tested = source.integers(pool, size=max(pool, 5 * rows)), source.integers(pool, size=test)
        each = np.arange(configurations)[:, None], self.drawn
        table = replace(
            of.table,
            train_loss=of.table.train_loss[each],
            loss=of.table.loss[each][..., seen],
            hit=None if of.table.hit is None else of.table.hit[each][..., seen],
            tokens=of.table.tokens[seen],
        )
        self.of, self.metric, self.env = of, of.metric, Env.draw(table, min(trials, configurations), rows, source)
        self.env.seeds = [list(range(1 + seeds)) for _ in self.env.trials]
        self.last = len(self.env.points) - 1
        self.rows, self.test_rows = Rows.of(of, seen[self.env.rows]), Rows.of(of, tested)
        self.bar = self._bar(self.rows)
        STRATEGIES[rule](self.env, source)
        self.trials = [self._trial(place, place, 0) for place in range(len(self.env.trials))]
        self._resume()
        for trial in selection.finalists(filter(self._learned, self.trials), self.metric, finalists):
            for seed in range(1, 1 + seeds):
                self.env.train(trial.number, self.last, seed)
                self.trials.append(self._trial(len(self.trials), trial.number, seed))

    def _trial(self, number: int, place: int, seed: int) -> Trial:
        """What a search knows of the trial at ``place`` with its ``seed``."""
        env = self.env
        point = env.at.get((place, seed), 0)
        found = self.rows.figures(self.of.values(env.trials[place], self.drawn[env.trials[place], seed], point))
        measured = {"step": env.points[point], **{metric: values[0] for metric, values in found.items()}}
        return Trial(
            number,
            {},
            replace(OPTIONS, seed=seed),
            env.steps,
            env.points[point],
            "finished" if point == self.last else "stopped",
            curve=Curve(env.losses(place, seed).tolist(), [], [measured]),
            parameters=env.config(place)["parameters"],
            repeats=place if seed else None,
            parts=found if point == self.last else {},
        )

    def _bar(self, rows: Rows) -> Bar:
        constant = self.of.table.meta["constant"]
        answers = {words: rows.figures(values) for words, values in self.of.answers.items()}
        return Bar(len(rows.numbers), constant and constant["loss"], self.metric == "loss", answers)

    def _learned(self, trial: Trial) -> bool:
        return trial.state == "finished" and learned(self.bar, [trial], self.metric, len(self.env.trials))

    def _resume(self) -> None:
        """If no finished trial has learned anything, those that were stopped last train to their end as well."""
        while not any(map(self._learned, self.trials)):
            stopped = {trial.number: trial.step for trial in self.trials if trial.state == "stopped"}
            if not stopped:
                return
            for place in [n for n, step in stopped.items() if step == max(stopped.values())]:
                self.env.train(place, self.last)
                self.trials[place] = self._trial(place, place, 0)

    # -- what it comes to -------------------------------------------------------------------------------------------

    def outcome(self) -> Outcome:
        found, of = select(self.trials, self.metric, self.bar), self.of
        assert found is not None
        tried, bar = of.truth[self.env.trials], max(of.bars.values())
        value = float(tried[found.winner]) if found.able else None
        stated = of.sign * found.scores[found.winner].mean
        out = Outcome(value, stated, float(of.truth.max()), float(tried.max()), float(of.truth[0]), bar)
        if found.able:
            noise = seed_noise((found.scores[n] for n in found.able), outcomes(self.trials, self.metric, self.bar))
            for rows, name in ((self.rows, "validation rows"), (self.test_rows, "test rows")):
                out.claims += self._claims(found, rows, name, noise)
        return out

    def _claims(self, found: Selection, rows: Rows, name: str, noise: SeedNoise | None) -> Iterator[Claim]:
        judge, mine = Judge(self.metric, len(rows.numbers), noise), self._figures(found.winner, rows)
        words, answer = self._bar(rows).best(self.metric) or ("", [])
        better = judge.better(mine, [answer], fixed=True)
        yield Claim(f"better than untrained, {name}", better, self._truth(found.winner, better) - self.of.bars[words])
        if found.runner_up is not None:
            better = judge.better(mine, self._figures(found.runner_up, rows))
            apart = self._truth(found.winner, better) - self._truth(found.runner_up, better)
            yield Claim(f"better than the runner-up, {name}", better, apart)
        figure = judge.figure(mine)
        low, high = sorted((self.of.sign * figure.low, self.of.sign * figure.high))
        stated = Difference(self.of.sign * figure.value, low, high, seeds=better.seeds)
        yield Claim(f"the winner's figure, {name}", stated, self._truth(found.winner, stated))

    def _seeds(self, place: int) -> list[int]:
        """The table's seeds of a configuration's trials that finished."""
        mine = [t for t in self.trials if place in (t.number, t.repeats) and t.state == "finished"]
        return [self.drawn[self.env.trials[place], trial.options.seed] for trial in mine]

    def _figures(self, place: int, rows: Rows) -> Seeds:
        values = [self.of.values(self.env.trials[place], seed, -1) for seed in self._seeds(place)]
        return [rows.figures(one)[self.metric] for one in values]

    def _truth(self, place: int, claimed: Difference) -> float:
        """Of the configuration; of these very adapters if no more is claimed."""
        configuration = self.env.trials[place]
        if claimed.seeds > 1:
            return float(self.of.truth[configuration])
        return float(self.of.ends[configuration, self._seeds(place)].mean())
