"""Promises of a run that is gone on with: the same bytes as never stopped, no mixing of trainings, no step lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.engine.loop import StepEvent
from loraloom.errors import ConfigError, SaveError, TrainingError
from loraloom.messages import ignore
from loraloom.report.sentences import sentence
from loraloom.training import setup
from loraloom.training.checkpointing import folders
from loraloom.training.checkpointing.identity import differences
from loraloom.training.checkpointing.resume import find
from loraloom.training.failures import Interrupted
from loraloom.training.run import prepare
from loraloom.training.run_record import RUN_NAME
from loraloom.training.trainer import RunResult, Trainer

GOOD, BAD = ("good", "fine", "lovely", "great"), ("bad", "poor", "awful", "weak")  # words of the tokenizer
WEIGHTS = "adapter_model.safetensors"
#: All at once: masks, several epochs of 7.5 batches, forwards within a step, evaluations that do not fall on saves.
EVERYTHING: dict[str, Any] = {
    "max_steps": 12,
    "batch_size": 6,
    "gradient_accumulation_steps": 4,
    "weight_decay": 0.1,
    "loraplus_lr_ratio": 4.0,
    "lr_scheduler_type": "cosine",
    "save_steps": 2,
    "eval_steps": 3,
    "lora": {"lora_dropout": 0.3, "bias": "lora_only"},
}
Make = Callable[..., TrainConfig]


class Killed(BaseException):
    """Nothing can be done on it, as with SIGKILL."""


@pytest.fixture
def classify(encoder_folder: Path, reviews: Path, tmp_path: Path) -> Make:
    def make(output: str | Path = "run", **changes: Any) -> TrainConfig:
        lora = LoraConfig(**{"target_modules": "all-linear", **changes.pop("lora", {})})
        given = {"model": encoder_folder, "data": reviews, "task": "seq-cls", "max_steps": 6, "save_steps": 2}
        given |= {"learning_rate": 1e-2, "output": tmp_path / output, "lora": lora, "eval_split": 20}
        if "save_strategy" in changes or "save_minutes" in changes:
            del given["save_steps"]
        return TrainConfig(**{**given, **changes})

    return make


@pytest.fixture
def complete(decoder_folder: Path, chats: Path, classify: Make) -> Make:
    def make(output: str | Path = "run", **changes: Any) -> TrainConfig:
        return classify(output, **{"model": decoder_folder, "data": chats, "task": "causal-lm", **changes})

    return make


def at(step: int, action: Callable[[], object]) -> Callable[[StepEvent], None]:
    def watch(event: StepEvent) -> None:
        if event.step == step:
            action()

    return watch


def fail(error: BaseException) -> Callable[..., None]:
    def action(*_: object) -> None:
        raise error

    return action


def train(
    options: TrainConfig, resume: Any = None, watch: Any = ignore, log: Callable[[str], object] = ignore
) -> RunResult:
    """``log`` gets the sentences of the events."""
    return Trainer(prepare(options, resume), watch, lambda event: log(sentence(event))).fit(resume)


def stopped(options: TrainConfig, step: int, resume: Any = None, number: int = signal.SIGTERM) -> str:
    """Run until ``step`` and stop there. What was said."""
    with pytest.raises(Interrupted) as error:
        train(options, resume, at(step, lambda: signal.raise_signal(number)))
    return str(error.value)


def killed(options: TrainConfig, step: int, resume: Any = None) -> None:
    """Run until ``step``; nothing is written after it, as if the process had died."""
    job = prepare(options, resume)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("loraloom.training.trainer.Trainer.end_early", lambda self, error, stop: fail(error)())
        Trainer(job, at(step, fail(Killed()))).fit(resume)


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / WEIGHTS).read_bytes()


def record(folder: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(folder) / RUN_NAME).read_bytes())
    return found


def steps(folder: str | Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folders.listed(folder))


#: What a run that was stopped and one that was not differ in.
OWN = ("seconds", "tokens_per_second", "resumed_at", "options", "record_sha256")


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key not in OWN}


# The same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["seq-cls", "causal-lm"])
def test_stopped_again_and_again_it_comes_to_the_same_bytes_and_the_same_record(
    request: pytest.FixtureRequest, task: str
) -> None:
    make: Make = request.getfixturevalue({"seq-cls": "classify", "causal-lm": "complete"}[task])
    whole, parts = make("whole", **EVERYTHING), make("parts", **EVERYTHING)
    train(whole)
    stopped(parts, 1)
    killed(parts, 5, True)  # goes back to step 4
    stopped(parts, 7, True, signal.SIGINT)  # is evaluated once more, of which those that follow know nothing
    killed(parts, 10, True)
    said: list[str] = []
    train(parts, True, log=said.append)
    assert said == [f"resuming from {parts.output}/checkpoint-10, after step 10 of 12"]
    assert weights(parts.output) == weights(whole.output)
    assert record(parts.output)["resumed_at"] == [1, 4, 7, 10]
    assert timeless(record(parts.output)) == timeless(record(whole.output))


@pytest.mark.parametrize("optim", ["adamw", "SGD", "Adagrad"])
def test_within_a_step_the_gradients_so_far_are_kept(classify: Make, optim: str) -> None:
    more = {"optim_args": {"momentum": 0.9}} if optim == "SGD" else {}
    whole, parts = (classify(name, optim=optim, **{**EVERYTHING, **more}) for name in ("whole", "parts"))
    train(whole)
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += torch.is_grad_enabled()
        if forwards == 1 + 4 * 5 + 3:  # one is the look before the first step
            signal.raise_signal(signal.SIGTERM)

    job = prepare(parts)
    job.model.get_base_model().register_forward_pre_hook(count)
    with pytest.raises(Interrupted, match="stopped at step 5 of 12"):
        Trainer(job).fit()
    found = folders.newest(parts.output)
    assert found is not None
    assert found.state["slot"]["micro_step"] == 3
    assert any(name.startswith("gradient/") for name in found.tensors())
    train(parts, True)
    assert weights(parts.output) == weights(whole.output)
    assert timeless(record(parts.output)) == timeless(record(whole.output))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_goes_on_to_the_byte(classify: Make, dtype: str) -> None:
    whole, parts = (classify(name, **EVERYTHING, dtype=dtype) for name in ("whole", "parts"))
    train(whole)
    stopped(parts, 3)
    killed(parts, 8, True)
    train(parts, True)
    assert weights(parts.output) == weights(whole.output)


def test_modules_trained_in_full_and_embeddings_go_on_to_the_byte(classify: Make) -> None:
    lora = {"target_modules": ["word_embeddings", "query"], "modules_to_save": ["LayerNorm"], "bias": "all"}
    whole, parts = (classify(name, lora=lora) for name in ("whole", "parts"))
    train(whole)
    stopped(parts, 3)
    train(parts, True)
    assert weights(parts.output) == weights(whole.output)


def test_a_checkpoint_is_an_adapter_as_peft_reads_it(classify: Make) -> None:
    train(classify("whole", max_steps=4))
    stopped(classify(max_steps=6), 4)
    found = folders.newest(classify().output)
    assert found is not None
    assert load_file(found.path / WEIGHTS).keys() == load_file(Path(classify("whole").output) / WEIGHTS).keys()
    config = json.loads((found.path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_a_moment_by_the_clock_changes_nothing_that_is_learnt(classify: Make) -> None:
    train(classify("whole"))
    timed = classify("timed", save_minutes=1e-6, eval_minutes=1e-6)
    train(timed)
    assert weights(timed.output) == weights(classify("whole").output)
    assert [one["step"] for one in record(timed.output)["curve"]["evaluations"]] == [1, 2, 3, 4, 5, 6]
    assert steps(timed.output)[-1] == 6
    slow = classify("slow", save_minutes=60, eval_minutes=60)
    train(slow)
    assert [one["step"] for one in record(slow.output)["curve"]["evaluations"]] == [6]
    assert steps(slow.output) == []


def test_moments_by_epochs_and_none_at_all(classify: Make) -> None:
    epochs = classify("epochs", max_steps=None, epochs=2, batch_size=60, save_strategy="epoch")
    train(epochs)
    assert [one["step"] for one in record(epochs.output)["curve"]["evaluations"]] == [3, 6]
    assert steps(epochs.output) == [3, 6]
    never = classify("never", save_strategy="no", eval_strategy="no")
    train(never)
    assert [one["step"] for one in record(never.output)["curve"]["evaluations"]] == [6]
    assert steps(never.output) == []


def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(classify: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = (classify(name, eval_steps=2) for name in ("whole", "parts"))
    train(whole)
    job = prepare(parts)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("loraloom.training.trainer.Trainer.end_early", lambda self, error, stop: fail(error)())
        patch.setattr("loraloom.training.trainer.Trainer._measure", lambda self: fail(Killed())())
        Trainer(job).fit()
    assert steps(parts.output) == [2]  # saved before it
    train(parts, True)
    assert timeless(record(parts.output)) == timeless(record(whole.output))


# Which one --------------------------------------------------------------------------------------------------------


DATED = (
    "{{ 'great' if strftime_now('%d') == '01' else 'weak' }} {% for m in messages %}"
    "{{ m.role[0] }} {{ m.content }} now {% endfor %}"
)


@pytest.fixture
def dated(complete: Make, tmp_path: Path) -> Make:
    """Conversations, with a template that writes the date."""
    turns = [[{"role": "user", "content": "the cat"}, {"role": "assistant", "content": f"a {w}"}] for w in GOOD + BAD]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns * 3))

    def make(output: str | Path = "run", **changes: Any) -> TrainConfig:
        return complete(output, data=path, eval_split=4, chat_template=DATED, **changes)

    return make


def test_a_template_that_writes_the_date_keeps_that_of_the_first_day(
    dated: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "today", lambda: "2024-07-01")
    whole = train(dated("whole"))
    assert any(
        "writes the date: all conversations are written with 2024-07-01" in n for n in prepare(dated("x")).data.notes
    )
    stopped(dated(), 3)
    monkeypatch.setattr(setup, "today", lambda: "2024-07-02")
    again = train(dated(), resume=True)
    assert weights(again.record["options"]["output"]) == weights(whole.record["options"]["output"])
    assert record(dated().output)["options"]["date"] == "2024-07-01"
    assert train(dated(), resume=True).record["state"] == "finished"  # nothing to do, on any day
    assert weights(train(dated("next")).record["options"]["output"]) != weights(dated("whole").output)
    assert weights(train(dated("set", date="2024-07-01")).record["options"]["output"]) == weights(dated("whole").output)


def test_another_date_is_refused_and_one_that_nothing_writes(dated: Make, complete: Make) -> None:
    stopped(dated(date="2024-07-01"), 3)
    with pytest.raises(ConfigError, match="date is '2024-07-02' and was '2024-07-01'"):
        train(dated(date="2024-07-02"), resume=True)
    with pytest.raises(ConfigError, match="date: no chat template writes it here"):
        prepare(complete("other", date="2024-07-01"))
    with pytest.raises(ConfigError, match="date: must be a day such as 2026-07-26, found '1 July'"):
        dated(date="1 July")


def test_with_nothing_to_go_on_from_it_begins_afresh(classify: Make) -> None:
    said: list[str] = []
    train(classify(), True, log=said.append)
    assert said == []
    assert record(classify().output)["resumed_at"] == []


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(classify: Make) -> None:
    train(classify("whole"))
    killed(classify(), 5)
    (Path(classify().output) / "checkpoint-4" / "state.safetensors").write_bytes(b"")
    said: list[str] = []
    train(classify(), True, log=said.append)
    assert "checkpoint-4 is no whole checkpoint: state.safetensors has 0 bytes" in said[0]
    assert "resuming from" in said[1]
    assert "checkpoint-2, after step 2 of 6" in said[1]
    assert weights(classify().output) == weights(classify("whole").output)


def test_a_checkpoint_can_be_named_and_the_output_moved(classify: Make, tmp_path: Path) -> None:
    train(classify("whole"))
    killed(classify(), 5)
    old = Path(classify().output) / "checkpoint-2"
    train(classify("elsewhere", save_steps=3, eval_steps=4, eval_batch_size=7), old)
    assert weights(classify("elsewhere").output) == weights(classify("whole").output)
    shutil.move(classify().output, tmp_path / "moved")
    train(classify("moved"), True)
    assert weights(tmp_path / "moved") == weights(classify("whole").output)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("run", "run is no whole checkpoint: it has no manifest.json; did you mean .*checkpoint-4?"),
        ("run/checkpoint-9", "there is no such folder"),
        ("run/checkpoint-4/state.json", "it is no folder"),
    ],
)
def test_a_path_that_is_no_whole_checkpoint_is_refused_before_anything_loads(
    classify: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    killed(classify(), 5)
    monkeypatch.setattr("loraloom.training.run.load", fail(AssertionError()))
    with pytest.raises(ConfigError, match=f"resume: .*{said}"):
        train(classify(), tmp_path / path)


def test_a_finished_run_says_so_and_is_not_trained_again(classify: Make) -> None:
    first = train(classify())
    before = weights(classify().output)
    said: list[str] = []
    again = train(classify(), True, fail(AssertionError()), log=said.append)
    assert said == [f"{classify().output}: finished after 6 steps; nothing is left to do"]
    assert again.record == record(classify().output) == json.loads(json.dumps(first.record))
    assert again.predictions == first.predictions
    assert weights(classify().output) == before


def test_killed_at_the_very_end_it_only_measures_and_writes_what_is_missing(
    classify: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(classify("whole"))
    killed(classify(), 6)
    assert steps(classify().output)[-1] == 6
    events: list[StepEvent] = []
    with monkeypatch.context() as patch:
        patch.setattr("loraloom.training.trainer.advance", fail(AssertionError("trained")))
        train(classify(), True, events.append)
    assert [(event.step, event.evaluation) for event in events] == [(6, record(classify().output)["result"])]
    assert weights(classify().output) == weights(classify("whole").output)
    assert timeless(record(classify().output)) == timeless(record(classify("whole").output))


def twice() -> None:
    """A second Ctrl-C, which leaves no checkpoint of that step."""
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_stopped_before_the_first_checkpoint_it_begins_afresh(classify: Make) -> None:
    options = classify(save_steps=4)
    with pytest.raises(Interrupted):
        train(options, watch=at(1, twice))
    assert steps(options.output) == []
    with pytest.raises(ConfigError, match="learning_rate is 0.5 and was 0.01"):
        prepare(classify(save_steps=4, learning_rate=0.5), True)
    said: list[str] = []
    train(options, True, log=said.append)
    assert said == [
        f"the run in {options.output} that ended early, after step 1, left no whole checkpoint: training starts afresh"
    ]
    train(classify("whole"))
    assert weights(options.output) == weights(classify("whole").output)


def test_an_adapter_that_is_not_of_the_run_that_stopped_is_never_replaced(classify: Make) -> None:
    options = classify(save_steps=4)
    with pytest.raises(Interrupted):
        train(options, watch=at(1, twice))
    path = Path(options.output) / WEIGHTS
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="holds an adapter already"):
        prepare(options, True)
    (path.parent / RUN_NAME).unlink()
    with pytest.raises(ConfigError, match="holds an adapter already"):
        prepare(options, True)
    assert path.read_bytes() == b"mine"


def test_with_damaged_checkpoints_alone_it_begins_afresh(classify: Make) -> None:
    killed(classify(), 3)
    (Path(classify().output) / "checkpoint-2" / "state.json").write_text("{")
    said: list[str] = []
    train(classify(), True, log=said.append)
    assert "checkpoint-2 is no whole checkpoint" in said[0]
    assert record(classify().output)["state"] == "finished"


def test_finished_is_never_said_over_another_adapter(classify: Make) -> None:
    train(classify())
    path = Path(classify().output) / WEIGHTS
    before, changed = path.read_bytes(), bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(ConfigError, match=f"resume: {path} is not the one that the finished run in"):
        prepare(classify(), True)
    path.rename(path.parent / "mine")
    train(classify(), True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("moves", range(4))
def test_adapter_and_record_are_one_even_when_killed_between_them(
    classify: Make, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    """A finished run is overwritten, stopped twice, and killed as its files are put in place."""
    train(classify())
    first = weights(classify().output)
    job, real, done = prepare(classify(overwrite=True, seed=3)), os.replace, []

    def replace(source: Any, target: Any) -> None:
        if Path(target).name in (WEIGHTS, RUN_NAME, "adapter_config.json"):
            if len(done) == moves:
                raise Killed
            done.append(target)
        real(source, target)

    with monkeypatch.context() as patch, contextlib.suppress(Killed, Interrupted):
        patch.setattr(os, "replace", replace)
        Trainer(job, at(1, twice)).fit()
    if moves == 3:  # all were put in place
        assert weights(classify().output) != first
    with pytest.raises(ConfigError, match="was trained with other options: seed is 0 and was 3"):
        prepare(classify(), True)
    said: list[str] = []
    train(classify(seed=3), True, log=said.append)
    assert "starts afresh" in said[0]
    train(classify("whole", seed=3))
    assert weights(classify().output) == weights(classify("whole").output)


def test_with_overwrite_what_is_of_other_options_or_data_makes_way(
    classify: Make, tmp_path: Path, reviews: Path
) -> None:
    train(classify())
    data = tmp_path / "other.jsonl"
    data.write_text(reviews.read_text().replace("film", "book", 1))
    for changes in ({"seed": 3}, {"seed": 3, "data": data}):
        options = classify(overwrite=True, **changes)
        killed(options, 3, True)
        assert steps(options.output) == [2]
        said: list[str] = []
        train(options, True, log=said.append)
        assert said[-1] == f"resuming from {options.output}/checkpoint-2, after step 2 of 6"


def test_a_damaged_record_is_named_and_passed_over(classify: Make) -> None:
    train(classify())
    path = Path(classify().output) / RUN_NAME
    path.write_text(path.read_text().replace('"steps": 6', '"steps": 7'))
    said: list[str] = []
    train(classify(), True, log=said.append)
    assert said[0] == f"{path}: damaged, or not what loraloom writes; it is skipped"
    assert record(classify().output)["steps"] == 6


# Not mixed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_options_that_change_the_result_are_named_with_both_values(
    classify: Make, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    if finished:
        train(classify(save_strategy="no"))
    else:
        killed(classify(), 5)
    monkeypatch.setattr("loraloom.training.run.load", fail(AssertionError()))  # before anything loads
    with pytest.raises(ConfigError) as error:
        train(classify(learning_rate=2e-2, seed=3, lora={"r": 4}, save_steps=1), True)
    for part in ("learning_rate is 0.02 and was 0.01", "seed is 3 and was 0", "lora.r is 4 and was 8"):
        assert part in str(error.value)
    assert "was trained with other options" in str(error.value)
    assert "overwrite" in str(error.value)
    assert "save_steps" not in str(error.value)


@pytest.mark.parametrize(
    ("then", "now", "named"),
    [
        ({}, {"max_steps": 7}, {"max_steps"}),
        ({}, {"eval_split": 0.2}, {"eval_split"}),
        ({"eval_split": "a.csv"}, {"eval_split": "b.csv"}, set()),  # their bytes are compared
        ({"eval_split": "a.csv"}, {"eval_split": 0.2}, {"eval_split"}),
        ({}, {"data": "other.csv", "model": "other"}, set()),
        ({"data": [{"path": "a", "weight": 2}]}, {"data": [{"path": "b", "weight": 2}]}, set()),
        ({"data": [{"path": "a", "weight": 2}]}, {"data": [{"path": "a", "weight": 3}]}, {"data"}),
        ({}, {"device": "cpu", "gradient_checkpointing": True}, set()),
        ({"eval_steps": 1}, {"eval_steps": 2, "metrics": ["loss"], "metric_for_best_model": "loss"}, set()),
        (
            {"eval_steps": 1, "early_stopping_patience": 2},
            {"early_stopping_patience": 2, "eval_steps": 2},
            {"eval_steps"},
        ),
        ({}, {"load_best_model_at_end": True}, {"load_best_model_at_end"}),
        ({}, {"lora": {"target_modules": ["query"]}}, {"lora.target_modules"}),
        ({"lora": {"target_modules": ["key", "query"]}}, {"lora": {"target_modules": ["query", "key"]}}, set()),
        ({}, {"report_to": [], "save_total_limit": 9, "overwrite": True}, set()),
    ],
)
def test_what_counts_as_another_training(
    classify: Make, then: dict[str, Any], now: dict[str, Any], named: set[str]
) -> None:
    saved = json.loads(json.dumps(classify(**then).to_dict(), default=sorted))
    assert differences(saved, classify(**now).to_dict()).keys() == named


def test_options_that_a_run_did_not_know_yet_count_as_their_defaults(classify: Make) -> None:
    saved = json.loads(json.dumps(classify().to_dict(), default=sorted))
    for options, name in ((saved, "max_grad_norm"), (saved["lora"], "use_rslora"), (saved["lora"], "layers_pattern")):
        del options[name]
    saved["lora"]["peft_version"] = "0.1"
    assert differences(saved, classify().to_dict()) == {}
    now = classify(max_grad_norm=0.5, lora={"use_rslora": True}).to_dict()
    assert differences(saved, now) == {"max_grad_norm": (1.0, 0.5), "lora.use_rslora": (False, True)}


@pytest.mark.parametrize("record", [True, False])
def test_what_a_later_version_wrote_is_refused_and_stays(
    classify: Make, monkeypatch: pytest.MonkeyPatch, record: bool
) -> None:
    """Nothing before it is resumed instead, and nothing starts over."""
    killed(classify(), 3)
    if record:
        stopped(classify(), 5, True)
        path = Path(classify().output) / RUN_NAME
        path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    else:
        with monkeypatch.context() as patch:
            patch.setattr(folders, "FORMAT", 9)
            killed(classify(), 5, True)
    before = steps(classify().output)
    with pytest.raises(ConfigError, match="is of format 9, and this version of loraloom reads [12]; update loraloom"):
        train(classify(), True)
    assert steps(classify().output) == before


def test_other_data_another_model_or_another_tokenizer_are_refused(
    classify: Make, tmp_path: Path, reviews: Path, encoder_folder: Path
) -> None:
    killed(classify(), 5)
    data = tmp_path / "other.jsonl"
    data.write_text(reviews.read_text().replace("film", "book", 1))
    with pytest.raises(ConfigError, match="was trained on other data: the hashes of the files differ"):
        train(classify(data=data), True)
    shutil.copy(reviews, data)
    model = shutil.copytree(encoder_folder, tmp_path / "model")
    from transformers import BertModel

    base = BertModel.from_pretrained(model)
    base.encoder.layer[1].output.dense.weight.data.mul_(1.5)
    base.save_pretrained(model)
    with pytest.raises(ConfigError, match=r"was trained on another model: the weights of .*model differ"):
        train(classify(data=data, model=model), True)
    shutil.rmtree(model)
    shutil.copytree(encoder_folder, model)
    told = model / "tokenizer.json"
    told.write_text(told.read_text().replace('"the": 12', '"the": 13').replace('"film": 13', '"film": 12'))
    with pytest.raises(ConfigError, match="was trained on other tokens, though the files are the same"):
        train(classify(data=data, model=model), True)
    # The same bytes elsewhere are the same.
    shutil.rmtree(model)
    shutil.copytree(encoder_folder, model)
    train(classify(data=data, model=model), True)


def test_what_may_change_the_last_bits_is_said(classify: Make) -> None:
    killed(classify(), 5)
    said: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train(classify(gradient_checkpointing=True), True, log=said.append)
    finally:
        torch.set_num_threads(threads)
    assert f"threads {threads} is now {threads + 1}; gradient_checkpointing False is now True" in said[0]
    assert "the last bits of the result may differ" in said[0]


def test_a_folder_with_checkpoints_is_neither_mixed_with_nor_lost(classify: Make, tmp_path: Path) -> None:
    killed(classify(), 5)
    with pytest.raises(ConfigError, match="holds checkpoint-4 of a run that did not end; to resume it give --resume"):
        prepare(classify())
    train(classify("whole"))
    with pytest.raises(ConfigError, match="holds checkpoint-4"):
        prepare(classify(), tmp_path / "whole" / "checkpoint-4")
    train(classify(overwrite=True, seed=5, save_steps=5))
    assert steps(classify().output) == [5]


def test_what_a_killed_run_left_half_written_is_cleaned(classify: Make) -> None:
    killed(classify(), 3)
    left = Path(classify().output) / ".checkpoint-4.0123abcd"
    left.mkdir()
    train(classify(), True)
    assert not left.exists()


# The best one -----------------------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Evaluations as they are given, by step."""
    monkeypatch.setattr(
        "loraloom.training.trainer.Trainer._measure",
        lambda self: {"loss": 1.0, "accuracy": values[self.slot.step - 1]},
    )


BEST: dict[str, Any] = {"max_steps": 8, "eval_steps": 1, "save_steps": 3, "load_best_model_at_end": True}


def test_the_best_adapter_is_at_the_top_and_the_record_says_which_it_is(
    classify: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.1, 0.5, 0.3, 0.9, 0.9, 0.2, float("nan"), 0.4])
    said: list[str] = []
    result = train(classify(**BEST, save_total_limit=1), log=said.append)
    assert steps(classify().output) == [4, 6]
    best = Path(classify().output) / "checkpoint-4"
    assert weights(classify().output) == weights(best)
    found = record(classify().output)
    assert (found["adapter_step"], found["steps"]) == (4, 8)
    assert found["best"] == {"step": 4, "metric": "accuracy", "value": 0.9}
    assert found["result"] == {"loss": 1.0, "accuracy": 0.9}
    assert said == ["the adapter is that of step 4: accuracy 0.9"]
    live = result.job.model.base_model.tensors_of("default")
    assert all(torch.equal(live[key], tensor) for key, tensor in load_file(best / WEIGHTS).items())


@pytest.mark.parametrize("kill", [1, 4, 5, 7, 8])
def test_the_best_adapter_comes_out_the_same_wherever_it_was_stopped(
    classify: Make, monkeypatch: pytest.MonkeyPatch, kill: int
) -> None:
    scripted(monkeypatch, [0.1, 0.5, 0.3, 0.9, 0.9, 0.2, 0.3, 0.4])
    whole = classify("whole", **BEST, save_total_limit=1)
    train(whole)
    killed(classify(**BEST, save_total_limit=1), kill)
    train(classify(**BEST, save_total_limit=1), True)
    assert weights(classify().output) == weights(whole.output)
    assert timeless(record(classify().output)) == timeless(record(whole.output))


def test_the_best_one_goes_along_when_the_output_moves(classify: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.9, 0.3, 0.3, 0.3, 0.2, 0.3, 0.4])
    killed(classify(**BEST), 5)
    assert steps(classify().output) == [2, 3]
    there = Path(classify().output)
    train(classify("moved", **BEST), there / "checkpoint-3")
    assert weights(classify("moved").output) == weights(there / "checkpoint-2")


def test_without_the_best_one_an_earlier_checkpoint_is_taken(classify: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [0.1, 0.2, 0.3, 0.9, 0.9, 0.2, 0.3, 0.4])
    options = classify(**BEST, save_total_limit=9)
    train(classify("whole", **BEST))
    killed(options, 7)
    (Path(options.output) / "checkpoint-4" / "state.json").unlink()
    said: list[str] = []
    train(options, True, log=said.append)
    assert "checkpoint-6 is skipped: " in said[0]
    assert "checkpoint-4, the best one so far, is gone or damaged" in said[0]
    assert weights(options.output) == weights(classify("whole").output)
    # And where there is none to go back to, it is said instead of begun anew.
    shutil.rmtree(options.output)
    killed(options, 6)
    for path in folders.listed(options.output):
        if path.name != "checkpoint-6":
            shutil.rmtree(path)
    with pytest.raises(ConfigError, match="checkpoint-4, the best one so far, is gone or damaged"):
        train(options, True)


@pytest.mark.parametrize(
    ("patience", "threshold", "ends"), [(1, 0.0, 3), (2, 0.0, 6), (3, 0.0, 7), (2, 0.15, 4), (4, 0.0, 8)]
)
def test_training_ends_once_there_was_no_better_evaluation_for_so_long(
    classify: Make, monkeypatch: pytest.MonkeyPatch, patience: int, threshold: float, ends: int
) -> None:
    scripted(monkeypatch, [0.1, 0.5, 0.4, 0.6, 0.6, 0.5, 0.6, 0.6])
    options = classify(max_steps=8, eval_steps=1, early_stopping_patience=patience, early_stopping_threshold=threshold)
    told: list[str] = []
    train(options, log=told.append)
    assert [line for line in told if line.startswith(f"stopped early, after step {ends} of 8")] == told[: ends < 8]
    found = record(options.output)
    assert (found["state"], found["steps"]) == ("finished", ends)
    assert bool(found["ended_early"]) == (ends < 8)
    # Stopped before, and killed after the last save, it ends at the same step.
    parts = classify("parts", **{key: getattr(options, key) for key in ("max_steps", "eval_steps")},
                     early_stopping_patience=patience, early_stopping_threshold=threshold)  # fmt: skip
    stopped(parts, 1)
    if ends > 3:
        killed(parts, 3, True)
    train(parts, True)
    assert weights(parts.output) == weights(options.output)
    assert timeless(record(parts.output)) == timeless(found)


def test_a_metric_that_is_not_measured_is_named_with_those_that_are(classify: Make) -> None:
    with pytest.raises(ConfigError, match="metric_for_best_model: 'acuracy' is not measured; did you mean 'accuracy'"):
        train(classify(load_best_model_at_end=True, metric_for_best_model="acuracy", eval_steps=1))


# Signals and failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_saves_a_checkpoint_and_says_how_to_go_on(
    classify: Make, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    said = stopped(classify(), 3, number=number)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    assert said.startswith("stopped at step 3 of 6; the adapter as it was after step 3 is saved in")
    assert said.endswith(f"the same command with --resume continues from {classify().output}/checkpoint-3")
    assert "stopping after this step" in capsys.readouterr().err
    assert steps(classify().output) == [2, 3]
    assert weights(classify().output) == weights(Path(classify().output) / "checkpoint-3")
    assert Interrupted.exit_code == 1


def test_sigterm_that_comes_again_changes_nothing(classify: Make) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped at step 3"):
        train(classify(), watch=at(3, twice))
    assert steps(classify().output) == [2, 3]


def test_a_second_ctrl_c_leaves_the_checkpoints_as_they_are(classify: Make) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="checkpoint-2"):
        train(classify(), watch=at(3, twice))
    assert steps(classify().output) == [2]
    train(classify("whole"))
    train(classify(), True)
    assert weights(classify().output) == weights(classify("whole").output)


def test_a_failure_between_steps_loses_no_step(classify: Make) -> None:
    train(classify("whole"))
    with pytest.raises(TrainingError, match="the same command with --resume continues from .*checkpoint-3"):
        train(classify(), watch=at(3, fail(RuntimeError("odd"))))
    train(classify(), True)
    assert weights(classify().output) == weights(classify("whole").output)


def test_out_of_memory_in_an_evaluation_is_told_apart_and_can_be_gone_on_from(
    classify: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(classify("whole", eval_steps=3))
    with monkeypatch.context() as patch:
        patch.setattr("loraloom.inference.evaluation.Evaluator.metrics", fail(MemoryError()))
        with pytest.raises(TrainingError) as error:
            train(classify(eval_steps=3))
    said = str(error.value)
    assert said.startswith(
        "evaluation at step 3: out of memory; lower eval_batch_size (64), which changes no result; the adapter"
    )
    assert said.endswith("checkpoint-3")
    train(classify(eval_steps=3, eval_batch_size=5), True)
    assert weights(classify().output) == weights(classify("whole").output)


def test_a_loss_that_is_not_finite_names_the_step_and_the_row_and_keeps_the_checkpoint(
    classify: Make, reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(classify(batch_size=200, gradient_accumulation_steps=1))
    bad = job.data.train.examples[17]
    from loraloom.tasks.objective import Objective

    losses, by_row = Objective.losses, Objective.row_losses
    calls = 0

    def spoil(self: Any, out: Any, labels: Any, rows: Any) -> Any:
        nonlocal calls
        calls += 1
        found = losses(self, out, labels, rows)
        return {name: loss * float("nan") if calls == 6 else loss for name, loss in found.items()}

    def spoil_one(self: Any, out: Any, labels: Any, rows: Any) -> Any:
        found = by_row(self, out, labels, rows)
        return found * float("nan") if len(labels) == 1 and seen == [bad.input_ids] else found

    forward = Objective.forward
    seen: list[Any] = []

    def look(self: Any, inputs: Any, labels: Any = None) -> Any:
        seen[:] = inputs["input_ids"].tolist()
        return forward(self, inputs, labels)

    monkeypatch.setattr(Objective, "losses", spoil)
    monkeypatch.setattr(Objective, "row_losses", spoil_one)
    monkeypatch.setattr(Objective, "forward", look)
    with pytest.raises(TrainingError) as error:
        Trainer(job).fit()
    where = job.data.train.examples.where(17)
    assert str(error.value).startswith(f"step 5: the loss is nan because of {where}")
    assert str(error.value).endswith(f"the last checkpoint is {classify().output}/checkpoint-4")
    assert record(classify().output)["state"] == "failed"
    assert folders.is_whole(Path(classify().output) / "checkpoint-4")


def test_a_training_that_blows_up_blames_no_single_row(classify: Make) -> None:
    with pytest.raises(TrainingError, match=r"^step \d+: the loss is nan on each of its rows \(.*line .* and 3 more\)"):
        train(classify(learning_rate=1e30, warmup_ratio=0, max_steps=50, batch_size=8, dtype="float32"))


def test_a_disk_that_fills_up_ends_with_a_message_and_the_last_checkpoint(
    classify: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(classify("whole"))
    write = folders.write
    full = True

    def fill(folder: Path, step: int, *more: Any) -> Path:
        if step == 4 and full:
            monkeypatch.setattr("loraloom.training.checkpointing.folders.write_files", no_space)
        return write(folder, step, *more)

    def no_space(folder: Path, files: Any) -> None:
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(folders, "write", fill)
    with pytest.raises(SaveError) as error:
        train(classify())
    said = str(error.value)
    assert said.startswith(
        f"{classify().output}/checkpoint-4: the checkpoint cannot be written (No space left on device)"
    )
    assert said.endswith(f"the same command with --resume continues from {classify().output}/checkpoint-2")
    monkeypatch.undo()
    train(classify(), True)
    assert weights(classify().output) == weights(classify("whole").output)


# Killed, for real --------------------------------------------------------------------------------------------------

WARMED = """
# A parent that forks a run for each line that it reads. It prepares the first one itself, and trains nothing: all that
# is imported on the way is then there, and no thread is.
import json, os, resource, sys

from loraloom.config.lora import LoraConfig
from loraloom.errors import LoraloomError
from loraloom.config.train import TrainConfig
from loraloom.training.run import prepare
from loraloom.training.trainer import Trainer

warm = False
for line in sys.stdin:
    given = json.loads(line)
    if not warm:
        prepare(TrainConfig(lora=LoraConfig(**given["lora"]), **given["options"]), True)
        warm = True
    child = os.fork()
    if child == 0:
        code = 0
        try:
            if given["limit"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (given["limit"], given["limit"]))
            options = TrainConfig(lora=LoraConfig(**given["lora"]), **given["options"])
            Trainer(prepare(options, given["resume"])).fit(given["resume"])
        except LoraloomError as error:
            print(json.dumps({"said": str(error)}), flush=True)
            code = error.exit_code
        os._exit(code)
    print(json.dumps({"child": child}), flush=True)
    _, status = os.waitpid(child, 0)
    print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
"""


class Warmed:
    """Runs of real processes without the seconds that importing takes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WARMED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def __call__(
        self, options: TrainConfig, *, after: float | None = None, number: int = signal.SIGKILL, limit: int = 0
    ) -> tuple[int, str]:
        """Run ``options`` with ``resume=True``, send ``number`` after so many seconds. Code, message."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        given = {"resume": True, "limit": limit, "options": options.to_dict(), "lora": options.lora.to_dict()}
        del given["options"]["lora"]
        given["lora"] = {key: given["lora"][key] for key in ("r", "lora_alpha", "lora_dropout", "target_modules")}
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        said, timer = "", None
        for line in self.process.stdout:
            told = json.loads(line)
            if "child" in told and after is not None:
                timer = threading.Timer(after, os.kill, (told["child"], number))
                timer.start()
            said = told.get("said", said)
            if "code" in told:
                if timer is not None:
                    timer.cancel()
                return told["code"], said
        raise AssertionError("the parent died")


@pytest.fixture(scope="module")
def process() -> Any:
    warmed = Warmed()
    yield warmed
    assert warmed.process.stdin is not None
    warmed.process.stdin.close()
    assert warmed.process.wait(60) == 0


@pytest.mark.slow
def test_fifty_runs_killed_at_random_moments_leave_no_corrupt_checkpoint_and_come_to_the_same_bytes(
    classify: Make, process: Warmed
) -> None:
    source, kills, runs, where = random.Random(7), 0, 0, []
    options: dict[str, Any] = {**EVERYTHING, "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    options["lora"] = {"lora_dropout": 0.3}
    process(classify("first", max_steps=1))
    started = time.monotonic()
    assert process(classify("whole", **options)) == (0, "")
    whole = time.monotonic() - started
    while kills < 50:
        mine = classify(f"run-{runs}", **options)
        runs += 1
        while True:
            code, said = process(mine, after=source.uniform(0.0, whole) if kills < 50 else None)
            assert code in (0, -signal.SIGKILL), said
            assert all(folders.is_whole(path) for path in folders.listed(mine.output))
            if code == 0:
                break
            kills += 1
            where.append(steps(mine.output)[-1:] or [0])
        assert weights(mine.output) == weights(classify("whole").output)
        assert timeless(record(mine.output)) == timeless(record(classify("whole").output))
        assert not list(Path(mine.output).glob(".*"))
    assert len({tuple(one) for one in where}) > 5  # they died at different places
    assert runs > 1


@pytest.mark.slow
def test_sigterm_to_a_real_process_saves_and_ends_with_one(classify: Make, process: Warmed) -> None:
    options = classify(max_steps=3000, save_strategy="no", eval_strategy="no")
    code, said = process(options, after=2.5, number=signal.SIGTERM)
    assert code == 1
    assert "--resume continues from" in said
    (step,) = steps(options.output)
    assert 0 < step < 3000
    assert folders.is_whole(Path(options.output) / f"checkpoint-{step}")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4_000, 9_000, 20_000])
def test_a_real_limit_of_file_sizes_is_said_and_what_there_was_is_whole(
    classify: Make, process: Warmed, limit: int
) -> None:
    options = classify()
    killed(options, 3)
    code, said = process(options, limit=limit)
    assert code == 1
    assert "cannot be written" in said
    assert "File too large" in said
    assert "checkpoint-2" in said
    assert all(folders.is_whole(path) for path in folders.listed(options.output))
    assert 2 in steps(options.output)
    assert process(options) == (0, "")
    train(classify("whole"))
    assert weights(options.output) == weights(classify("whole").output)


def test_a_run_finds_what_it_is_to_go_on_from_without_a_model(classify: Make) -> None:
    assert find(classify(), True).checkpoint is None
    killed(classify(), 5)
    found = find(classify(), True).checkpoint
    assert found is not None
    assert found.step == 4
    assert find(classify(), None).checkpoint is None
