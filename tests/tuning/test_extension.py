"""Promises of a search that is extended: earlier trials count, new ones compete, a kill changes nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloom.engine.slot import Curve
from loraloom.errors import ConfigError
from loraloom.messages import Message
from loraloom.report.sentences import sentence
from loraloom.training.failures import Interrupted
from loraloom.tuning import search as module
from loraloom.tuning.bar import Bar
from loraloom.tuning.conclusion import SearchResult
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.promotion import Promotion, new_rule
from loraloom.tuning.state import STATE_NAME, run_file
from loraloom.tuning.trial import Trial

Make = Callable[..., TuneConfig]
SPACE = {"lora.r": [2, 4, 8], "train.learning_rate": {"log": [1e-3, 1e-2]}}
WIDER = {"lora.r": [2, 4, 8], "train.learning_rate": {"log": [1e-2, 5e-2]}}


def search(options: TuneConfig, added: int | None = None, then: Callable[[int], object] = lambda step: None) -> Any:
    events: list[Message] = []
    steps = [0]

    def status(_: object) -> None:
        steps[0] += 1
        then(steps[0])

    found = module.search(options, events.append, status, describe=sentence, add_trials=added)
    return found, [sentence(event) for event in events]


def there(folder: Path) -> TuneConfig:
    """The options that the search in ``folder`` kept."""
    return TuneConfig.read(run_file(folder), (), {"output": str(folder)})


def timeless(found: SearchResult, folder: Path) -> str:
    trials = [{key: value for key, value in trial.items() if key != "seconds"} for trial in found.record["trials"]]
    kept = {key: value for key, value in found.record.items() if key not in ("seconds", "machine")}
    return json.dumps(kept | {"trials": trials}).replace(str(folder), "")


def ctrl_c(step: int) -> None:
    if step == 5:
        signal.raise_signal(signal.SIGINT)


def test_a_finished_search_is_extended_in_another_space_and_killed_in_between_it_comes_to_the_same(
    classify: Make, tmp_path: Path
) -> None:
    records = []
    for name, then in (("whole", lambda step: None), ("parts", ctrl_c)):
        folder = tmp_path / name
        first, _ = search(classify(SPACE, seeds=1, sampler="tpe", train={"output": folder}))
        wider = TuneConfig.read(run_file(folder), {"tune.space": WIDER}, {"output": str(folder)})
        asked: tuple[TuneConfig, int | None] = (wider, 3)
        while True:
            try:
                found, events = search(*asked, then)
                break
            except Interrupted:
                asked = (there(folder), None)
        before, after = first.record["trials"], found.record["trials"]
        assert [one["curve"] for one in after[: len(before)]] == [one["curve"] for one in before]
        new = [one for one in after[len(before) :] if one["repeats"] is None]
        assert len(new) == 3
        assert all(one["config"]["train.learning_rate"] >= 1e-2 for one in new)
        assert set(found.verdict.ranking) == {one["number"] for one in after if one["repeats"] is None}
        records.append(timeless(found, folder))
    assert records[0] == records[1]
    # The command that began it shows the verdict of all; and it can be extended again.
    again, events = search(classify(SPACE, seeds=1, sampler="tpe", train={"output": folder}))
    assert timeless(again, folder) == records[1]
    more, events = search(there(folder), 1)
    assert "the search is extended: 1 more trial, 8 in all" in events
    assert len(more.record["trials"]) > len(after)


def test_a_search_that_was_stopped_is_extended_and_both_parts_come_to_their_end(classify: Make, tmp_path: Path) -> None:
    options = classify(SPACE)
    with pytest.raises(Interrupted):
        search(options, then=ctrl_c)
    folder = tmp_path / "search"
    with pytest.raises(ConfigError, match="space: can change once the search has ended; resume it first"):
        search(TuneConfig.read(run_file(folder), {"tune.space": WIDER}, {"output": str(folder)}), 2)
    found, _ = search(there(folder), 2)
    assert [trial["number"] for trial in found.record["trials"]] == list(range(6))
    events = json.loads((folder / STATE_NAME).read_text())["events"]
    assert [(event["kind"], event["trials"], event["first"]) for event in events] == [("extend", 2, 4)]


def test_more_seeds_alone_are_an_extension(classify: Make, tmp_path: Path) -> None:
    search(classify({"train.learning_rate": [1e-2, 2e-2]}, trials=2, train={"max_steps": 72, "batch_size": 16}))
    folder = tmp_path / "search"
    with pytest.raises(ConfigError, match="add_trials: must be at least 1, or 0 with more seeds or finalists, found 0"):
        search(there(folder), 0)
    with pytest.raises(ConfigError, match="add_trials: the space has 0 configurations that were not tried, found 1"):
        search(there(folder), 1)
    more = TuneConfig.read(run_file(folder), {"tune.seeds": 2}, {"output": str(folder)})
    found, _ = search(more, 0)
    assert [trial["repeats"] for trial in found.record["trials"][2:]] == [found.record["trials"][2]["repeats"]] * 2


def test_what_an_extension_may_not_change_is_refused_and_how_to_extend_is_said(classify: Make, tmp_path: Path) -> None:
    search(classify(SPACE))
    folder = tmp_path / "search"
    before = (folder / STATE_NAME).read_bytes()
    with pytest.raises(ConfigError, match="holds another search, of other options, space or data"):
        search(classify(SPACE, train={"seed": 1}), 2)
    with pytest.raises(ConfigError, match="to extend that search give --add-trials and how many"):
        search(classify(SPACE, trials=5))
    with pytest.raises(ConfigError, match="add_trials: extends a search, and overwrite deletes it"):
        search(classify(SPACE, train={"overwrite": True}), 2)
    with pytest.raises(ConfigError, match="add_trials: .* holds no search to extend"):
        search(classify(SPACE, train={"output": tmp_path / "other"}), 2)
    assert (folder / STATE_NAME).read_bytes() == before
    # Rows for a test are not part of what must stay.
    rows = tmp_path / "test.csv"
    rows.write_text("text,label\nnever seen before,praise\nnor was this one,blame\n")
    found, _ = search(classify(SPACE, train={"test_split": rows}), 1)
    assert len(found.record["trials"]) == 5


@pytest.mark.parametrize("earlier_ones", [4, 0])
def test_new_trials_are_compared_with_what_the_earlier_ones_had_at_the_same_step(
    classify: Make, earlier_ones: int
) -> None:
    options = classify(SPACE, train={"max_steps": 72})

    def trial(number: int, loss: float) -> Trial:
        figures = {"loss": [loss] * 21, "accuracy": [1 - loss] * 21}
        evaluation = {"step": 8, "loss": loss, "accuracy": 1 - loss}
        found = Trial(number, {}, options.train, 72, 8, "waiting", curve=Curve([0.3] * 8, [0.1] * 8, [evaluation]))
        found.rungs = {8: figures}
        return found

    earlier = [trial(number, 0.1 + number / 100) for number in range(earlier_ones)]
    new = [trial(earlier_ones, 0.5), trial(earlier_ones + 1, 0.6)]
    rule, bar = new_rule(options), Bar(40, 0.69, False)
    assert Promotion(options, rule, bar, new, lambda message: None, earlier).decide()
    assert rule.sent[0] == ([] if earlier else [0]), "worse than the better half of all"
