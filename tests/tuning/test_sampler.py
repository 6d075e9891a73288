"""Promises of proposals: from the seed and the trials alone, no repeats, and a journal that Optuna can open."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import optuna
import pytest

from loraloom.config.train import TrainConfig
from loraloom.tuning.sampler import propose
from loraloom.tuning.trial import Trial
from tuning.proposing import BASE, SMALL, WIDE, all_proposals, options, trial


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_the_same_seed_and_trials_propose_the_same(sampler: str) -> None:
    given = options(SMALL if sampler == "grid" else WIDE, sampler=sampler)
    first = list(all_proposals(given, 12))
    assert len(first) == 12
    assert list(all_proposals(given, 12)) == first
    # And in the middle of it, as after a kill: what was proposed before this process does not matter.
    trials = [trial(i, values, good=values["lora.r"] / 16) for i, values in enumerate(first[:7])]
    assert propose(copy.deepcopy(given), copy.deepcopy(trials)) == first[7]


def test_another_seed_proposes_others() -> None:
    other = TrainConfig(**{**vars(BASE), "seed": 1})
    assert list(all_proposals(options(sampler="random"), 5)) != list(
        all_proposals(options(sampler="random", train=other), 5)
    )


def test_what_was_measured_leads_the_later_proposals() -> None:
    """Once the known ones are used up, TPE prefers what did well: here a high rank, there a low one."""

    def ranks(sign: int) -> list[int]:
        trials: list[Trial] = []
        given = options(trials=40)
        while len(trials) < 40:
            values = propose(given, trials)
            assert values is not None
            trials.append(trial(len(trials), values, good=0.5 + sign * values["lora.r"] / 100))
        return [t.values["lora.r"] for t in trials[20:]]

    assert sum(ranks(1)) > 1.2 * sum(ranks(-1))


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_a_small_space_is_used_up_without_repeats_and_then_there_is_none(sampler: str) -> None:
    given = options(SMALL, sampler=sampler)
    found = list(all_proposals(given, 99))
    whole = [dict(zip(SMALL, point)) for point in itertools.product(*SMALL.values())]
    key: Callable[[dict[str, Any]], str] = repr
    assert sorted(found, key=key) == sorted(whole, key=key)


def test_the_last_of_a_space_that_is_large_for_chance_is_found() -> None:
    space = {"lora.r": list(range(1, 301))}
    given = options(space, sampler="random")
    trials = [trial(i, {"lora.r": r}) for i, r in enumerate(r for r in range(1, 301) if r != 217)]
    assert propose(given, trials) == {"lora.r": 217}


def test_a_grid_goes_through_the_space_in_its_order() -> None:
    found = list(all_proposals(options(SMALL, sampler="grid"), 12))
    assert found == [dict(zip(SMALL, point)) for point in itertools.product(*SMALL.values())]


def test_what_is_known_comes_first_for_half_of_the_trials() -> None:
    given = options()
    found = list(all_proposals(given, 12))
    assert found[:6] == given.space.prior(6)
    assert found[6] != given.space.prior(7)[6]
    assert (found[0]["lora.r"], found[0]["lora.lora_alpha"]) == (16, "2r")


def test_further_seeds_are_no_configurations_of_their_own() -> None:
    given = options()
    first = list(all_proposals(given, 8))
    trials = [trial(i, values, good=values["lora.r"] / 16) for i, values in enumerate(first[:7])]
    repeats = [trial(7 + i, first[0], good=0.1, repeats=0) for i in range(3)]
    assert propose(given, [*trials, *repeats]) == first[7]


def test_the_samplers_of_optuna_can_be_given_and_are_used() -> None:
    given = options()

    class Fixed(optuna.samplers.RandomSampler):
        asked = 0

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            self.asked += 1
            if name == "train.learning_rate":
                return 1e-3 + 1e-6 * len(study.get_trials(deepcopy=False))
            return distribution.choices[1]

    sampler = Fixed(seed=1)
    found = list(all_proposals(given, 3, sampler))
    assert sampler.asked == 12
    assert [values["lora.r"] for values in found] == [8, 8, 8]
    assert [values["lora.lora_dropout"] for values in found] == [0.1, 0.1, 0.1]
    assert found[0]["train.learning_rate"] < found[1]["train.learning_rate"] < found[2]["train.learning_rate"]
