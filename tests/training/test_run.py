"""Promises of a run: the base stays as it is, the same seed gives the same bytes, and no step taken is ever lost."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy
import pytest
import torch
from safetensors.torch import load_file

from loraloom import LoraConfig, PeftModel
from loraloom.config.train import TrainConfig
from loraloom.data.batches import bucketed, padding_share
from loraloom.engine.loop import StepEvent
from loraloom.errors import ConfigError, DataError, LoraloomError, SaveError, TrainingError
from loraloom.lora.routing import BASE
from loraloom.models.load import load_base
from loraloom.tasks import TASKS
from loraloom.training.failures import Interrupted
from loraloom.training.output import RUN_FILE
from loraloom.training.run import examine, prepare
from loraloom.training.run_record import RUN_NAME
from loraloom.training.setup import TrainJob
from loraloom.training.trainer import Trainer

WEIGHTS = "adapter_model.safetensors"
Watch = Callable[[StepEvent], None]


@pytest.fixture
def classify(encoder_folder: Path, reviews: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        lora = LoraConfig(**{"target_modules": "all-linear", **changes.pop("lora", {})})
        given = {
            "model": encoder_folder,
            "data": reviews,
            "task": "seq-cls",
            "output": tmp_path / "run",
            "max_steps": 3,
        }
        return TrainConfig(**{**given, "learning_rate": 1e-2, "lora": lora, **changes})

    return make


@pytest.fixture
def complete(decoder_folder: Path, chats: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(**changes: Any) -> TrainConfig:
        lora = LoraConfig(**{"target_modules": "all-linear", **changes.pop("lora", {})})
        given = {
            "model": decoder_folder,
            "data": chats,
            "task": "causal-lm",
            "output": tmp_path / "run",
            "max_steps": 3,
        }
        return TrainConfig(**{**given, "learning_rate": 1e-2, "lora": lora, **changes})

    return make


def record_in(folder: str | Path) -> dict[str, Any]:
    """``run.json``, read by a parser that takes JSON alone: no NaN, no Infinity."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    text = (Path(folder) / RUN_NAME).read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def at(step: int, *actions: Callable[[], object]) -> Watch:
    def watch(event: StepEvent) -> None:
        if event.step == step:
            for action in actions:
                action()

    return watch


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def at_once() -> None:
    ctrl_c()
    ctrl_c()


def fail(error: BaseException) -> Callable[[], NoReturn]:
    def action() -> NoReturn:
        raise error

    return action


# Frozen, and the same twice -------------------------------------------------------------------------------


def hashes(model: PeftModel) -> dict[str, str]:
    """The bytes of everything that is not the adapter, buffers too."""
    mine = {p.data_ptr() for p in model.adapter_parameters("default").values()}
    both = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in both
        if tensor.data_ptr() not in mine and tensor.dim()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize(
    "more", [{}, {"bias": "all", "modules_to_save": ["LayerNorm"]}, {"target_modules": ["word_embeddings"]}]
)
def test_the_base_has_the_same_bytes_after_training(
    classify: Callable[..., TrainConfig], init: Any, dtype: str, more: dict[str, Any]
) -> None:
    job = prepare(classify(dtype=dtype, lora={"init_lora_weights": init, "lora_alpha": 1, **more}))
    base = job.model.get_base_model()
    before = hashes(job.model)
    weights = {key: p.detach().clone() for key, p in job.model.adapter_parameters("default").items()}
    Trainer(job).fit()
    assert len(before) > 20
    assert hashes(job.model) == before
    moved = [not torch.equal(p, weights[key]) for key, p in job.model.adapter_parameters("default").items()]
    assert sum(moved) > len(moved) / 2
    # And taking the adapter away gives back the very model that was in the folder.
    plain = job.model.unload()
    assert plain is base
    with torch.no_grad():
        setup, _ = load_base(str(job.options.model), job.task, dtype, job.data.names)
    theirs = dict(setup.named_parameters())
    for name, p in plain.named_parameters():
        if "classifier" not in name:  # a new head starts at random
            assert torch.equal(p, theirs[name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_adapter_to_the_byte(classify: Callable[..., TrainConfig], dtype: str) -> None:
    files = []
    for attempt, seed in enumerate((7, 7, 8)):
        random.seed(attempt)
        numpy.random.seed(attempt)
        torch.manual_seed(attempt)
        options = classify(seed=seed, dtype=dtype, overwrite=True, lora={"lora_dropout": 0.3})
        Trainer(prepare(options)).fit()
        files.append((Path(options.output) / WEIGHTS).read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_one_record_and_another_differ_in_nothing_but_the_clock(complete: Callable[..., TrainConfig]) -> None:
    records = [Trainer(prepare(complete(overwrite=True))).fit().record for _ in range(2)]
    for record in records:
        assert record.pop("seconds") > 0
        assert record.pop("tokens_per_second") > 0
        record.pop("record_sha256")  # follows the clock as well
    assert records[0] == records[1]


# What is told ---------------------------------------------------------------------------------------------


def test_the_record_is_what_happened(complete: Callable[..., TrainConfig]) -> None:
    seen: list[tuple[int, float]] = []
    options = complete(batch_size=8, epochs=1.5, max_steps=None, eval_split=20)
    job = prepare(options)
    result = Trainer(job, lambda event: seen.append((event.step, event.loss))).fit()
    record = record_in(options.output)
    assert record == json.loads(json.dumps(result.record))
    assert record["state"] == "finished"
    assert (record["data"]["rows"], record["data"]["evaluation_rows"]) == (80, 20)
    assert seen == list(enumerate(record["curve"]["loss"], 1))
    assert record["steps"] == len(seen) == 15  # one and a half times ten batches
    assert [e["step"] for e in record["curve"]["evaluations"]] == [10, 15]
    assert record["result"] == {k: v for k, v in record["curve"]["evaluations"][-1].items() if k != "step"}
    assert record["trainable_parameters"] == sum(p.numel() for p in job.model.adapter_parameters("default").values())
    assert record["base_parameters"] == job.plan.base_parameters
    lengths = job.data.train.lengths
    batches = bucketed(lengths, 8, 0, 0)
    assert record["data"]["padding_share"] == padding_share(lengths, batches)
    epoch = sum(lengths)
    assert record["tokens"] == epoch + sum(lengths[row] for batch in bucketed(lengths, 8, 0, 1)[:5] for row in batch)


def test_the_padding_share_is_that_of_the_batches_the_model_sees(classify: Callable[..., TrainConfig]) -> None:
    job = prepare(classify(batch_size=8, epochs=1, max_steps=None))
    examine(job)  # else a row of the first step is looked at once more
    places = tokens = 0

    def look(module: Any, args: Any, given: dict[str, Any]) -> None:
        nonlocal places, tokens
        if torch.is_grad_enabled():  # a step, and no evaluation
            places += given["attention_mask"].numel()
            tokens += int(given["attention_mask"].sum())

    job.model.get_base_model().register_forward_pre_hook(look, with_kwargs=True)
    Trainer(job).fit()
    assert tokens == sum(job.data.train.lengths)
    assert job.data.padding == pytest.approx(1 - tokens / places)
    assert job.data.padding > 0


def test_three_predictions_are_the_adapters_own(classify: Callable[..., TrainConfig]) -> None:
    job = prepare(classify(max_steps=40))
    result = Trainer(job).fit()
    assert len(result.predictions) == 3
    rows = job.data.validation_rows
    for said, (row, _) in zip(result.predictions, rows, strict=False):
        assert (said["input"], said["expected"]) == (row.fields["text"], row.fields["label"])
        with torch.no_grad():
            inputs = job.tokenizer(row.fields["text"], return_tensors="pt")
            shares = job.model.eval()(**inputs).logits[0].softmax(-1)
        assert said["predicted"] == f"{job.data.names[int(shares.argmax())]} ({float(shares.max()):.0%})"
    assert job.shown(3, BASE) != result.predictions


def test_a_completion_is_what_the_adapter_generates(complete: Callable[..., TrainConfig]) -> None:
    job = prepare(complete(max_steps=60, learning_rate=2e-2, lora={"lora_alpha": 32}))
    result = Trainer(job).fit()
    words = {row.fields["completion"].strip() for row, _ in job.data.validation_rows}
    for said, (row, _) in zip(result.predictions, job.data.validation_rows, strict=False):
        assert (said["input"], said["expected"]) == (row.fields["prompt"], row.fields["completion"].strip())
        assert set(said["predicted"].split()) <= words | {
            "good",
            "bad",
            "fine",
            "poor",
            "great",
            "weak",
            "lovely",
            "awful",
        }
        assert said["predicted"]


def test_fewer_rows_held_out_than_three_give_as_many_predictions(classify: Callable[..., TrainConfig]) -> None:
    assert len(Trainer(prepare(classify(eval_split=2, max_steps=1))).fit().predictions) == 2


# What is trained ------------------------------------------------------------------------------------------


def test_modules_that_came_without_weights_are_trained_saved_and_loaded(
    classify: Callable[..., TrainConfig], encoder_folder: Path, tmp_path: Path
) -> None:
    from transformers import BertModel

    folder = shutil.copytree(encoder_folder, tmp_path / "model")
    BertModel.from_pretrained(encoder_folder, add_pooling_layer=False).save_pretrained(folder)
    job = prepare(classify(model=folder))
    result = Trainer(job).fit()
    assert sorted(result.record["trained_in_full"]) == ["bert.pooler.dense", "classifier"]
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.no_grad():
        wanted = result.job.model.eval()(input_ids=ids).logits
    torch.manual_seed(123)
    base, _ = load_base(str(folder), TASKS["seq-cls"], "float32", job.data.names)
    again = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, wanted)


def test_validation_rows_can_be_a_file_of_their_own(
    classify: Callable[..., TrainConfig], tmp_path: Path, reviews: Path
) -> None:
    held_out = tmp_path / "held-out.csv"
    held_out.write_text("text,label\nthe good film,praise\nthe weak book,blame\n")
    record = Trainer(prepare(classify(eval_split=held_out, max_steps=1))).fit().record
    assert (record["data"]["rows"], record["data"]["evaluation_rows"]) == (200, 2)
    for path in (reviews, held_out):
        assert record["data"]["sha256"][str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()


# Nothing is lost ------------------------------------------------------------------------------------------


def saved(folder: str | Path, job: TrainJob) -> bool:
    """Is the adapter in ``folder`` the one in memory, to the bit?"""
    live = job.model.base_model.tensors_of("default")
    found = load_file(Path(folder) / WEIGHTS)
    return set(found) == set(live) and all(torch.equal(found[key], live[key]) for key in found)


def test_ctrl_c_ends_after_its_step_and_saves_the_adapter_with_its_figures(
    classify: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    job = prepare(classify(max_steps=10))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        Interrupted, match="stopped at step 4 of 10; the adapter as it was after step 4 is saved"
    ) as error:
        Trainer(job, at(4, ctrl_c)).fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert "press Ctrl-C again to end at once" in capsys.readouterr().err
    record = record_in(job.options.output)
    hashes = {record.pop(name) is not None for name in ("files", "record_sha256")}  # of what is written alone
    assert hashes == {True}
    assert record == json.loads(json.dumps(error.value.record))
    assert (record["state"], record["steps"]) == ("interrupted", 4)
    assert record["curve"]["evaluations"][-1]["step"] == 4
    assert {"loss", "accuracy"} <= record["result"].keys()
    assert saved(job.options.output, job)


def test_a_second_ctrl_c_ends_at_once_and_still_saves(classify: Callable[..., TrainConfig]) -> None:
    job = prepare(classify(max_steps=10))
    with pytest.raises(Interrupted, match="stopped at step 4 of 10; the adapter as it was after step 4 is saved"):
        Trainer(job, at(4, ctrl_c, ctrl_c)).fit()
    assert record_in(job.options.output)["curve"]["evaluations"] == []
    assert saved(job.options.output, job)


def test_ctrl_c_in_the_evaluation_that_follows_a_ctrl_c_loses_nothing(classify: Callable[..., TrainConfig]) -> None:
    job = prepare(classify(max_steps=10))
    evaluating: list[bool] = []

    def look(*_: Any) -> None:
        evaluating.append((Path(job.options.output) / WEIGHTS).exists())
        ctrl_c()

    def listen() -> None:
        job.model.get_base_model().register_forward_pre_hook(look)

    with pytest.raises(Interrupted, match="after step 4 is saved"):
        Trainer(job, at(4, ctrl_c, listen)).fit()
    assert evaluating == [True]
    assert saved(job.options.output, job)


def test_ctrl_c_before_the_first_step_leaves_the_run_file_alone(classify: Callable[..., TrainConfig]) -> None:
    job = prepare(classify())
    job.model.get_base_model().register_forward_pre_hook(lambda *_: at_once())
    with pytest.raises(Interrupted, match="stopped before the first step; nothing was trained") as error:
        Trainer(job).fit()
    assert error.value.record is None
    assert os.listdir(job.options.output) == [RUN_FILE]


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            MemoryError(),
            "step 3: out of memory; set gradient_checkpointing, with which it can resume, or start over with "
            "batch_size 8 and gradient_accumulation_steps 2, as many rows in a step; or a lower max_length than 64; or "
            "dtype bfloat16 (beside the model a step takes SIZE with batch_size 16, SIZE with batch_size 8, "
            "SIZE with batch_size 4, SIZE with batch_size 2); the adapter as it was after step 2 is saved",
        ),
        (RuntimeError("CUDA out of memory. Tried"), "step 3: out of memory; set gradient_checkpointing"),
        (RuntimeError("odd\nand more"), "step 3: RuntimeError: odd; the adapter as it was after step 2 is saved"),
        (TrainingError("step 3: why."), "step 3: why; the adapter as it was after step 2 is saved"),
    ],
)
def test_an_error_in_the_middle_is_told_and_the_adapter_saved(
    classify: Callable[..., TrainConfig], raised: Exception, said: str
) -> None:
    job = prepare(classify(max_steps=10))
    with pytest.raises(TrainingError) as error:
        Trainer(job, at(2, fail(raised))).fit()
    assert re.sub(r"[0-9.]+ [KM]iB", "SIZE", str(error.value)).startswith(said)
    assert error.value.__cause__ is raised
    assert record_in(job.options.output)["state"] == "failed"
    assert saved(job.options.output, job)


def test_an_error_before_the_first_step_is_itself(classify: Callable[..., TrainConfig]) -> None:
    job = prepare(classify())
    job.model.get_base_model().register_forward_pre_hook(lambda *_: fail(MemoryError())())
    with pytest.raises(MemoryError):
        Trainer(job).fit()
    assert os.listdir(job.options.output) == [RUN_FILE]


def test_an_exit_that_passes_through_saves_on_its_way(classify: Callable[..., TrainConfig]) -> None:
    job = prepare(classify(max_steps=10))
    with pytest.raises(SystemExit):  # what a closed terminal becomes
        Trainer(job, at(2, fail(SystemExit(1)))).fit()
    assert saved(job.options.output, job)


def test_a_run_that_diverges_leaves_json_that_every_parser_reads(classify: Callable[..., TrainConfig]) -> None:
    job = prepare(classify(learning_rate=1e30, warmup_ratio=0, eval_steps=1, max_steps=50))
    with pytest.raises(TrainingError, match=r"^step \d+: the loss is"):
        Trainer(job).fit()
    record = record_in(job.options.output)
    assert record["curve"]["evaluations"][-1]["loss"] is None


def test_a_folder_that_is_lost_sends_the_adapter_to_another(
    classify: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    job = prepare(classify())
    folder = Path(job.options.output)
    with pytest.raises(SaveError) as error:
        Trainer(job, at(1, lambda: shutil.rmtree(folder), lambda: folder.write_text("in the way"))).fit()
    (rescued,) = scratch.iterdir()
    assert f"The trained adapter is saved in {rescued} instead" in str(error.value)
    assert saved(rescued, job)
    assert record_in(rescued)["state"] == "finished"


def test_no_room_anywhere_is_said_and_leaves_no_rubbish(
    classify: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    job = prepare(classify())
    monkeypatch.setattr("loraloom.lora.checkpoint.save_file", fail_with_no_space)
    with pytest.raises(SaveError, match=f"No space left.*could not be saved in {scratch} either"):
        Trainer(job).fit()
    assert list(scratch.iterdir()) == []


def fail_with_no_space(*_: Any, **__: Any) -> NoReturn:
    raise OSError(28, "No space left on device")


def test_a_run_outside_the_main_thread_needs_no_signals(classify: Callable[..., TrainConfig]) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(Trainer(prepare(classify())).fit()))
    thread.start()
    thread.join(60)
    assert results[0].record["state"] == "finished"


# Nothing is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": "nothing.csv"}, DataError),
        ({"max_length": 999}, ConfigError),
        ({"lora": {"target_modules": ["nothing"]}}, ConfigError),
    ],
)
def test_a_run_that_cannot_start_leaves_no_folder_behind(
    classify: Callable[..., TrainConfig], tmp_path: Path, changes: dict[str, Any], error: type[LoraloomError]
) -> None:
    with pytest.raises(error):
        prepare(classify(output=tmp_path / "a" / "b" / "c", **changes))
    assert list(tmp_path.iterdir()) == []


def test_preparing_leaves_a_folder_that_was_there_as_it_was(
    classify: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    Trainer(prepare(classify())).fit()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
