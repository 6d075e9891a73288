"""Promises of a search: it comes to a verdict that holds, whatever happens to it on the way."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from loraloom import LoraConfig, PeftModel
from loraloom.cli import _run
from loraloom.config.train import TrainConfig
from loraloom.errors import ConfigError, DataError, TrainingError
from loraloom.messages import Message
from loraloom.models.load import load_base
from loraloom.report.sentences import sentence
from loraloom.tasks import TASKS
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.training.failures import Interrupted
from loraloom.training.run_record import RUN_NAME
from loraloom.training.setup import load
from loraloom.training.usage import USAGE_NAME
from loraloom.tuning import search as module
from loraloom.tuning import worker
from loraloom.tuning.conclusion import SearchResult
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.executor import SearchStatus
from loraloom.tuning.space import Space
from loraloom.tuning.state import STATE_NAME

Make = Callable[..., TuneConfig]
RATES = {"train.learning_rate": [1e-3, 3e-3, 1e-2, 3e-2]}
MIXED = {
    "lora.r": [2, 4, 8],
    "lora.lora_alpha": ["r", "2r"],
    "lora.lora_dropout": [0.0, 0.1],
    "lora.target_modules": ["q-v", "all-linear"],
    "train.learning_rate": {"log": [1e-3, 5e-2]},
}
#: Of these most learn within 72 steps.
LEARNS = {
    "lora.r": [4, 6, 8],
    "lora.lora_dropout": [0.0, 0.05],
    "train.learning_rate": [1e-3, 1e-2, 1.5e-2],
}


class Watch:
    """Remembers events and statuses; ``then`` is called after each step."""

    def __init__(self, then: Callable[[int], object] = lambda step: None) -> None:
        self.events: list[str] = []
        self.updates: list[tuple[int, int, float, float | None]] = []
        self._then = then

    def event(self, message: Message) -> None:
        self.events.append(sentence(message))

    def update(self, status: SearchStatus) -> None:
        self.updates.append((len(status.running), status.slots, status.tokens_per_second, status.seconds_left))
        self._then(len(self.updates))


def search(options: TuneConfig, watch: Watch | None = None, sampler: Any = None) -> SearchResult:
    watch = watch or Watch()
    return module.search(options, watch.event, watch.update, sampler, describe=sentence)


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the clock says."""
    trials = [{key: value for key, value in trial.items() if key != "seconds"} for trial in record["trials"]]
    return {key: value for key, value in record.items() if key not in ("seconds", "machine")} | {"trials": trials}


def curves(record: dict[str, Any]) -> list[Any]:
    return [trial["curve"] for trial in record["trials"]]


def result_in(folder: str | Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text(), parse_constant=refuse)
    return found


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("classifying", 16), ("completing", 8)], ids=["classify", "complete"])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TuneConfig, SearchResult, Watch]:
    """A search that learns; the tests train no more than it did."""
    name, size = request.param
    make = request.getfixturevalue(name)(tmp_path_factory.mktemp("found") / "search")
    given = {"trials": 6, "finalists": 2, "seeds": 1, "sampler": "tpe", "slots": 3, "lora": {"lora_alpha": 16}}
    options = make(LEARNS, **given, train={"max_steps": 72, "batch_size": size})
    watch = Watch()
    return options, search(options, watch), watch


def test_the_record_has_all_that_was_promised(found: tuple[TuneConfig, SearchResult, Watch]) -> None:
    options, result, watch = found
    record = result_in(options.train.output)
    assert record == json.loads(json.dumps(result.record))
    assert record.keys() >= {"learned", "best", "to_beat", "trials", "pareto", "importance", "advice", "seconds"}
    assert record["learned"]
    assert record["to_beat"]["gain"] > record["to_beat"]["own_error"]
    assert record["best"].keys() >= {"config", "metric", "adapter"}
    assert record["best"]["config"].keys() == LEARNS.keys()
    assert [trial["number"] for trial in record["trials"]] == list(range(8))
    assert record["seconds"] > 0
    assert record["machine"]["slots"] == 3
    assert set(record["pareto"]) <= set(range(6))
    counted = [trial for trial in record["trials"] if trial["repeats"] is None or trial["state"] != "stopped"]
    for trial in counted:
        assert trial.keys() >= {"config", "state", "curve", "metric", "seconds", "steps"}
        assert trial["state"] in ("finished", "stopped", "failed")
        assert trial["steps"] == len(trial["curve"]["loss"]) == len(trial["curve"]["learning_rate"]) <= 72
        assert trial["metric"] == trial["curve"]["evaluations"][-1][options.metric]
        assert trial["seconds"] > 0
    # Poor ones stopped early, once one had taken off, and each says why.
    states = [trial["state"] for trial in record["trials"][:6]]
    assert states.count("finished") < 6
    assert all(t["reason"].startswith("others were better at step") for t in counted if t["state"] == "stopped")
    assert all(told[0] <= told[1] == 3 and told[2] > 0 for told in watch.updates)


def test_the_finalists_are_trained_again_with_a_further_seed(
    found: tuple[TuneConfig, SearchResult, Watch],
) -> None:
    options, result, watch = found
    first, repeats = result.record["trials"][:6], result.record["trials"][6:]
    assert all(trial["repeats"] is None and trial["seed"] == 0 for trial in first)
    ends = [trial for trial in first if trial["state"] == "finished"]
    sign = -1 if greater_is_better(options.metric) else 1
    best = sorted(ends, key=lambda t: (sign * t["metric"], t["parameters"], t["number"]))[:2]
    counted = [trial for trial in repeats if trial["state"] != "stopped"]
    assert sorted(trial["repeats"] for trial in counted) == sorted(trial["number"] for trial in best)
    for trial in counted:
        assert trial["config"] == first[trial["repeats"]]["config"]
        assert (trial["seed"], trial["state"]) == (1, "finished")
        assert trial["curve"]["loss"] != first[trial["repeats"]]["curve"]["loss"]
    assert result.verdict.best.number in [trial["number"] for trial in best]
    # They started beside those that trained to their end: no slot stayed empty before.
    (begun,) = [place for place, event in enumerate(watch.events) if "1 more seed of each beside them" in event]
    assert begun < min(place for place, event in enumerate(watch.events) if " finished: " in event)


def test_the_best_adapter_gives_the_metric_that_was_reported(
    found: tuple[TuneConfig, SearchResult, Watch],
) -> None:
    options, result, _ = found
    adapter = result.record["best"]["adapter"]
    assert adapter == str(Path(options.train.output) / "best")
    setup = load(options.train)
    reported = result.record["trials"][result.record["best"]["number"]]["metric"]
    model = PeftModel.from_pretrained(setup.base, adapter)
    (measured,) = replace(setup, model=model).evaluator().metrics(["default"])
    assert measured[options.metric] == pytest.approx(reported, rel=1e-4)
    # What its outputs mean is beside it, and in the record.
    usage = json.loads((Path(adapter) / USAGE_NAME).read_text())
    assert usage == result.record["usage"]
    assert usage["task"] == options.train.task
    assert usage.get("id2label") == ({"0": "blame", "1": "praise"} if options.train.task == "seq-cls" else None)
    # And peft reads it, with the same logits.
    peft = pytest.importorskip("peft")
    base, _ = load_base(options.train.model, TASKS[options.train.task], "float32", setup.data.names)
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.tensor([setup.data.validation.examples[0].input_ids])
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_the_best_file_trains_the_best_trial_again(found: tuple[TuneConfig, SearchResult, Watch]) -> None:
    options, result, _ = found
    assert _run(["train", str(Path(options.train.output) / "best.yaml")]) == 0
    record = json.loads((Path(options.train.output) / "full" / RUN_NAME).read_text())
    best = result.record["trials"][result.record["best"]["number"]]
    assert record["result"][options.metric] == pytest.approx(best["metric"], rel=1e-4)
    assert record["curve"]["loss"] == pytest.approx(best["curve"]["loss"], rel=1e-3, abs=1e-3)


def test_optuna_opens_the_journal_with_every_configuration_once(
    found: tuple[TuneConfig, SearchResult, Watch],
) -> None:
    options, result, _ = found
    storage = JournalStorage(JournalFileBackend(str(Path(options.train.output) / "study.log")))
    trials = optuna.load_study(study_name="loraloom", storage=storage).trials
    assert sorted(trial.user_attrs["trial"] for trial in trials) == list(range(6))
    for trial in trials:
        assert trial.params == result.record["trials"][trial.user_attrs["trial"]]["config"]


def test_run_again_it_trains_nothing_and_says_the_verdict_again(
    found: tuple[TuneConfig, SearchResult, Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, result, _ = found

    def never(*_: Any) -> int:
        raise AssertionError("trained")

    before = (Path(options.train.output) / "result.json").read_bytes()
    monkeypatch.setattr(worker, "advance", never)
    watch = Watch()
    again = search(options, watch)
    assert again.record == result.record
    assert (Path(options.train.output) / "result.json").read_bytes() == before
    assert any("8 of 8 trials have ended" in event for event in watch.events)


def test_the_same_search_again_comes_to_the_same(classify: Make, tmp_path: Path) -> None:
    records = []
    for name in ("one", "two"):
        options = classify(MIXED, trials=5, finalists=2, seeds=1, slots=2, train={"output": tmp_path / name})
        records.append(json.dumps(timeless(search(options).record)).replace(str(tmp_path / name), ""))
    assert records[0] == records[1]


def test_all_trials_see_the_same_rows_in_the_same_order(classify: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[list[int]]] = {}
    from loraloom.engine.slot import Slot

    once = Slot.next_examples

    def note(slot: Slot) -> Any:
        examples, share = once(slot)
        seen.setdefault(slot.name, []).extend(example.input_ids for example in examples)
        return examples, share

    monkeypatch.setattr(Slot, "next_examples", note)
    search(classify({"lora.r": [2, 4], "lora.lora_dropout": [0.0, 0.1]}, min_share=1))
    assert len(seen) == 4
    rows = list(seen.values())
    assert len(rows[0]) == 9 * 8
    assert all(other == rows[0] for other in rows)


def test_a_users_sampler_proposes(classify: Make) -> None:
    class Highest(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            number = len(study.get_trials(deepcopy=False))
            return 33 - number

    result = search(classify({"lora.r": {"range": [1, 40]}}, min_share=1), sampler=Highest(seed=0))
    assert [trial["config"]["lora.r"] for trial in result.record["trials"]] == [32, 31, 30, 29]


# -- what cannot be learned, and what takes its time ------------------------------------------------------------------


def test_nobody_is_stopped_before_one_has_taken_off_and_the_search_ends_with_one_that_learned(
    found: tuple[TuneConfig, SearchResult, Watch],
) -> None:
    _, result, watch = found
    waited = [event for event in watch.events if "no trial has taken off yet" in event]
    assert waited[0].startswith("at 11% of the steps no trial has taken off yet")
    assert all("all 6 continue" in event for event in waited)
    shares = [trial["steps"] / trial["of_steps"] for trial in result.record["trials"] if trial["state"] == "stopped"]
    assert all(share > len(waited) / 9 for share in shares)
    assert result.verdict.learned


@pytest.mark.parametrize("why", ["labels at random", "rates too low"])
def test_where_nothing_can_be_learned_that_is_said_and_what_to_change(
    why: str, classify: Make, reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in reviews.read_text().splitlines()]
    space = "[1.0e-2, 2.0e-2]"
    if why == "labels at random":
        labels = [row["label"] for row in rows]
        random.Random(0).shuffle(labels)
        rows = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    else:
        space = "[1.0e-7, 1.0e-6]"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, output = classify(RATES).train.model, tmp_path / "search"
    command = ["tune", "--model", str(model), "--data", str(tmp_path / "rows.jsonl"), "--task", "seq-cls"]
    command += ["--output", str(output), "--eval-split", "60", "--max-steps", "27", "--slots", "4", "--trials", "4"]
    assert _run([*command, "--set", f"tune.space={{lora.r: [2, 4], train.learning_rate: {space}}}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing was learned: no configuration is recommended" in said
    assert "what to change" in said
    assert "use r=" not in said
    assert "1 training row is the same as another one" in said or "training rows are the same" in said
    if why == "rates too low":
        assert "Raise the learning rates (tried: 1e-7 to 1e-6)" in said
    record = result_in(output)
    assert (record["learned"], record["best"]) == (False, None)
    states = {trial["state"]: trial["repeats"] is None for trial in record["trials"]}
    assert states in ({"finished": True}, {"finished": True, "stopped": False})  # further seeds of no finalist
    assert not (output / "best").exists()
    assert not (output / "best.yaml").exists()


def test_an_adapter_that_is_damaged_before_the_verdict_gives_way_and_that_is_noted(
    found: tuple[TuneConfig, SearchResult, Watch], tmp_path: Path
) -> None:
    options, result, _ = found
    folder, number = tmp_path / "search", result.verdict.best.number
    shutil.copytree(options.train.output, folder)
    shutil.rmtree(folder / "best")
    weights = folder / "trials" / f"trial-{number}" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 4
    weights.write_bytes(bytes(data))
    moved = replace(options, train=replace(options.train, output=str(folder)))
    again = search(moved)
    assert any(f"{weights} is damaged" in sentence(note) for note in again.verdict.notes)
    twin = next(trial.number for trial in again.verdict.trials if trial.repeats == number)
    assert again.verdict.best.number == number  # by the adapter of its other seed
    copied = (folder / "best" / "adapter_model.safetensors").read_bytes()
    assert copied == (folder / "trials" / f"trial-{twin}" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "trials" / f"trial-{twin}")
    shutil.rmtree(folder / "best")
    assert search(moved).verdict.best.number != number


# -- a trial gone wild ------------------------------------------------------------------------------------------------


def test_a_trial_gone_wild_is_reported_and_changes_no_bit_of_the_others(classify: Make, tmp_path: Path) -> None:
    def run(last: float, name: str) -> tuple[dict[str, Any], Watch]:
        watch = Watch()
        options = classify(
            {"train.learning_rate": [1e-3, 3e-3, 1e-2, last]},
            sampler="grid", min_share=1, slots=4, train={"max_steps": 40, "output": tmp_path / name},
            lora={"lora_dropout": 0.1},
        )  # fmt: skip
        return search(options, watch).record, watch

    tame, _ = run(5e-3, "tame")
    wild, watch = run(1e6, "wild")
    assert [trial["config"]["train.learning_rate"] for trial in wild["trials"]] == [1e-3, 3e-3, 1e-2, 1e6]
    assert [trial["state"] for trial in wild["trials"]] == ["finished"] * 3 + ["failed"]
    assert "step " in wild["trials"][3]["reason"]
    assert wild["trials"][3]["steps"] < 40
    assert any(event.startswith("trial 3 failed: step") for event in watch.events)
    assert curves(wild)[:3] == curves(tame)[:3]
    assert wild["best"] is None or wild["best"]["number"] != 3


def test_a_search_of_which_every_trial_fails_says_so_and_what_to_do(classify: Make) -> None:
    options = classify({"train.learning_rate": [1e30, 1e31]}, trials=2, train={"warmup_ratio": 0, "max_steps": 30})
    with pytest.raises(TrainingError, match="none of 2 trials has a finite accuracy .*Lower the learning rates"):
        search(options)


# -- interrupted ------------------------------------------------------------------------------------------------------


def test_stopped_after_every_few_steps_it_comes_to_the_same_verdict(classify: Make, tmp_path: Path) -> None:
    space = {**MIXED, "train.gradient_accumulation_steps": [1, 2]}

    def options(name: str) -> TuneConfig:
        return classify(
            space, trials=5, finalists=2, seeds=1, sampler="tpe", slots=2, train={"output": tmp_path / name}
        )

    whole = timeless(search(options("whole")).record)

    def ctrl_c(step: int) -> None:
        if step == 7:
            signal.raise_signal(signal.SIGINT)

    times = 0
    while times < 99:
        try:
            parts = timeless(search(options("parts"), Watch(ctrl_c)).record)
            break
        except Interrupted as stop:
            assert str(stop) == f"stopped; the same command resumes the search in {tmp_path / 'parts'}"
            times += 1
    assert times > 3
    assert json.dumps(parts).replace(str(tmp_path / "parts"), str(tmp_path / "whole")) == json.dumps(whole)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "parts" / "study.log")))
    trials = optuna.load_study(study_name="loraloom", storage=storage).trials
    assert sorted(trial.user_attrs["trial"] for trial in trials) == list(range(5))


def test_a_search_is_gone_on_with_in_as_many_slots_as_are_given_now(classify: Make) -> None:
    def stop(step: int) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        search(classify(RATES, min_share=1, slots=4), Watch(stop))
    for slots, told in ((1, ["slots: one trial at a time (1 as given)"]), (1, [])):
        watch = Watch(stop)
        with pytest.raises(Interrupted):
            search(classify(RATES, min_share=1, slots=slots), watch)
        assert [event for event in watch.events if event.startswith("slots")] == told
        assert all(running == 1 for running, _, _, _ in watch.updates)
    result = search(classify(RATES, min_share=1, slots=2), watch := Watch())
    assert max(running for running, _, _, _ in watch.updates) == 2
    whole = search(classify(RATES, min_share=1, train={"overwrite": True}))
    assert curves(result.record) == curves(whole.record)


def test_a_search_that_is_done_leaves_nothing_of_the_way(classify: Make, tmp_path: Path) -> None:
    search(classify(RATES))
    left = sorted(path.name for path in (tmp_path / "search").iterdir())
    assert left == ["result.json", STATE_NAME, "search.yaml", "study.log", "trials"]  # of nine steps nothing is learned


def test_a_search_that_learned_leaves_the_best_and_nothing_of_the_way(
    found: tuple[TuneConfig, SearchResult, Watch],
) -> None:
    left = {path.name for path in Path(found[0].train.output).iterdir()} - {"full", "best-smaller", "best-scaled"}
    assert left == {"best", "best.yaml", "result.json", STATE_NAME, "search.yaml", "study.log", "trials"}


def test_another_search_in_the_folder_is_refused_before_it_is_touched_and_replaced_when_asked(
    classify: Make, tmp_path: Path
) -> None:
    first = search(classify(RATES))
    before = {path: path.read_bytes() for path in (tmp_path / "search").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds another search.*--overwrite"):
        search(classify(RATES, trials=3))
    assert {path: path.read_bytes() for path in (tmp_path / "search").rglob("*") if path.is_file()} == before
    record = search(classify(MIXED, trials=3, train={"overwrite": True})).record
    assert len(record["trials"]) == 3
    assert record["trials"][0]["config"] != first.record["trials"][0]["config"]
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "search" / "study.log")))
    assert [
        t.params for t in optuna.load_study(study_name="loraloom", storage=storage).trials if len(t.params) == 1
    ] == []
    with pytest.raises(ConfigError, match="holds another search"):
        search(classify(RATES))


def test_rows_that_changed_are_another_search(classify: Make, tmp_path: Path, reviews: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(reviews.read_text())
    search(classify(RATES, train={"data": rows}))
    rows.write_text("".join(reviews.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ConfigError, match="holds another search"):
        search(classify(RATES, train={"data": rows}))


@pytest.mark.parametrize("when", [0, 5, 8])
def test_out_of_memory_halves_the_slots_and_comes_to_a_verdict(
    classify: Make, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    once = worker.advance
    calls = []

    def fail(*arguments: Any) -> int:
        calls.append(len(arguments[1]))
        if len(calls) == when + 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return once(*arguments)

    monkeypatch.setattr(worker, "advance", fail)
    watch = Watch()
    record = search(classify(RATES, min_share=1, slots=4), watch).record
    assert "out of memory: continuing with 2 slots" in watch.events
    assert set(calls[: when + 1]) == {4}
    assert max(calls[when + 1 :]) == 2
    assert [trial["state"] for trial in record["trials"]] == ["finished"] * 4
    assert [trial["steps"] for trial in record["trials"]] == [9] * 4
    assert record["machine"]["slots"] == 2
    monkeypatch.setattr(worker, "advance", once)
    whole = search(classify(RATES, min_share=1, train={"overwrite": True})).record
    assert curves(record) == curves(whole)


def test_memory_too_small_for_a_single_trial_is_said(classify: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(worker, "advance", fail)
    watch = Watch()
    with pytest.raises(MemoryError, match="out of memory with a single trial"):
        search(classify(RATES), watch)
    assert [event for event in watch.events if "memory" in event] == [
        "out of memory: continuing with 2 slots", "out of memory: continuing with 1 slot",
    ]  # fmt: skip


# -- before any training ----------------------------------------------------------------------------------------------


def test_held_out_rows_of_one_class_are_refused(classify: Make, tmp_path: Path) -> None:
    rows = tmp_path / "held-out.jsonl"
    rows.write_text('{"text": "the good film", "label": "praise"}\n' * 5)
    with pytest.raises(DataError) as error:
        search(classify(RATES, train={"eval_split": rows}))
    assert str(error.value) == (
        f"{rows}: all 5 held-out rows are labelled 'praise', so no configuration can be told from another; hold out "
        "more rows"
    )
    assert not (tmp_path / "search").exists()


def test_rows_that_two_parts_share_are_refused_unless_allowed(classify: Make, reviews: Path, tmp_path: Path) -> None:
    same = tmp_path / "test.jsonl"
    same.write_text("".join(reviews.read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(DataError) as error:
        search(classify(RATES, train={"test_split": same, "eval_split": 40}))
    text = str(error.value)
    assert text.startswith(f"{same}: ")
    assert f"of 20 test rows are among the training rows as well ({same}, line " in text
    assert f"is the same as {reviews}, line " in text
    assert "--allow-shared-rows" in text
    assert not (tmp_path / "search").exists()


def test_a_search_says_of_its_rows_what_weakens_a_verdict(classify: Make, tmp_path: Path) -> None:
    rows = tmp_path / "test.jsonl"
    rows.write_text('{"text": "never seen before", "label": "praise"}\n')
    said: list[Message] = []
    module.search(classify(RATES, trials=1, train={"test_split": rows, "max_steps": 1}), said.append)
    assert [m.figures["part"] for m in said if m.kind == "few_rows"] == ["validation", "test"]
    (one,) = [m for m in said if m.kind == "one_class_test"]
    assert sentence(one).startswith("all 1 test rows are labelled 'praise'")


# -- killed -----------------------------------------------------------------------------------------------------------


def tune_command(options: TuneConfig, output: Path) -> list[str]:
    file = output.with_suffix(".yaml")
    train = options.train
    file.write_text(
        f"task: {train.task}\nmodel: {{name: {train.model}}}\ndata: {{train: {train.data}, validation: 40}}\n"
        f"lora: {{r: 4}}\ntrain: {{max_steps: 120, batch_size: 8}}\noutput: {output}\n"
        f"tune: {{trials: 8, finalists: 2, seeds: 1, slots: 3, space: {json.dumps(MIXED)}}}\n"
    )
    return [sys.executable, "-m", "loraloom.cli", "tune", str(file)]


def moment(path: Path) -> int:
    """When the file was written; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_comes_to_the_same_verdict(classify: Make, tmp_path: Path) -> None:
    options = classify(MIXED)
    whole, killed = tune_command(options, tmp_path / "whole"), tune_command(options, tmp_path / "killed")
    done = subprocess.run(whole, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    source, kills, folder = random.Random(7), 0, tmp_path / "killed"
    while kills < 10:
        process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        # From the moment that the search is on disk, else it is the start of the program that is killed nearly always.
        # Every other time a decision further on, for on a slow machine there would be none by the clock.
        for _ in range(1 + kills % 2):
            written = moment(folder / STATE_NAME)
            while process.poll() is None and moment(folder / STATE_NAME) == written:
                time.sleep(0.005)
        time.sleep(source.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"done after {kills} kills"
        kills += 1
    state = json.loads((folder / STATE_NAME).read_text())
    # The kills came in the middle of it: some trials had trained, and there was more to do.
    assert not state["finished"]
    assert sum(bool(trial["curve"]["loss"]) for trial in state["trials"]) > 2
    done = subprocess.run(killed, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    mine, theirs = timeless(result_in(folder)), timeless(result_in(tmp_path / "whole"))
    assert json.dumps(mine).replace(str(folder), str(tmp_path / "whole")) == json.dumps(theirs)
    for path in (tmp_path / "whole" / "best").iterdir():
        assert (folder / "best" / path.name).read_bytes() == path.read_bytes()
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    trials = optuna.load_study(study_name="loraloom", storage=storage).trials
    assert sorted(trial.user_attrs["trial"] for trial in trials) == list(range(8))
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


@pytest.mark.slow
def test_ctrl_c_gives_a_message_and_the_same_command_goes_on(classify: Make, tmp_path: Path) -> None:
    command = tune_command(classify(MIXED), tmp_path / "run")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    while not (tmp_path / "run" / STATE_NAME).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: stopped; the same command resumes the search in {tmp_path / 'run'}" in said
    assert "Traceback" not in said
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert f"resuming in {tmp_path / 'run'}" in done.stdout.replace("\n", "")
    assert (tmp_path / "run" / "result.json").exists()


# -- every task -------------------------------------------------------------------------------------------------------

TASK_ROWS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "numbers": ("seq-cls", "encoder_folder", {"text": "the good film", "label": 0.5}, "mse"),
    "several": ("seq-cls", "encoder_folder", {"text": "the good film", "label": ["a", "b"]}, "f1_micro"),
    "tags": ("token-cls", "encoder_folder", {"tokens": ["the", "good"], "tags": ["O", "B-X"]}, "f1"),
    "translations": ("seq2seq-lm", "translator_folder", {"source": "the good", "target": "a bad film"}, "perplexity"),
    "answers": (
        "question-answering", "encoder_folder",
        {"question": "was it", "context": "the good film", "answers": {"text": ["good"], "answer_start": [4]}}, "f1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TASK_ROWS)
def test_every_task_can_be_searched_by_its_own_metric(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    task, folder, row, metric = TASK_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(24)))
    train = TrainConfig(
        model=str(request.getfixturevalue(folder)), data=str(path), task=task, output=str(tmp_path / "search"),
        max_steps=4, batch_size=4, eval_split=6, lora=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    options = TuneConfig(
        train=train, space=Space.parse(RATES, train), trials=4, finalists=1, seeds=0, slots=4, sampler="random",
        allow_shared_rows=True,
    )  # fmt: skip
    result = search(options)
    assert result.verdict.metric == metric
    assert all(metric in trial["curve"]["evaluations"][-1] for trial in result.record["trials"])
    # Where a row has one answer, and all have the same, what does not look at them gives it: nothing can be learned.
    assert (result.record["best"] is None) == (name not in ("tags", "answers"))
    assert result.verdict.gain is not None
    assert result.verdict.learned or result.verdict.advice
