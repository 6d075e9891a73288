"""From trials to words: which configuration to use and why, what it was measured against, and what mattered.

The one-standard-error rule (Breiman et al. 1984, *Classification and Regression Trees*, 3.4.3) decides ties: among
configurations whose difference from the best is smaller than the standard error of that difference, the one with the
fewest parameters wins.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraloom.errors import TrainingError
from loraloom.files.jsonio import plain
from loraloom.files.quiet import quiet
from loraloom.inference.jackknife import error
from loraloom.tune.advice import advise
from loraloom.tune.bar import Bar, Gain, gain, learned
from loraloom.tune.diagnostics.inputs import FEW_STEPS, Advice, DiagnosticInputs
from loraloom.tune.diagnostics.nothing_learned import nothing
from loraloom.tune.ranking import (
    COMPARED,
    Comparison,
    Score,
    compare,
    goodness,
    originals,
    ranking,
    same,
    scores,
    varying,
)
from loraloom.tune.trial import Trial

#: PED-ANOVA asks what the best trials have in common; Optuna's documentation wants at least five of them.
IMPORTANCE_BEST = 5
#: Of this many shuffles of the scores, at most so many may give a hyperparameter the same importance: one in twenty.
SHUFFLES, SHUFFLES_ABOVE = 39, 1
#: More distinct numbers than these are a range, not a list.
LISTED = 6


@dataclass(frozen=True)
class Verdict:
    """What a search came to. Numbers in ``scores``, ``pareto`` and texts are those of each configuration's first trial.

    ``why`` says in one sentence what decided; ``notes`` say what to keep in mind about how it was measured.
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
    advice: list[Advice]
    why: str = ""
    notes: list[str] = field(default_factory=list)
    importance_reason: str = ""
    #: hyperparameters whose importance is more than chance would give
    mattered: list[str] = field(default_factory=list)
    #: all configurations, best first
    ranking: list[int] = field(default_factory=list)
    #: False: nothing was learned, so none is recommended, and ``best`` is only the first of the ranking
    learned: bool = True
    #: how far ``best`` lies above what it has to beat, where that was measured
    gain: Gain | None = None
    trials: Sequence[Trial] = ()

    @property
    def params(self) -> list[str]:
        """Those that were searched over."""
        return varying(self.trials) or list(self.best.values)

    def trial(self, number: int) -> Trial:
        return next(trial for trial in self.trials if trial.number == number)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; what is not finite is null."""
        found: dict[str, Any] = plain(
            {
                "metric": self.metric,
                "best": self.best.number,
                "runner_up": self.runner_up.number if self.runner_up else None,
                "scores": {str(number): asdict(score) for number, score in self.scores.items()},
                "tie": self.tie,
                "why": self.why,
                "notes": self.notes,
                "pareto": self.pareto,
                "importance": self.importance,
                "importance_reason": self.importance_reason,
                "mattered": self.mattered,
                "advice": [asdict(advice) for advice in self.advice],
                "ranking": self.ranking,
                "learned": self.learned,
                "to_beat": None if self.gain is None else asdict(self.gain),
            }
        )
        return found


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
    known = scores(trials, metric)
    ranked = ranking(trials, metric, known)
    pool, notes = _candidates(ranked, known)
    by_number = {trial.number: trial for trial in trials}
    if not pool:
        reasons = sorted({trial.reason for trial in trials if trial.reason})
        raise TrainingError(
            f"none of {len(trials)} trials has a finite {metric} to compare{': ' if reasons else ''}"
            f"{'; '.join(reasons[:3])}. Lower the learning rates of the space, or let trials run to their first "
            "evaluation"
        )
    groups = originals(trials)
    pool = [n for n in pool if n not in lost] or pool
    ended = {n: [trial for trial in group if trial.state == "finished"] for n, group in groups.items()}
    able = pool if bar is None else [n for n in pool if learned(bar, ended[n], metric, len(groups))]
    pool = able or pool
    number, why = _choose(pool, known, by_number, metric)
    rest = [other for other in pool if other != number]
    runner_up = rest[0] if rest else None
    tie = runner_up is not None and _tied(known[number], known[runner_up])
    ranked = [number, *(other for other in ranked if other != number)]
    level = [n for n in ranked if known[n].values and known[n].finished == known[number].finished]
    if not known[number].finished:
        level = [n for n in level if known[n].share >= known[number].share - 1e-9]
    comparison = compare(trials, metric)
    importance, mattered, reason = importances(trials, comparison, distributions or {})
    best = by_number[number]
    evidence = DiagnosticInputs(
        best=best,
        trials=[group[0] for group in groups.values()],
        comparison=comparison,
        importance=importance,
        mattered=mattered,
        edges=edges(best.values),
        order=order or {},
    )
    return Verdict(
        metric=metric,
        best=best,
        runner_up=by_number[runner_up] if runner_up is not None else None,
        scores=known,
        tie=tie,
        pareto=pareto({n: (by_number[n].parameters, goodness(metric, known[n].mean)) for n in level}),
        importance=importance,
        advice=advise(evidence) if able or bar is None else nothing(evidence.trials, best, bar, metric),
        why=why,
        notes=notes,
        importance_reason=reason,
        mattered=mattered,
        ranking=ranked,
        learned=bool(able),
        gain=None if bar is None else gain(bar, ended[number], metric, len(groups)),
        trials=list(trials),
    )


def _candidates(ranked: Sequence[int], known: Mapping[int, Score]) -> tuple[list[int], list[str]]:
    """Those that may win, by the metric, and what to say about it."""
    pool = [n for n in ranked if known[n].finished and not known[n].failed]
    pool = pool or [n for n in ranked if known[n].finished]
    notes = []
    if not pool:
        pool = [n for n in ranked if known[n].values]
        furthest = max((known[n].share for n in pool), default=0.0)
        pool = [n for n in pool if known[n].share >= furthest - 1e-9]
        if pool:
            notes.append(
                f"no trial finished: compared are the {len(pool)} that came furthest, {furthest:.0%} of the way"
            )
    repeated = [n for n in pool if len(known[n].values) > 1]
    if len(repeated) > 1:
        pool = repeated
    if pool and all(score.noise is None for score in known.values()):
        notes.append("each configuration was trained with one seed: how much of a difference is noise is not known")
    return pool, notes


def _choose(
    pool: Sequence[int], known: Mapping[int, Score], by_number: Mapping[int, Trial], metric: str
) -> tuple[int, str]:
    """The winner, and why it is."""
    top = pool[0]
    if len(pool) == 1:
        return top, "the only one that could be compared"
    tied = [n for n in pool if _tied(known[top], known[n])]
    # Nobody wins by a tie who was trained once where the top was trained several times, or whose noise is all its own.
    measured_as_well = [n for n in tied if len(known[n].values) >= min(2, len(known[top].values))]
    tied = [n for n in tied if n == top or (n in measured_as_well and not known[n].unstable)]
    winner = min(tied, key=lambda n: (by_number[n].parameters, -goodness(metric, known[n].mean), n))
    if winner != top:
        gap, noise = abs(known[top].mean - known[winner].mean), difference(known[top], known[winner])
        return winner, (
            f"trials {top} and {winner} differ by {gap:.3g} in {metric}"
            + (f", less than the noise of {noise:.3g}" if noise else "")
            + f": a tie, so the cheaper one wins, with {by_number[winner].parameters:,} parameters against "
            f"{by_number[top].parameters:,}"
        )
    others = f" of {len(tied)} that are tied within the noise, and the cheapest of them" if len(tied) > 1 else ""
    return winner, f"the best {metric}{others}"


def difference(one: Score, other: Score) -> float:
    """The standard error of the difference of two means; 0 where the noise is not known."""
    return math.hypot(one.noise or 0.0, other.noise or 0.0)


def _tied(one: Score, other: Score) -> bool:
    return abs(one.mean - other.mean) <= difference(one, other)


def pareto(points: Mapping[int, tuple[int, float]]) -> list[int]:
    """Of number → (parameters, goodness), those that no other beats in one without losing in the other."""
    front = [
        n
        for n, (size, good) in points.items()
        if not any(s <= size and g >= good and (s < size or g > good) for s, g in points.values())
    ]
    return sorted(front, key=lambda n: (points[n][0], n))


def importances(
    trials: Iterable[Trial], comparison: Comparison, distributions: Mapping[str, Any]
) -> tuple[dict[str, float], list[str], str]:
    """Hyperparameter → its share in what the best trials have in common (PED-ANOVA, Watanabe et al. 2023); or why none.

    Shares always sum to 1, so with few trials some hyperparameter gets a large one by chance. The second part of the
    answer are those whose importance is greater than nearly all that the same trials give with shuffled scores.
    """
    compared = [trial for trial in trials if trial.number in comparison.values]
    names = varying(compared)
    if len(compared) < COMPARED:
        few = f"{len(compared)} trials can be compared; {COMPARED} are needed to say which hyperparameter mattered"
        return {}, [], few
    if comparison.steps < FEW_STEPS:
        return (
            {},
            [],
            f"{comparison.steps} steps are too few to say which hyperparameter mattered; {FEW_STEPS} are needed",
        )
    if not names:
        return {}, [], "no hyperparameter had more than one value"
    goods = [comparison.good(trial.number) for trial in compared]
    if len(set(goods)) == 1:
        return {}, [], f"all trials have the same {comparison.metric}"
    spaces = {name: _distribution(name, compared, distributions.get(name)) for name in names}
    raw = _pedanova(compared, goods, spaces)
    total = sum(raw.values())
    if not total > 0:
        return {}, [], "the best trials have nothing in common that the others lack"
    shares = dict(sorted(((n, v / total) for n, v in raw.items()), key=lambda item: (-item[1], item[0])))
    draw = random.Random(0)
    shuffled = [_pedanova(compared, draw.sample(goods, len(goods)), spaces) for _ in range(SHUFFLES)]
    mattered = [name for name in shares if sum(other[name] >= raw[name] for other in shuffled) <= SHUFFLES_ABOVE]
    return shares, mattered, ""


def _pedanova(trials: Sequence[Trial], goods: Sequence[float], spaces: Mapping[str, Any]) -> dict[str, float]:
    """Knob → the divergence between its values in the best trials and in all."""
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    with quiet("optuna"):
        study = optuna.create_study(direction="maximize")
        for trial, good in zip(trials, goods, strict=True):
            held = {name: trial.values[name] for name in spaces if name in trial.values}
            words = {name for name in held if isinstance(spaces[name], optuna.distributions.CategoricalDistribution)}
            study.add_trial(
                optuna.trial.create_trial(
                    value=good,
                    params={name: same(value) if name in words else value for name, value in held.items()},
                    distributions={name: spaces[name] for name in held},
                )
            )
        evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, IMPORTANCE_BEST / len(trials))))
        return get_param_importances(study, evaluator=evaluator, params=list(spaces), normalize=False)


def _distribution(name: str, trials: Iterable[Trial], given: Any) -> Any:
    """The given distribution where it holds every value; lists and words become categories."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    values = [trial.values[name] for trial in trials if name in trial.values]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if given is not None and not isinstance(given, CategoricalDistribution) and len(numbers) == len(values):
        if all(given.low <= v <= given.high for v in numbers):
            return given
    elif given is None and len(numbers) == len(values) and len(set(numbers)) > LISTED:
        low, high = min(numbers), max(numbers)
        return FloatDistribution(low, high, log=low > 0 and high / low >= 10)
    return CategoricalDistribution(sorted({same(v) for v in values}))


def record(
    found: Verdict,
    trials: Sequence[Trial],
    *,
    adapter: str | Path,
    seconds: float,
    machine: Mapping[str, Any],
    usage: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``result.json`` holds: plain JSON, the same for the same trials apart from the seconds and the machine."""
    best = found.scores[found.best.number]
    winner = {
        "config": found.best.values,
        "metric": best.mean,
        "adapter": str(adapter),
        "metric_name": found.metric,
        "number": found.best.number,
        "noise": best.noise,
        "seeds": best.values,
        "tie": found.tie,
        "why": found.why,
        "runner_up": found.runner_up.number if found.runner_up else None,
        "notes": found.notes,
        "unadapted_experts": found.best.unadapted or None,
        "options": found.best.options.to_dict(),
    }
    built: dict[str, Any] = plain(
        {
            "learned": found.learned,
            "best": winner if found.learned else None,
            "to_beat": None if found.gain is None else asdict(found.gain),
            "trials": [_trial(trial, found) for trial in sorted(trials, key=lambda trial: trial.number)],
            "pareto": found.pareto,
            "importance": found.importance,
            "advice": [asdict(advice) for advice in found.advice],
            "seconds": seconds,
            "machine": machine,
            "usage": usage or {},
        }
    )
    return built


def _trial(trial: Trial, found: Verdict) -> dict[str, Any]:
    score = found.scores.get(trial.number)  # of a further seed: that of its first trial holds it
    return {
        "number": trial.number,
        "config": trial.values,
        "state": trial.state,
        "curve": asdict(trial.curve),
        "metric": trial.curve.evaluations[-1].get(found.metric) if trial.curve.evaluations else None,
        "noise": score.noise if score else None,
        "seconds": trial.seconds,
        "steps": trial.step,
        "of_steps": trial.steps,
        "seed": trial.options.seed,
        "repeats": trial.repeats,
        "parameters": trial.parameters,
        "bytes": trial.bytes,
        "reason": trial.reason,
        "used": {name: list(figures) for name, figures in sorted(trial.used.items())},
        "error": {name: error(values) for name, values in trial.parts.items()},
    }
