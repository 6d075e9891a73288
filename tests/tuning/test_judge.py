"""Promises of the judge: what noise the seeds have, and what it makes of figures and differences."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.tuning.bar import Bar
from loraloom.tuning.judge import PRIOR, Judge, outcomes, seed_noise
from loraloom.tuning.ranking import Score
from loraloom.tuning.trial import State, Trial

OPTIONS = TrainConfig(model="m", data="d", task="seq-cls", output="o")
BAR = Bar(100, 1.1, False, {"always 'a'": {"accuracy": [0.3] * 21, "loss": [1.1] * 21}})


def trial(number: int, state: State, accuracy: float, **more: int) -> Trial:
    curve = Curve([1.1] * 40, [], [{"step": 40, "loss": 0.5, "accuracy": accuracy}])
    return Trial(number, {}, replace(OPTIONS, seed=number), 40, 40, state, curve=curve, **more)


def test_outcomes_are_ends_and_the_bar_where_a_trial_diverged_or_came_to_no_better() -> None:
    trials = [
        trial(0, "finished", 0.9),
        trial(1, "stopped", 0.7),  # above the bar: where it would have ended is unknown
        trial(2, "stopped", 0.29),
        trial(3, "failed", math.nan),
        trial(4, "finished", 0.1, repeats=0),
    ]
    assert outcomes(trials, "accuracy", BAR) == [0.9, 0.3, 0.3]
    assert outcomes(trials, "accuracy", None) == []


def test_where_no_trial_failed_there_is_no_sign_that_a_seed_might() -> None:
    assert outcomes([trial(0, "finished", 0.9), trial(1, "finished", 0.6)], "accuracy", BAR) == []


def test_seeds_that_agree_are_doubted_where_other_trials_failed() -> None:
    agree = [Score(0.9, None, {0: 0.9, 1: 0.9, 2: 0.9})] * 3
    sure, unsure = seed_noise(agree, [0.9, 0.9, 0.9]), seed_noise(agree, [0.9, 0.3, 0.3])
    assert sure is not None
    assert unsure is not None
    assert sure.variance == pytest.approx(0)
    assert unsure.variance == pytest.approx(PRIOR * 0.12 / (6 + PRIOR))
    mine, its = [[0.9] * 21] * 3, [[0.88] * 21] * 3
    assert Judge("accuracy", 400, sure).better(mine, its).clear
    assert not Judge("accuracy", 400, unsure).better(mine, its).clear


def test_one_seed_each_has_no_noise() -> None:
    assert seed_noise([Score(0.9, None, {0: 0.9})], [0.9, 0.1]) is None


def test_figures_stay_within_the_limits_of_their_metric() -> None:
    judge = Judge("accuracy", 20)
    assert judge.figure([[1.0] * 21, [0.99] * 21]).high == 1.0
    assert Judge("loss", 20).figure([[0.01, *[0.0] * 10, *[0.1] * 10]]).low == 0.0
    assert judge.better([[0.5] * 21], [[0.6] * 21]).value == pytest.approx(-0.1)
    assert Judge("loss", 20).better([[0.5] * 21], [[0.6] * 21]).value == pytest.approx(0.1)
