"""Promises of who trains next."""

from __future__ import annotations

from typing import Any

import pytest

from loraloom.config.train import TrainConfig
from loraloom.tuning.asha import SuccessiveHalving
from loraloom.tuning.scheduler import Scheduler
from loraloom.tuning.state import State
from loraloom.tuning.trial import Trial

OPTIONS = TrainConfig(model="m", data="d.csv", task="seq-cls", output="o", max_steps=90)


def test_repeats_get_the_slots_that_are_left_and_longer_trainings_start_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trial(number: int, step: int, goal: int = 0, **more: Any) -> Trial:
        return Trial(number, {}, OPTIONS, 90, step, goal=goal, **more)

    trials = [
        trial(0, 60),
        trial(1, 60),
        trial(2, 0, 10),
        trial(3, 0, repeats=0),
        trial(4, 0, repeats=1),
        trial(5, 20, 20, measure=True),
    ]
    trials += [trial(6, 30, 30), trial(7, 0, state="running"), trial(8, 90, state="finished")]
    unknown: Any = None
    scheduler = Scheduler(unknown, unknown, unknown, State("f", 4, SuccessiveHalving(5, 2), trials=trials), print)
    monkeypatch.setattr(Scheduler, "decide", lambda self: None)
    order = []
    while (chosen := scheduler.next(held=[1, 4])) is not None:
        order.append(chosen.number)
        chosen.state = "running"
    assert order == [5, 1, 0, 2, 4, 3]
