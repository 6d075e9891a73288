"""Promises of further seeds: which they are follows from figures, never from who ended first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.messages import Message
from loraloom.tuning.asha import SuccessiveHalving
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.ranking import scores
from loraloom.tuning.repeats import Repeats
from loraloom.tuning.space import Space
from loraloom.tuning.state import State
from loraloom.tuning.trial import Trial

BASE = TrainConfig(model="m", data="d.csv", task="seq-cls", output="o", max_steps=90)


class Search:
    """Trials at step 60 of 90 with these accuracies; None: not measured."""

    def __init__(self, accuracies: Mapping[int, float | None], finalists: int = 2, seeds: int = 2) -> None:
        space = Space.parse({"lora.r": [2, 4, 8, 16, 32]}, BASE)
        options = TuneConfig(train=BASE, space=space, trials=5, finalists=finalists, seeds=seeds, metric="accuracy")
        self.state, self.events = State("f", 4, SuccessiveHalving(5, 2)), list[Message]()
        self.repeats = Repeats(options, self.state, self._add, self.events.append)
        for accuracy in accuracies.values():
            trial = self._add({}, 0, None)
            trial.step, trial.state = 60, "waiting"
            if accuracy is not None:
                self.measure(trial.number, 60, accuracy)

    def _add(self, values: Mapping[str, Any], seed: int, repeats: int | None) -> Trial:
        options = TrainConfig(**{**vars(BASE), "seed": seed})
        trial = Trial(len(self.state.trials), dict(values), options, 90, repeats=repeats, curve=Curve())
        self.state.trials.append(trial)
        return trial

    def measure(self, number: int, step: int, accuracy: float) -> None:
        trial = self.state.trials[number]
        trial.step, trial.state = step, "finished" if step == 90 else "waiting"
        trial.curve.evaluations.append({"step": step, "loss": 1.0, "accuracy": accuracy})

    def trials(self, *numbers: int) -> list[Trial]:
        return [self.state.trials[number] for number in numbers]

    @property
    def repeated(self) -> list[int | None]:
        return [trial.repeats for trial in self.state.trials if trial.repeats is not None]


@pytest.mark.parametrize(
    ("accuracies", "leaders"),
    [
        ({0: 0.5, 1: 0.7}, [1, 0]),  # no more than finalists: all, the best first
        ({0: 0.5}, [0]),
        ({0: None, 1: 0.5}, [1, 0]),
        ({0: 0.5, 1: 0.7, 2: 0.6}, [1, 2]),
        ({0: 0.5, 1: None, 2: None}, [0]),  # whose lead is not known
        ({0: None, 1: None, 2: None}, []),
        ({0: 0.5, 1: float("nan"), 2: 0.4}, [0, 2]),
    ],
)
def test_repeats_begin_beside_those_that_train_to_their_end(
    accuracies: dict[int, float | None], leaders: list[int]
) -> None:
    search = Search(accuracies)
    assert search.repeats.begin(search.trials(*accuracies))
    assert search.state.leaders == leaders
    assert search.repeated == leaders * 2
    assert [trial.options.seed for trial in search.state.trials if trial.repeats == 0] == [1, 2] * (0 in leaders)
    assert Search({0: 0.5}, seeds=0).repeats.begin([]), "a decision, though it adds nothing"


@pytest.mark.parametrize("state", ["running", "waiting", "finished", "failed"])
def test_one_that_is_no_finalist_in_the_end_loses_its_repeats_wherever_they_stand(state: Any) -> None:
    search = Search({0: 0.5, 1: 0.7, 2: 0.6})
    search.repeats.begin(search.trials(0, 1, 2))  # 1 and 2 lead
    for number, accuracy in enumerate([0.8, 0.7, 0.6]):
        search.measure(number, 90, accuracy)
    for trial in search.state.trials[3:]:
        if trial.repeats == 2:
            search.measure(trial.number, 90, 0.9)
            trial.state = state
    assert search.repeats.settle(search.trials(0, 1, 2))
    assert [trial.number for trial in search.state.trials if trial.dropped] == [4, 6]
    assert search.repeated == [1, 2, 1, 2, 0, 0]
    assert not any(trial.step or trial.curve.evaluations for trial in search.state.trials if trial.dropped)
    score = scores(search.state.trials, "accuracy")[2]
    assert (score.values, score.failed) == ({0: 0.6}, 0)
    assert [event.kind for event in search.events] == ["leaders", "repeats_dropped", "finalists"]
    assert not search.repeats.settle(search.trials(0, 1, 2)), "nothing is left to decide"


def test_where_nothing_was_learned_all_repeats_are_dropped_and_an_older_search_begins_none_early() -> None:
    search = Search({0: 0.5, 1: 0.7})
    search.repeats.begin(search.trials(0, 1))
    assert search.repeats.settle([])
    assert all(trial.dropped for trial in search.state.trials[2:])
    older = Search({0: 0.5, 1: 0.7})
    older.state.leaders = []
    assert older.repeats.settle(older.trials(0, 1))
    assert older.repeated == [1, 0, 1, 0]
    assert [event.kind for event in older.events] == ["finalists"]
