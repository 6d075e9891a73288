"""Which hyperparameters mattered, by PED-ANOVA (Watanabe et al. 2023), and whether by more than chance."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loraloom.files.quiet import quiet
from loraloom.messages import Message
from loraloom.tuning.diagnostics.inputs import FEW_STEPS
from loraloom.tuning.ranking import COMPARED, Comparison, same, varying
from loraloom.tuning.trial import Trial

#: PED-ANOVA asks what the best trials have in common; Optuna's documentation wants at least five of them.
BEST = 5
#: A hyperparameter mattered if at most ``SHUFFLES_ABOVE`` of ``SHUFFLES`` shuffles of the scores give it as much.
SHUFFLES, SHUFFLES_ABOVE = 39, 1
#: More distinct numbers than these are a range, not a list.
LISTED = 6


@dataclass(frozen=True)
class Importance:
    """``shares``: hyperparameter → its share in what the best trials have in common, largest first; they sum to 1.

    With few trials some hyperparameter gets a large share by chance. ``chance`` is what nearly all shuffles of the
    scores stay below. ``reason`` is why nothing is known.
    """

    shares: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    reason: Message | None = None

    @property
    def mattered(self) -> list[str]:
        """Those whose share is more than chance gives."""
        return [name for name, share in self.shares.items() if share > self.chance[name]]


def importances(trials: Iterable[Trial], comparison: Comparison, distributions: Mapping[str, Any]) -> Importance:
    """Which hyperparameters the best of the compared trials have in common."""
    compared = [trial for trial in trials if trial.number in comparison.values]
    names = varying(compared)
    goods = [comparison.good(trial.number) for trial in compared]
    if reason := _unknown(comparison, goods, names):
        return Importance(reason=reason)
    spaces = {name: _distribution(name, compared, distributions.get(name)) for name in names}
    raw = _pedanova(compared, goods, spaces)
    total = sum(raw.values())
    if not total > 0:
        return Importance(reason=Message("nothing_in_common"))
    shares = dict(sorted(((n, v / total) for n, v in raw.items()), key=lambda item: (-item[1], item[0])))
    draw = random.Random(0)
    shuffled = [_pedanova(compared, draw.sample(goods, len(goods)), spaces) for _ in range(SHUFFLES)]
    # The highest that all but ``SHUFFLES_ABOVE`` shuffles stay at or below.
    chance = {name: sorted(one[name] for one in shuffled)[-1 - SHUFFLES_ABOVE] / total for name in shares}
    return Importance(shares, chance)


def _unknown(comparison: Comparison, goods: Sequence[float], names: Sequence[str]) -> Message | None:
    if len(goods) < COMPARED:
        return Message("few_trials", trials=len(goods), needed=COMPARED)
    if comparison.steps < FEW_STEPS:
        return Message("few_steps", steps=comparison.steps, needed=FEW_STEPS)
    if not names:
        return Message("nothing_varied")
    return Message("all_equal", metric=comparison.metric) if len(set(goods)) == 1 else None


def _pedanova(trials: Sequence[Trial], goods: Sequence[float], spaces: Mapping[str, Any]) -> dict[str, float]:
    """Hyperparameter → the divergence between its values in the best trials and in all."""
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    categories = {n for n, kind in spaces.items() if isinstance(kind, optuna.distributions.CategoricalDistribution)}
    with quiet("optuna"):
        study = optuna.create_study(direction="maximize")
        for trial, good in zip(trials, goods, strict=True):
            held = {name: trial.values[name] for name in spaces if name in trial.values}
            study.add_trial(
                optuna.trial.create_trial(
                    value=good,
                    params={name: same(value) if name in categories else value for name, value in held.items()},
                    distributions={name: spaces[name] for name in held},
                )
            )
        evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, BEST / len(trials))))
        return get_param_importances(study, evaluator=evaluator, params=list(spaces), normalize=False)


def _distribution(name: str, trials: Iterable[Trial], given: Any) -> Any:
    """The given distribution if it holds every value; lists and words become categories."""
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
