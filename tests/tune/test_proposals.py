"""Promises of proposals: from the seed and the trials alone, no repeats, and a journal that Optuna can open."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from loraloom.train.settings.options import TrainOptions
from loraloom.train.slot import Curve
from loraloom.tune.options import TuneOptions
from loraloom.tune.proposals import JOURNAL_NAME, keep, propose
from loraloom.tune.space import Space
from loraloom.tune.trial import Trial

BASE = TrainOptions(model="m", data="d.csv", task="seq-cls", output="o", max_steps=30)
SMALL = {"lora.r": [4, 8, 16], "lora.lora_alpha": ["r", "2r"], "lora.lora_dropout": [0.0, 0.1]}
WIDE = {**SMALL, "train.learning_rate": {"log": [1e-4, 1e-2]}}


def options(space: Mapping[str, Any] = WIDE, **changes: Any) -> TuneOptions:
    train = changes.pop("train", BASE)
    return TuneOptions(**{"train": train, "space": Space.parse(space, train), "trials": 12, "finalists": 2, **changes})


def trial(number: int, values: Mapping[str, Any], state: str = "finished", good: float = 0.5, **more: Any) -> Trial:
    curve = Curve([1.0] * 30, [1e-3] * 30, [{"step": 10, "loss": 1.0, "accuracy": good}])
    return Trial(number, dict(values), BASE, 30, 30, state, curve=curve, **more)


def all_proposals(given: TuneOptions, count: int, sampler: Any = None) -> Iterator[dict[str, Any]]:
    """One after another, each measured: the higher the rank, the better."""
    trials: list[Trial] = []
    while len(trials) < count and (values := propose(given, trials, sampler)) is not None:
        yield values
        trials.append(trial(len(trials), values, good=values["lora.r"] / 16))


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
    other = TrainOptions(**{**vars(BASE), "seed": 1})
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


# -- Optuna's journal -------------------------------------------------------------------------------------------------


def opened(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """As optuna-dashboard opens it."""
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL_NAME)))
    return optuna.load_study(study_name="loraloom", storage=storage).trials


def ended(given: TuneOptions) -> list[Trial]:
    points = list(all_proposals(given, 5))
    failed = trial(2, points[2], "failed", math.nan, reason="step 3: the loss is nan")
    return [
        trial(0, points[0], good=0.75, parameters=77),
        trial(1, points[1], "stopped", 0.25),
        failed,
        trial(3, points[3], "running"),
        trial(4, points[4], "waiting"),
        trial(5, points[0], good=0.5, repeats=0),
    ]


def test_the_journal_holds_every_trial_that_ended_once_and_optuna_opens_it(tmp_path: Path) -> None:
    given = options()
    trials = ended(given)
    for _ in range(3):
        keep(given, trials, tmp_path)
    found = opened(tmp_path)
    assert [t.state for t in found] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert [t.user_attrs["trial"] for t in found] == [0, 1, 2]
    assert [t.params for t in found] == [t.values for t in trials[:3]]
    assert found[0].value == 0.75
    assert found[0].user_attrs["parameters"] == 77
    assert found[1].intermediate_values == {10: 0.25}
    assert found[2].user_attrs["reason"] == "step 3: the loss is nan"
    trials[3].state = trials[4].state = "finished"
    keep(given, trials, tmp_path)
    assert [t.user_attrs["trial"] for t in opened(tmp_path)] == [0, 1, 2, 3, 4]


def test_what_is_in_the_journal_stays_as_it_was_to_the_byte(tmp_path: Path) -> None:
    given = options()
    trials = ended(given)
    keep(given, trials, tmp_path)
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    keep(given, trials, tmp_path)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    trials[3].state = "finished"
    keep(given, trials, tmp_path)
    assert (tmp_path / JOURNAL_NAME).read_bytes().startswith(before)


@pytest.mark.parametrize(("metric", "value", "shown"), [("loss", -1.0, "minus loss"), ("accuracy", 0.75, "accuracy")])
def test_a_metric_has_its_name_in_the_journal_and_one_of_which_less_is_better_a_minus(
    metric: str, value: float, shown: str, tmp_path: Path
) -> None:
    given = options(metric=metric)
    for _ in range(2):
        keep(given, ended(given)[:1], tmp_path)
    assert opened(tmp_path)[0].value == value
    storage = JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL_NAME)))
    assert optuna.load_study(study_name="loraloom", storage=storage).metric_names == [shown]


def test_a_journal_that_was_cut_off_is_begun_anew(tmp_path: Path) -> None:
    given = options()
    keep(given, ended(given), tmp_path)
    path = tmp_path / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-20])
    keep(given, ended(given), tmp_path)
    assert [t.user_attrs["trial"] for t in opened(tmp_path)] == [0, 1, 2]


def test_a_lock_that_another_program_left_holds_nothing_up(tmp_path: Path) -> None:
    given = options()
    (tmp_path / f"{JOURNAL_NAME}.lock").symlink_to(tmp_path / JOURNAL_NAME)
    keep(given, ended(given), tmp_path)
    assert [line for line in (tmp_path / JOURNAL_NAME).read_text().splitlines() if line]
