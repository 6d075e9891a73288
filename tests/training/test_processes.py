"""Promises of several processes: two give what one gives, with the base whole on each or in parts, and save all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from loraloom import PeftModel
from loraloom.lora.checkpoint import WEIGHTS_NAME
from loraloom.models.load import load_base
from loraloom.tasks import TASKS
from loraloom.training.run_record import RUN_NAME

OPTIONS = ["--max-steps", 7, "--batch-size", 5, "--gradient-accumulation-steps", 2, "--target-modules", "all-linear"]
OPTIONS += ["--lora-dropout", 0]  # masks are drawn by each process for its rows
OPTIONS += ["--eval-steps", 3, "--save-steps", 3, "--device", "cpu", "--report-to", "none"]


#: What starts several processes.
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes")


def train(count: int, *arguments: object, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess[str]:
    started = ["-m", *launcher, str(count)] if count > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *started, "-m", "loraloom.cli", "train", *map(str, [*OPTIONS, *arguments])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def trained(
    count: int, output: Path, *arguments: object, launcher: tuple[str, ...] = TORCHRUN
) -> tuple[dict[str, Any], Path]:
    ended = train(count, *arguments, "--output", output, launcher=launcher)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    return json.loads((output / RUN_NAME).read_bytes()), output / WEIGHTS_NAME


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "launcher"), [("causal-lm", TORCHRUN), ("seq-cls", TORCHRUN), ("causal-lm", ACCELERATE)]
)
def test_two_processes_give_what_one_gives_and_save_the_whole_adapter(
    task: str,
    launcher: tuple[str, ...],
    decoder_folder: Path,
    encoder_folder: Path,
    chats: Path,
    reviews: Path,
    tmp_path: Path,
) -> None:
    folder, data = (decoder_folder, chats) if task == "causal-lm" else (encoder_folder, reviews)
    # Not Adam: it divides by gradients, and where one is next to nothing, the order of a sum shows.
    given = ["--model", folder, "--data", data, "--task", task, "--optim", "SGD", "--lr", 0.5]
    one, alone = trained(1, tmp_path / "one", *given)
    two, shared = trained(2, tmp_path / "two", *given, launcher=launcher)
    assert two["curve"]["loss"] == pytest.approx(one["curve"]["loss"], rel=1e-6)
    for ours, theirs in zip(two["curve"]["evaluations"], one["curve"]["evaluations"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert two["curve"]["loss"][-1] < two["curve"]["loss"][0]
    mine, whole = load_file(shared), load_file(alone)
    assert mine.keys() == whole.keys()
    for key, tensor in whole.items():
        assert float((mine[key] - tensor).abs().max()) <= 1e-6, key
    base, _ = load_base(str(folder), TASKS[task], "float32", ["blame", "praise"])
    PeftModel.from_pretrained(base, shared.parent)


@pytest.mark.slow
def test_two_processes_go_on_to_the_byte_and_a_base_in_parts_changes_nothing(
    decoder_folder: Path, chats: Path, tmp_path: Path
) -> None:
    given = ["--model", decoder_folder, "--data", chats, "--task", "causal-lm", "--lora-dropout", 0.1]
    _, whole = trained(2, tmp_path / "whole", *given)
    record, again = trained(2, tmp_path / "again", *given, "--resume", tmp_path / "whole" / "checkpoint-3")
    assert record["resumed_at"] == [3]
    assert again.read_bytes() == whole.read_bytes()
    _, parts = trained(2, tmp_path / "parts", *given, "--fsdp")
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["causal-lm", "seq2seq-lm"])
def test_metrics_of_generated_texts_are_the_same_with_a_base_in_parts(
    task: str, decoder_folder: Path, translator_folder: Path, chats: Path, tmp_path: Path
) -> None:
    folder = decoder_folder if task == "causal-lm" else translator_folder
    if task == "seq2seq-lm":
        rows = [json.loads(line) for line in chats.read_text().splitlines()]
        pairs = [{"source": row["prompt"], "target": row["completion"].strip()} for row in rows]
        chats = tmp_path / "pairs.jsonl"
        chats.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    given = ["--model", folder, "--data", chats, "--task", task, "--optim", "SGD", "--lr", 0.5, "--eval-split", 11]
    given += ["--metrics", "rouge1,exact_match", "--max-new-tokens", 9, "--eval-batch-size", 3]
    one, alone = trained(1, tmp_path / "one", *given)
    two, shared = trained(2, tmp_path / "two", *given, "--fsdp")
    for ours, theirs in zip(two["curve"]["evaluations"], one["curve"]["evaluations"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    assert {"rouge1", "exact_match"} < one["curve"]["evaluations"][-1].keys()
    assert task == "seq2seq-lm" or one["curve"]["evaluations"][-1]["rouge1"] > 0
    mine = load_file(shared)
    for key, tensor in load_file(alone).items():
        assert float((mine[key] - tensor).abs().max()) <= 1e-6, key


@pytest.mark.slow
def test_one_process_where_accelerate_was_asked_for_two_is_said(
    decoder_folder: Path, chats: Path, tmp_path: Path
) -> None:
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes")
    given = ["--model", decoder_folder, "--data", chats, "--task", "causal-lm", "--output", tmp_path / "o"]
    ended = train(2, *given, "--dry-run", launcher=launcher)
    assert (ended.returncode, "warning: accelerate launch started only one process" in ended.stdout) == (0, True)


@pytest.mark.slow
def test_what_the_user_got_wrong_is_said_once_and_ends_all_processes(decoder_folder: Path, tmp_path: Path) -> None:
    given = ["--model", decoder_folder, "--data", tmp_path / "none.jsonl", "--task", "causal-lm"]
    ended = train(2, *given, "--output", tmp_path / "o")
    assert ended.returncode != 0
    assert "none.jsonl: no such file" in ended.stderr
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.json").write_text("{}")
    ended = train(2, *given, "--output", tmp_path / "held")
    assert "holds a model; choose another folder" in ended.stderr


def test_a_base_in_parts_needs_several_processes(decoder_folder: Path, chats: Path, tmp_path: Path) -> None:
    given = ["--model", decoder_folder, "--data", chats, "--task", "causal-lm", "--fsdp", "--output", tmp_path / "o"]
    ended = train(1, *given)
    assert (ended.returncode, "fsdp: needs several processes" in ended.stderr) == (2, True)
