"""Promises to who steers a search while it runs: a trial is stopped or kept, also by a kill in between."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloom.cli import _run
from loraloom.errors import ConfigError
from loraloom.messages import Message
from loraloom.report.sentences import sentence
from loraloom.training.failures import Interrupted
from loraloom.tuning import search as module
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.state import STATE_NAME
from loraloom.tuning.steering import REQUESTS, ask
from tuning.test_extension import timeless

Make = Callable[..., TuneConfig]
RATES = {"train.learning_rate": [1e-3, 3e-3, 1e-2, 3e-2]}


def search(options: TuneConfig, then: Callable[[int], object] = lambda step: None) -> tuple[Any, list[str]]:
    events: list[Message] = []
    steps = [0]

    def status(_: object) -> None:
        steps[0] += 1
        then(steps[0])

    found = module.search(options, events.append, status, describe=sentence)
    return found, [sentence(event) for event in events]


def events_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / STATE_NAME).read_text())["events"]
    return found


def test_a_trial_is_stopped_after_the_step_under_way_and_a_resumed_search_does_the_same(
    classify: Make, tmp_path: Path
) -> None:
    records = []
    for name in ("whole", "parts"):
        folder = tmp_path / name

        def then(step: int, folder: Path = folder) -> None:
            if step == 3:
                ask(folder, [("stop", 2)])
            if step == 6 and folder.name == "parts":
                signal.raise_signal(signal.SIGINT)

        options = classify(RATES, min_share=1, train={"output": folder})
        try:
            found, events = search(options, then)
            assert "trial 2 is stopped, as the user asked" in events
        except Interrupted:
            assert events_of(folder) == [{"kind": "stop", "trial": 2, "step": 3}]
            found, _ = search(options)
        stopped = found.record["trials"][2]
        assert (stopped["state"], stopped["steps"], stopped["reason"]) == ("stopped", 3, "by the user, at step 3")
        assert [trial["state"] for trial in found.record["trials"]].count("finished") == 3
        assert not (folder / REQUESTS).exists()
        weights = [path.read_bytes() for path in sorted((folder / "trials").glob("*/*.safetensors"))]
        records.append((timeless(found, folder), weights))
    assert len(weights) == 3
    assert records[0] == records[1], "to the byte"
    with pytest.raises(ConfigError, match="--stop 2: the search in .* has ended"):
        ask(folder, [("stop", 2)])


def test_a_trial_that_is_kept_trains_to_its_end_and_a_request_of_a_stopped_search_waits_for_it(
    classify: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"train.learning_rate": [1e-2, 1.5e-2, 1e-7, 2e-7]}
    given = {"sampler": "grid", "slots": 4, "train": {"max_steps": 72, "batch_size": 16}}
    folder = tmp_path / "search"

    def ctrl_c(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        search(classify(space, **given), ctrl_c)
    with pytest.raises(ConfigError, match="--keep 9: there is no such trial; those that train or wait are 0, 1, 2, 3"):
        ask(folder, [("keep", 2), ("keep", 9)])
    assert not (folder / REQUESTS).exists()
    assert _run(["tune", str(folder), "--keep", "2"]) == 0
    assert "--keep 2: no search runs there now, so it is done when" in " ".join(capsys.readouterr().out.split())
    found, events = search(classify(space, **given))
    assert "trial 2 is not paused at the rungs, as the user asked" in events
    states = [trial["state"] for trial in found.record["trials"]]
    assert (states[2], states[3]) == ("finished", "stopped")
    assert [event["kind"] for event in events_of(folder)] == ["keep"]
