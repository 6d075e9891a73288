"""What to try next: first what is known to do well, then what Optuna proposes from what was measured.

A proposal follows from the space, the seed and the trials so far alone, so a search that was killed and resumed
proposes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraloom.files.quiet import quiet
from loraloom.lora.initialize import seed_of
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.params import Categorical, Range
from loraloom.tuning.ranking import goodness
from loraloom.tuning.trial import Trial

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

JOURNAL_NAME = "study.log"
#: How often the sampler is asked again when it repeats a configuration; then the first that is left is taken.
_ASK_AGAIN = 50


def propose(
    options: TuneConfig,
    trials: Sequence[Trial],
    sampler: BaseSampler | None = None,
    favoured: int | None = None,
    by_rank: bool = True,
) -> dict[str, Any] | None:
    """The values of the next trial; None when the space has no other.

    Args:
        trials: those so far whose values lie in the space.
        sampler: the user's own.
        favoured: how many known good configurations come first; by default half of the trials.
        by_rank: the rates of these follow from their ranks; not in searches that began under 0.2 or before.
    """
    tried = [trial.values for trial in trials if trial.repeats is None]
    number = len(tried)
    if options.sampler == "grid" and sampler is None:
        return next((values for values in options.space.grid() if values not in tried), None)
    favoured = (options.trials + 1) // 2 if favoured is None else favoured
    for values in options.space.prior(favoured if options.sampler == "tpe" and sampler is None else 0, by_rank):
        if values not in tried:
            return values
    for attempt in range(_ASK_AGAIN):
        values = _ask(options, trials, sampler, seed_of("proposal", options.train.seed, number, attempt) % 2**32)
        if values not in tried:
            return values
    if options.space.size is None:
        return None
    return next((values for values in options.space.grid() if values not in tried), None)


def _ask(options: TuneConfig, trials: Sequence[Trial], sampler: BaseSampler | None, seed: int) -> dict[str, Any]:
    import optuna

    if sampler is None and options.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=max(4, options.trials // 4)
        )
    with quiet("optuna"):
        study = optuna.create_study(direction="maximize", sampler=sampler or optuna.samplers.RandomSampler(seed=seed))
        for trial in trials:
            if trial.repeats is None:
                study.add_trial(frozen(options, trial))
        found = study.ask(options.space.distributions()).params
    return {key: found[key] for key in options.space.params}


def frozen(options: TuneConfig, trial: Trial) -> FrozenTrial:
    """A trial as Optuna knows it; its values are how good they are, greater being better."""
    import optuna

    measured = {
        int(e["step"]): goodness(options.metric, e[options.metric])
        for e in trial.curve.evaluations
        if e.get(options.metric) is not None
    }
    states = optuna.trial.TrialState
    state = {"running": states.RUNNING, "finished": states.COMPLETE, "failed": states.FAIL}.get(
        trial.state, states.PRUNED
    )
    if not measured:  # a waiting trial that was never compared counts as running
        state = {"waiting": states.RUNNING, "finished": states.FAIL}.get(trial.state, state)
    return optuna.trial.create_trial(
        state=state,
        value=list(measured.values())[-1] if state is states.COMPLETE else None,
        params=dict(trial.values),
        distributions=_distributions(options, trial),
        intermediate_values=measured,
        user_attrs={"trial": trial.number, "parameters": trial.parameters, "reason": trial.reason},
    )


def _distributions(options: TuneConfig, trial: Trial) -> dict[str, Any]:
    """Hyperparameter → Optuna's distribution; a categorical one for a value that lies outside the space."""
    from optuna.distributions import CategoricalDistribution

    params = options.space.params
    own = {key: params[key].distribution() for key, value in trial.values.items() if _holds(params.get(key), value)}
    return {key: own.get(key) or CategoricalDistribution([value]) for key, value in trial.values.items()}


def _holds(param: Categorical | Range | None, value: Any) -> bool:
    return param is not None and param.holds(value)
