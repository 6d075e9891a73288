"""The verdict on a search: which configuration to use, what decided, what mattered, and what to try next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraloom.errors import TrainingError
from loraloom.inference.intervals import Interval, SeedNoise
from loraloom.messages import Message
from loraloom.tuning.bar import Bar, Gain, gain
from loraloom.tuning.diagnostics import advise
from loraloom.tuning.diagnostics.inputs import DiagnosticInputs
from loraloom.tuning.diagnostics.nothing_learned import no_better_than_head, nothing
from loraloom.tuning.final_test import FinalTest
from loraloom.tuning.importance import importances
from loraloom.tuning.judge import Against, Judge
from loraloom.tuning.ranking import Score, compare, goodness, originals, varying
from loraloom.tuning.selection import Balance, Selection, finished, front, pareto, rows_trained, select, tied
from loraloom.tuning.smaller import Cuts
from loraloom.tuning.trial import Trial


@dataclass(frozen=True)
class Verdict:
    """What a search came to. Numbers of trials are those of each configuration's first trial.

    ``why`` is what decided; ``notes`` are what to keep in mind about how it was measured.
    """

    metric: str
    best: Trial
    runner_up: Trial | None
    scores: dict[int, Score]
    #: best and runner-up differ by less than the noise
    tie: bool
    #: configurations that no other beats in both the metric and the adapter's parameters, smallest first
    pareto: list[int]
    #: those that no other beats in the metric, the rows that training reads and the parameters together, best first
    front: list[int]
    #: hyperparameter → share of 1, largest first; empty with ``importance_reason``
    importance: dict[str, float]
    advice: list[Message]
    why: Message
    notes: list[Message] = field(default_factory=list)
    importance_reason: Message | None = None
    #: hyperparameters whose importance is more than chance would give
    mattered: list[str] = field(default_factory=list)
    #: hyperparameter → the importance that chance gives it
    chance: dict[str, float] = field(default_factory=dict)
    #: all configurations, best first
    ranking: list[int] = field(default_factory=list)
    #: False: nothing was learned, so none is recommended, and ``best`` is only the first of the ranking
    learned: bool = True
    #: False: ``best`` is not shown to be better than a new head on the frozen model
    above_head: bool = True
    #: how far ``best`` lies above what it has to beat, if that was measured
    gain: Gain | None = None
    #: ``best`` on the ``rows`` held-out rows that chose it, and beside the runner-up and the baselines, hardest first
    rows: int = 0
    figure: Interval | None = None
    against: list[Against] = field(default_factory=list)
    #: configurations that finished and learned something
    able: list[int] = field(default_factory=list)
    #: of one seed, in the metric; None where no configuration has two
    noise: SeedNoise | None = None
    #: ``best`` on rows that chose nothing, if there are such
    test: FinalTest | None = None
    #: ``best`` at lower ranks and other scales, if it finished
    cuts: Cuts | None = None
    trials: Sequence[Trial] = ()

    @property
    def recommended(self) -> bool:
        """Whether to use ``best``: it learned something, and more than a new head does."""
        return self.learned and self.above_head

    @property
    def params(self) -> list[str]:
        """The hyperparameters that were searched over."""
        return varying(self.trials) or list(self.best.values)

    def trial(self, number: int) -> Trial:
        return next(trial for trial in self.trials if trial.number == number)


def verdict(
    trials: Sequence[Trial],
    metric: str,
    *,
    edges: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda values: {},
    distributions: Mapping[str, Any] | None = None,
    order: Mapping[str, Sequence[Any]] | None = None,
    bar: Bar | None = None,
    lost: Collection[int] = (),
    judge: Judge | None = None,
    balance: Balance | None = None,
) -> Verdict:
    """Judge ``trials`` by ``metric`` on the held-out rows.

    Args:
        edges: a configuration's values → hyperparameter → "low" or "high" for those at an edge of the space that could
            lie further out.
        distributions: hyperparameter → Optuna's distribution that its values were drawn from; guessed by default.
        order: hyperparameter → its values from low to high, for those whose values are ordered but no numbers.
        bar: what a configuration has to beat to be recommended; without it any may be.
        lost: configurations whose adapters are missing or damaged: others are recommended in their place.
        judge: of the held-out rows, for intervals; without it there are none.
        balance: what is wanted beside quality.

    Raises:
        TrainingError: no trial has a finite value of ``metric``.
    """
    selected = select(trials, metric, bar, lost, judge, balance)
    if selected is None:
        raise _nothing_measured(trials, metric)
    known, number, second = selected.scores, selected.winner, selected.runner_up
    groups, by_number = originals(trials), {trial.number: trial for trial in trials}
    best, parameters = by_number[number], {n: by_number[n].parameters for n in groups}
    comparison = compare(trials, metric)
    mattering = importances(trials, comparison, distributions or {})
    importance, mattered = mattering.shares, mattering.mattered
    firsts = [group[0] for group in groups.values()]
    evidence = DiagnosticInputs(best, firsts, comparison, importance, mattered, edges(best.values), order or {})
    level = _level(known, number)
    rows, figure, against = _judged(selected, bar)
    return Verdict(
        metric=metric,
        best=best,
        runner_up=None if second is None else by_number[second],
        scores=known,
        tie=second is not None and tied(known[number], known[second]),
        pareto=pareto({n: (parameters[n], goodness(metric, known[n].mean)) for n in level}),
        front=front({n: (-goodness(metric, known[n].mean), rows_trained(by_number[n]), parameters[n]) for n in level}),
        importance=importance,
        advice=_advice(selected, evidence, bar, against),
        why=selected.why,
        notes=selected.notes,
        importance_reason=mattering.reason,
        mattered=mattered,
        chance=mattering.chance,
        ranking=[number, *(other for other in selected.ranked if other != number)],
        learned=bool(selected.able),
        above_head=selected.above_head,
        rows=rows,
        figure=figure,
        against=against,
        able=[n for n in selected.able if known[n].finished],
        noise=selected.noise,
        gain=None if bar is None else gain(bar, finished(groups[number]), metric, len(groups)),
        trials=list(trials),
    )


def _judged(selected: Selection, bar: Bar | None) -> tuple[int, Interval | None, list[Against]]:
    """The rows that chose, the winner's figure on them, and how it compares with the runner-up and the baselines."""
    judge, mine = selected.judge, selected.seeds.get(selected.winner)
    rows = judge.rows if judge is not None else bar.rows if bar is not None else 0
    if judge is None or not mine:
        return rows, None, []
    second = selected.runner_up
    others = {} if second is None else {second: selected.seeds[second]}
    answers = [] if bar is None else bar.baselines(judge.metric)
    return rows, judge.figure(mine), judge.against(mine, others, answers)


def _advice(
    selected: Selection, evidence: DiagnosticInputs, bar: Bar | None, against: Sequence[Against]
) -> list[Message]:
    metric = evidence.comparison.metric
    if bar is None or (selected.able and selected.above_head):
        return advise(evidence)
    if not selected.able:
        return nothing(evidence.trials, evidence.best, bar, metric)
    return [*no_better_than_head(evidence.trials, against, metric), *advise(evidence)]


def _level(known: Mapping[int, Score], best: int) -> list[int]:
    """The configurations that were measured at the same point of their training as ``best``, or later."""
    level = [n for n, score in known.items() if score.values and score.finished == known[best].finished]
    if known[best].finished:
        return level
    return [n for n in level if known[n].share >= known[best].share - 1e-9]


def _nothing_measured(trials: Sequence[Trial], metric: str) -> TrainingError:
    reasons = sorted({trial.reason for trial in trials if trial.reason})
    return TrainingError(
        f"none of {len(trials)} trials has a finite {metric} to compare{': ' if reasons else ''}"
        f"{'; '.join(reasons[:3])}. Lower the learning rates of the space, or let trials run to their first evaluation"
    )
