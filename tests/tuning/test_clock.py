"""Promises of a search with a time limit: it ends in time with a verdict, and a resumed one comes to the same."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloom.errors import ConfigError
from loraloom.report.sentences import sentence
from loraloom.training.failures import Interrupted
from loraloom.tuning import search as module
from loraloom.tuning.clock import Clock
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.state import STATE_NAME
from tuning.test_steering import events_of

Make = Callable[..., TuneConfig]
RATES = {"train.learning_rate": [1e-3, 3e-3, 1e-2, 3e-2]}


def test_when_the_time_is_over_no_trial_begins_and_the_verdict_is_made_of_what_is_there(
    classify: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second passes with each step of the pack."""
    ticks = [0]

    def clock(limit: float, step: float, *rest: Any) -> Clock:
        return Clock(limit, 1.0, *rest, now=lambda: float(ticks[0]))

    monkeypatch.setattr(module, "Clock", clock)
    records = []
    for name in ("whole", "parts"):
        folder, ticks[0], seen = tmp_path / name, 0, list[str]()

        def step(_: object, folder: Path = folder) -> None:
            ticks[0] += 1
            if folder.name == "parts" and ticks[0] == 8:
                signal.raise_signal(signal.SIGINT)

        options = classify(RATES, slots=2, min_share=1, max_time="15s", train={"output": folder})
        for _ in range(2):
            try:
                found = module.search(
                    options, lambda one, seen=seen: seen.append(sentence(one)), step, describe=sentence
                )
                break
            except Interrupted:
                ticks[0] = 8
                options = classify(RATES, slots=2, min_share=1, max_time="7s", train={"output": folder})
        assert [trial["state"] for trial in found.record["trials"]] == ["finished"] * 2 + ["stopped"] * 2
        assert found.record["trials"][3]["reason"] == "the time was over at step 0"
        (event,) = events_of(folder)
        assert (event["kind"], event["steps"], event["finish"]) == ("clock", 18, [])
        assert any("the time is nearly over" in line and "no trial can still finish" in line for line in seen)
        assert "another run may come to another verdict" in sentence(found.verdict.notes[-1])
        again = module.search(options, describe=sentence)
        assert again.record == found.record
        records.append(found.record["trials"][:2])
    assert [[trial["curve"] for trial in record] for record in records[:1] * 2] == [
        [trial["curve"] for trial in record] for record in records
    ]


def test_the_trials_that_can_finish_in_the_time_do_so(classify: Make) -> None:
    from dataclasses import dataclass, field

    @dataclass
    class One:
        number: int
        step: int
        steps: int = 10
        state: str = "running"

        def latest(self, metric: str) -> float:
            return 0.1 * self.number

    @dataclass
    class Known:
        trials: list[Any]
        seconds: float = 60.0
        first: int = 0
        over: bool = False
        begun: None = None
        kept: list[Any] = field(default_factory=list)

    trials = [One(0, 6), One(1, 6), One(2, 8), One(3, 1)]
    known: Any = Known(trials)
    time = [0.0]
    clock = Clock(70.0, 1.0, known, 1, "accuracy", now=lambda: time[0])  # 60 s for 21 steps before, 10 s are left
    live: Any = trials
    event = clock.look(live)
    assert event is None, "the first of them needs 6 s"
    assert not clock.due()
    time[0] = 3.8
    event = clock.look(live)
    assert event is not None
    assert event["finish"] == [2], "the furthest, and no other in 6 s"


def test_a_time_too_short_for_one_trial_is_refused_before_training_and_nothing_is_written(
    classify: Make, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"max_time: one trial of 9000 steps takes about \w+, found 1s; give at least \w+, or lower"
    ):
        module.search(classify(RATES, max_time="1s", train={"max_steps": 9000}))
    assert not (tmp_path / "search" / STATE_NAME).exists()


def test_a_number_of_trials_is_not_exceeded_by_extensions(classify: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trials: must be at most max_trials \(3\), found 4"):
        classify(RATES, max_trials=3)
    module.search(classify(RATES, trials=2, max_trials=3))
    with pytest.raises(
        ConfigError, match="max_trials: the search has 2 trials, and with 2 more it would have more than 3"
    ):
        module.search(classify(RATES, trials=2, max_trials=3), add_trials=2)
