"""The verdict on a search: which configuration to use, what decided, what mattered, and what to try next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraloom.errors import TrainingError
from loraloom.messages import Message
from loraloom.tuning.bar import Bar, Gain, gain
from loraloom.tuning.diagnostics import advise
from loraloom.tuning.diagnostics.inputs import DiagnosticInputs
from loraloom.tuning.diagnostics.nothing_learned import nothing
from loraloom.tuning.final_test import FinalTest
from loraloom.tuning.importance import importances
from loraloom.tuning.ranking import Score, compare, goodness, originals, varying
from loraloom.tuning.selection import finished, pareto, select, tied
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
    #: how far ``best`` lies above what it has to beat, if that was measured
    gain: Gain | None = None
    #: configurations that finished and learned something
    able: list[int] = field(default_factory=list)
    #: ``best`` on rows that chose nothing, if there are such
    test: FinalTest | None = None
    #: ``best`` at lower ranks and other scales, if it finished
    cuts: Cuts | None = None
    #: held-out rows that chose; 0 if that is not known
    rows: int = 0
    trials: Sequence[Trial] = ()

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
) -> Verdict:
    """Judge ``trials`` by ``metric`` on the held-out rows.

    Args:
        edges: a configuration's values → hyperparameter → "low" or "high" for those at an edge of the space that could
            lie further out.
        distributions: hyperparameter → Optuna's distribution that its values were drawn from; guessed by default.
        order: hyperparameter → its values from low to high, for those whose values are ordered but no numbers.
        bar: what a configuration has to beat to be recommended; without it any may be.
        lost: configurations whose adapters are missing or damaged: others are recommended in their place.

    Raises:
        TrainingError: no trial has a finite value of ``metric``.
    """
    selected = select(trials, metric, bar, lost)
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
    return Verdict(
        metric=metric,
        best=best,
        runner_up=None if second is None else by_number[second],
        scores=known,
        tie=second is not None and tied(known[number], known[second]),
        pareto=pareto({n: (parameters[n], goodness(metric, known[n].mean)) for n in _level(known, number)}),
        importance=importance,
        advice=advise(evidence) if selected.able or bar is None else nothing(firsts, best, bar, metric),
        why=selected.why,
        notes=selected.notes,
        importance_reason=mattering.reason,
        mattered=mattered,
        chance=mattering.chance,
        ranking=[number, *(other for other in selected.ranked if other != number)],
        learned=bool(selected.able),
        able=[n for n in selected.able if known[n].finished],
        gain=None if bar is None else gain(bar, finished(groups[number]), metric, len(groups)),
        rows=0 if bar is None else bar.rows,
        trials=list(trials),
    )


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
