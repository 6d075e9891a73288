"""What a search may do with its trials: each strategy trains and measures on an ``Env`` and ranks what it trained.

The rules that others use are run by their own code (Optuna's samplers and pruners), or written down from their source
(Ray Tune's asynchronous halving). An empty ranking stands for "nothing was learned".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from environment import BATCH, FORWARD, Env, baseline

from loraloom.files.quiet import quiet
from loraloom.inference.jackknife import error
from loraloom.tuning.asha import SuccessiveHalving, taken_off, window
from loraloom.tuning.bar import Bar, needed
from loraloom.tuning.race import Race
from loraloom.tuning.rungs import Standing

#: Where the others measure: a ninth, two ninths, a third, a half, two thirds and the end; more often costs more.
REPORTS = (2, 3, 4, 5, 6, 8)
#: Trials that finished, best first.
Strategy = Callable[[Env, np.random.Generator], list[int]]


def ranked(env: Env, trials: Iterable[int]) -> list[int]:
    """Measured at their end: by goodness; of equals the one with the lower loss."""
    seen = {trial: env.measure(trial) for trial in trials}
    return sorted(seen, key=lambda one: (-seen[one][1][0], seen[one][0][0], one))


def everything(env: Env, source: np.random.Generator) -> list[int]:
    """All trials to their end."""
    for trial in range(len(env.trials)):
        env.train(trial, len(env.points) - 1)
    return ranked(env, range(len(env.trials)))


def optuna_(sampler: str, pruner: str) -> Strategy:
    """Optuna's own samplers and pruners: one trial after another, measured at each point."""

    def strategy(env: Env, source: np.random.Generator) -> list[int]:
        import optuna

        number = int(source.integers(2**31))
        last = len(env.points) - 1
        samplers = {
            "random": lambda: optuna.samplers.RandomSampler(seed=number),
            "tpe": lambda: optuna.samplers.TPESampler(seed=number, multivariate=True),
        }
        pruners: dict[str, Any] = {
            "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
            "asha4": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=4),
            "hyperband": lambda: optuna.pruners.HyperbandPruner(1, len(REPORTS), reduction_factor=2),
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
        }
        left, found = list(range(len(env.trials))), dict[int, float]()
        places = {trial: position(env.config(trial)["values"]) for trial in left}
        with quiet("optuna"):
            study = optuna.create_study(direction="maximize", sampler=samplers[sampler](), pruner=pruners[pruner]())
            while left:
                asked = study.ask()
                wanted = suggest(asked, env)
                chosen = min(left, key=lambda one: (sum((places[one][key] - wanted[key]) ** 2 for key in wanted), one))
                left.remove(chosen)
                for step, point in enumerate(REPORTS, 1):
                    env.train(chosen, point)
                    value = env.measure(chosen)[1][0]
                    asked.report(value, step)
                    found[chosen] = value
                    if point < last and asked.should_prune():
                        study.tell(asked, state=optuna.trial.TrialState.PRUNED)
                        del found[chosen]
                        break
                else:
                    study.tell(asked, value)
        return best_first(found)

    return strategy


def best_first(found: dict[int, float]) -> list[int]:
    return sorted(found, key=lambda one: (-found[one], one))


_ALPHAS = {"r": 0.0, "2r": 0.5, "4r": 1.0}
_TARGETS = {"q-v": 0.0, "attention": 0.5, "all-linear": 1.0}


def position(values: dict[str, Any]) -> dict[str, float]:
    """A configuration as numbers of like size."""
    return {
        "r": math.log2(values["lora.r"]) / 5,
        "alpha": _ALPHAS[values["lora.lora_alpha"]],
        "targets": _TARGETS[values["lora.target_modules"]],
        "dropout": 0.5 * (values["lora.lora_dropout"] > 0),
        "rate": math.log(values["train.learning_rate"] / 1e-3),
    }


def suggest(asked: Any, env: Env) -> dict[str, float]:
    configs = [one["values"] for one in env.table.meta["configurations"]]
    rates = [one["train.learning_rate"] for one in configs]
    return position(
        {
            "lora.r": asked.suggest_categorical("r", sorted({one["lora.r"] for one in configs})),
            "lora.lora_alpha": asked.suggest_categorical("alpha", sorted(_ALPHAS)),
            "lora.target_modules": asked.suggest_categorical("targets", sorted(_TARGETS)),
            "lora.lora_dropout": asked.suggest_categorical("dropout", [0.0, 0.1]),
            "train.learning_rate": asked.suggest_float("rate", min(rates), max(rates), log=True),
        }
    )


def ray_asha(env: Env, source: np.random.Generator) -> list[int]:
    """Ray Tune's ASHA, reduction 4, one bracket: at a rung a trial stops below the best quarter of those seen there."""
    last, seen = len(env.points) - 1, dict[int, list[float]]()
    found = {}
    for trial in range(len(env.trials)):
        for point in (2, 5, last):
            env.train(trial, point)
            value = env.measure(trial)[1][0]
            rung = seen.setdefault(point, [])
            stop = point < last and bool(rung) and value < np.quantile(rung, 1 - 1 / 4)
            rung.append(value)
            if stop:
                break
        else:
            found[trial] = value
    return best_first(found)


def starting_loss(env: Env, trial: int) -> float:
    """What a trial has to leave behind: the best constant answer's loss, or its own first losses."""
    constant = env.table.meta["constant"]
    return float(constant["loss"] if constant else np.mean(env.losses(trial)[:4]))


def off(env: Env, trial: int) -> bool:
    return taken_off(env.losses(trial).tolist(), starting_loss(env, trial), env.steps)


def today(env: Env, source: np.random.Generator) -> list[int]:
    """The rule of version 0.2: gated halving at a ninth, two ninths, a third, a half and two thirds."""
    rungs = [2, 3, 4, 5, 6]
    halving = SuccessiveHalving(len(rungs), 2, least=3)
    here = list(range(len(env.trials)))
    for point in rungs:
        for trial in here:
            env.train(trial, point)
        flown = {trial: off(env, trial) for trial in here}
        if len(here) <= halving.quota(len(here)) or not any(flown.values()):
            halving.pass_all(here)
            continue
        seen = {trial: env.measure(trial) for trial in here}
        here = halving.decide({one: Standing(flown[one], *figures) for one, figures in seen.items()}).promoted
    for trial in here:
        env.train(trial, len(env.points) - 1)
    return ranked(env, here)


#: Points of the table at which the rungs of a search lie by default.
RUNGS = (2, 3, 4, 5, 6)


def raced(env: Env, source: np.random.Generator) -> list[int]:
    """loraloom's rule, by its own class; what a search does around it is in ``loraloom.tuning.promotion``."""
    count, last, unit = len(env.trials), len(env.points) - 1, env.full_cost / len(env.trials)
    race = Race(len(RUNGS), 2, 3, shares=[env.shares[point] for point in RUNGS])
    here, past = list(range(count)), list[dict[int, Standing]]()

    def left() -> float:
        return race.budget * count - env.steps_paid / unit

    for point in RUNGS:
        for trial in here:
            env.train(trial, point)
        here = [trial for trial in here if np.isfinite(env.losses(trial)).all()]
        past.append({})
        if len(here) <= race.quota(len(here), len(here)) or not one_is_off(env, here):
            race.pass_all(here)
            continue
        past[-1] = {trial: standing(env, trial) for trial in here}
        if len(here) <= race.quota(len(here), sum(one.off for one in past[-1].values())):
            race.pass_all(here)
            continue
        while more := race.ask(past[-1], len(env.rows)):
            past[-1] |= {trial: standing(env, trial, rows) for trial, rows in more.items()}
        here = race.decide(past[-1], left()).promoted
    for trial in here:
        env.train(trial, last)
    while not any(learned(env, trial) for trial in here) and (more := race.resume(range(count))):
        for trial in more:
            env.train(trial, last)
        here += more
    if not any(learned(env, trial) for trial in here):
        return []
    ends = {trial: standing(env, trial) for trial in here}
    if (back := race.look_back(past, ends, left())) is not None:
        for trial in back.resumed:
            env.train(trial, last)
        here += back.resumed
    env.steps_paid -= len(ends) * FORWARD * len(env.rows) / BATCH  # measured again, to rank them
    return ranked(env, here)


def one_is_off(env: Env, trials: Sequence[int]) -> bool:
    """By the training losses, or else by the held-out loss of the one whose training loss is the lowest."""
    if env.table.hit is not None or any(off(env, trial) for trial in trials):
        return any(off(env, trial) for trial in trials)
    paid, count = env.steps_paid, window(env.steps)
    leader = min(trials, key=lambda trial: (env.losses(trial)[-count:].mean(), trial))
    found = standing(env, leader).off
    if found:
        env.steps_paid = paid  # it is measured with the others
    return found


def standing(env: Env, trial: int, rows: int | None = None) -> Standing:
    loss, good = env.measure(trial, rows=rows)
    losses = env.losses(trial)
    count = min(window(env.steps), len(losses) // 2)
    fall = float(losses[-2 * count : -count].mean() - losses[-count:].mean()) * env.steps / count
    rows = rows or len(env.rows)
    flown = off(env, trial)
    if env.table.hit is None and not flown:
        frozen = Bar(len(env.rows), answers={"frozen": {"loss": untrained(env, trial)[0]}})
        flown = frozen.is_beaten(loss, rows)
    return Standing(flown, loss, good, rows, env.config(trial)["parameters"], fall)


def untrained(env: Env, trial: int) -> tuple[list[float], list[float]]:
    """What a trial's figures were before its first step, at no price."""
    paid, last = env.steps_paid, env.at[trial, 0]
    env.at[trial, 0] = 0
    found = env.measure(trial)
    env.steps_paid, env.at[trial, 0] = paid, last
    return found


def learned(env: Env, trial: int) -> bool:
    """Whether a finished trial is surely better than the best constant answer, or than an untrained adapter."""
    paid = env.steps_paid
    _, good = env.measure(trial)
    env.steps_paid = paid  # it was measured when it finished
    start = untrained(env, trial)[1] if env.table.hit is None else [baseline(env.table)] * len(good)
    above = [one - other for one, other in zip(good, start, strict=True)]
    return above[0] > needed(len(above) - 1, len(env.trials)) * error(above)


STRATEGIES: dict[str, Strategy] = {
    "all in full": everything,
    "random + Optuna's halving": optuna_("random", "asha"),
    "random + Optuna's halving by 4": optuna_("random", "asha4"),
    "random + Optuna's Hyperband": optuna_("random", "hyperband"),
    "TPE + Optuna's halving": optuna_("tpe", "asha"),
    "TPE + Optuna's Hyperband": optuna_("tpe", "hyperband"),
    "TPE + Optuna's median": optuna_("tpe", "median"),
    "Ray Tune's ASHA": ray_asha,
    "loraloom 0.2": today,
    "loraloom": raced,
}
