"""Promises of Optuna's journal: every trial that ended once, and a damaged one is written again."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from loraloom.tuning.config import TuneConfig
from loraloom.tuning.journal import Journal
from loraloom.tuning.sampler import JOURNAL_NAME
from loraloom.tuning.trial import Trial
from tuning.proposing import all_proposals, options, trial


def opened(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """As optuna-dashboard opens it."""
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL_NAME)))
    return optuna.load_study(study_name="loraloom", storage=storage).trials


def ended(given: TuneConfig) -> list[Trial]:
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
        Journal(given, tmp_path).keep(trials)
    found = opened(tmp_path)
    assert [t.state for t in found] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert [t.user_attrs["trial"] for t in found] == [0, 1, 2]
    assert [t.params for t in found] == [t.values for t in trials[:3]]
    assert found[0].value == 0.75
    assert found[0].user_attrs["parameters"] == 77
    assert found[1].intermediate_values == {10: 0.25}
    assert found[2].user_attrs["reason"] == "step 3: the loss is nan"
    trials[3].state = trials[4].state = "finished"
    Journal(given, tmp_path).keep(trials)
    assert [t.user_attrs["trial"] for t in opened(tmp_path)] == [0, 1, 2, 3, 4]


def test_what_is_in_the_journal_stays_as_it_was_to_the_byte(tmp_path: Path) -> None:
    given = options()
    trials, journal = ended(given), Journal(given, tmp_path)
    journal.keep(trials)
    before = (tmp_path / JOURNAL_NAME).read_bytes()
    journal.keep(trials)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    trials[3].state = "finished"
    journal.keep(trials)
    assert (tmp_path / JOURNAL_NAME).read_bytes().startswith(before)


@pytest.mark.parametrize(("metric", "value", "shown"), [("loss", -1.0, "minus loss"), ("accuracy", 0.75, "accuracy")])
def test_a_metric_has_its_name_in_the_journal_and_one_of_which_less_is_better_a_minus(
    metric: str, value: float, shown: str, tmp_path: Path
) -> None:
    given = options(metric=metric)
    for _ in range(2):
        Journal(given, tmp_path).keep(ended(given)[:1])
    assert opened(tmp_path)[0].value == value
    storage = JournalStorage(JournalFileBackend(str(tmp_path / JOURNAL_NAME)))
    assert optuna.load_study(study_name="loraloom", storage=storage).metric_names == [shown]


@pytest.mark.parametrize("there", ["{", "[]\n", ""])
def test_a_journal_that_is_damaged_is_written_again_from_the_trials(there: str, tmp_path: Path) -> None:
    (tmp_path / JOURNAL_NAME).write_text(there)
    Journal(options(), tmp_path).keep(ended(options()))
    assert [t.user_attrs["trial"] for t in opened(tmp_path)] == [0, 1, 2]


def test_a_lock_that_another_program_left_holds_nothing_up(tmp_path: Path) -> None:
    given = options()
    (tmp_path / f"{JOURNAL_NAME}.lock").symlink_to(tmp_path / JOURNAL_NAME)
    Journal(given, tmp_path).keep(ended(given))
    assert [line for line in (tmp_path / JOURNAL_NAME).read_text().splitlines() if line]
