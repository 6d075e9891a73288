"""Promises of ``loraloom train``: a run leaves what it says, and its options are those of the run file."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loraloom import LoraConfig, PeftModel
from loraloom.models.load import load_base
from loraloom.tasks import TASKS
from loraloom.training.run_record import RUN_NAME

WEIGHTS = "adapter_model.safetensors"


def classify(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    return ["train", "--model", model, "--data", data, "--task", "seq-cls", "--output", output, *more]


def complete(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    return ["train", "--model", model, "--data", data, "--task", "causal-lm", "--output", output, *more]


def as_csv(source: Path, path: Path) -> Path:
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_classifier_learns_and_leaves_adapter_record_and_plot(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "run"
    options = ["--epochs", 8, "--lr", 1e-2, "--lora-alpha", 32, "--target-modules", "all-linear", "--eval-split", 20]
    ended = call(*classify(encoder_folder, reviews, output, *options))
    assert (ended.code, ended.err) == (0, "")
    there = {name for name in os.listdir(output) if not name.startswith("checkpoint-")}
    assert there == {"adapter_config.json", WEIGHTS, "curves.png", RUN_NAME, "run.yaml", "usage.json", "tensorboard"}
    assert (output / "checkpoint-96").is_dir()
    record = json.loads((output / RUN_NAME).read_bytes())
    assert record["state"] == "finished"
    assert record["data"]["evaluation_rows"] == 20
    assert record["curve"]["evaluations"][-1]["loss"] < 0.75 * record["curve"]["evaluations"][0]["loss"]
    assert record["result"]["accuracy"] >= 0.75
    # What is printed is what is recorded, and where it is.
    for part in (f"accuracy {record['result']['accuracy']:.3f}", " after 96 steps in "):
        assert part in ended.out
    for name in ("", RUN_NAME, "curves.png"):
        assert str(output / name) in ended.out
    assert f"padding {record['data']['padding_share']:.1%}" in ended.out


def test_the_adapter_of_a_run_gives_the_recorded_accuracy_when_it_is_loaded(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join(reviews.read_text().splitlines(keepends=True)[:30]))
    options = ["--max-steps", 30, "--lr", 1e-2, "--eval-split", held_out]
    assert call(*classify(encoder_folder, reviews, tmp_path / "run", *options)).code == 0
    record = json.loads((tmp_path / "run" / RUN_NAME).read_bytes())
    torch.manual_seed(99)  # another new head, which the adapter's own must replace
    base, _ = load_base(str(encoder_folder), TASKS["seq-cls"], "float32", record["data"]["labels"])
    model = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    with torch.no_grad():
        best = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]
    right = [record["data"]["labels"][i] == row["label"] for i, row in zip(best, rows, strict=True)]
    assert sum(right) / 30 == pytest.approx(record["result"]["accuracy"])


def test_a_csv_file_trains_the_same_bytes_as_a_jsonl_file(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    table = as_csv(reviews, tmp_path / "reviews.csv")
    for name, data in (("a", reviews), ("b", table)):
        assert call(*classify(encoder_folder, data, tmp_path / name, "--max-steps", 3)).code == 0
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_a_decoder_learns_completions_and_shows_three_of_them(
    call: Callable[..., Any], decoder_folder: Path, chats: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    ended = call(*complete(decoder_folder, as_csv(chats, tmp_path / "chats.csv"), output, "--epochs", 5, "--lr", 2e-2))
    assert (ended.code, ended.err) == (0, "")
    record = json.loads((output / RUN_NAME).read_bytes())
    losses = record["curve"]["loss"]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert record["result"]["perplexity"] == pytest.approx(2.718281828459045 ** record["result"]["loss"])
    table = ended.out[ended.out.index("held-out text") :].splitlines()
    assert len([line for line in table if "now say :" in line]) == 3


def test_a_column_of_plain_text_trains_a_decoder(
    call: Callable[..., Any], decoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    ended = call(*complete(decoder_folder, reviews, tmp_path / "run", "--max-steps", 2))
    assert (ended.code, ended.err) == (0, "")


def test_a_decoder_can_be_a_classifier(
    call: Callable[..., Any], decoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    assert call(*classify(decoder_folder, reviews, tmp_path / "run", "--max-steps", 2)).code == 0
    keys = load_file(tmp_path / "run" / WEIGHTS)
    assert "base_model.model.score.weight" in keys


def test_every_option_is_in_the_record(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    plain = {
        "eval-split": 11, "epochs": 2.5, "max-steps": 3, "batch-size": 5, "eval-batch-size": 7, "learning-rate": 0.125,
        "weight-decay": 0.25, "warmup-ratio": 0.5, "max-grad-norm": 2.0, "eval-steps": 2, "max-length": 9, "seed": 4,
        "dtype": "bfloat16", "gradient-accumulation-steps": 2, "lr-scheduler-type": "cosine", "loraplus-lr-ratio": 4.0,
    }  # fmt: skip
    lora = {
        "r": 3, "lora-alpha": 5.0, "lora-dropout": 0.125, "bias": "lora_only", "init-lora-weights": "gaussian",
        "target-modules": "query,dense", "exclude-modules": "pooler.dense", "modules-to-save": "LayerNorm",
        "rank-pattern": '{"query": 2}', "alpha-pattern": '{"query": 7}', "layers-to-transform": "0,1",
    }  # fmt: skip
    given = [part for key, value in {**plain, **lora}.items() for part in (f"--{key}", value)]
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run", *given, "--use-rslora", "--overwrite"))
    assert (ended.code, ended.err) == (0, "")
    record = json.loads((tmp_path / "run" / RUN_NAME).read_bytes())
    found = record["options"]
    assert {key: found[key.replace("-", "_")] for key in plain} == plain
    assert (found["model"], found["data"], found["task"]) == (str(encoder_folder), str(reviews), "seq-cls")
    assert found["output"] == str(tmp_path / "run")
    assert found["overwrite"] is True
    wanted = LoraConfig(
        r=3, lora_alpha=5, lora_dropout=0.125, bias="lora_only", init_lora_weights="gaussian", use_rslora=True,
        target_modules=["query", "dense"], exclude_modules=["pooler.dense"], modules_to_save=["LayerNorm"],
        rank_pattern={"query": 2}, alpha_pattern={"query": 7}, layers_to_transform=[0, 1], task_type="SEQ_CLS",
    )  # fmt: skip
    assert found["lora"] == wanted.to_dict()
    assert record["data"]["sha256"] == {str(reviews): hashlib.sha256(reviews.read_bytes()).hexdigest()}
    assert set(record["versions"]) == {"python", "loraloom", "torch", "transformers"}
    assert [e["step"] for e in record["curve"]["evaluations"]] == [2, 3]
    assert len(record["curve"]["loss"]) == len(record["curve"]["learning_rate"]) == record["steps"] == 3


def test_a_run_file_is_the_same_run_as_its_options_and_options_win_over_it(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"task: seq-cls\nmodel: {{name: {encoder_folder}}}\ndata: {{train: {reviews}, validation: 11}}\n"
        "lora: {r: 3, lora_alpha: 6, target_modules: [query, dense], rank_pattern: {query: 2}}\n"
        f"train: {{learning_rate: 1e-3, max_steps: 2, seed: 4}}\noutput: {tmp_path / 'file'}\ntune: {{trials: 3}}\n"
    )
    ended = call("train", tmp_path / "run.yaml", "--set", "train.seed=5", "--set", "lora.bias=all", "--r", 4)
    assert (ended.code, ended.err) == (0, "")
    given = [
        "--eval-split", 11, "--r", 4, "--lora-alpha", 6, "--lora-dropout", 0, "--target-modules", "query,dense",
        "--rank-pattern", '{"query": 2}', "--lr", 1e-3, "--max-steps", 2, "--seed", 5, "--bias", "all",
    ]  # fmt: skip
    assert call(*classify(encoder_folder, reviews, tmp_path / "options", *given)).code == 0
    of_file, of_options = (json.loads((tmp_path / name / RUN_NAME).read_bytes()) for name in ("file", "options"))
    assert of_file["options"] == of_options["options"] | {"output": str(tmp_path / "file")}
    assert (tmp_path / "file" / WEIGHTS).read_bytes() == (tmp_path / "options" / WEIGHTS).read_bytes()


def test_an_option_that_is_given_wins_over_the_file_even_at_its_default(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora: {r: 3}\ntrain: {max_steps: 1, seed: 4}\n")
    assert call("train", file, *classify(encoder_folder, reviews, tmp_path / "run", "--seed", 0)[1:]).code == 0
    found = json.loads((tmp_path / "run" / RUN_NAME).read_bytes())["options"]
    assert (found["seed"], found["lora"]["r"], found["max_steps"]) == (0, 3, 1)


def test_max_length_follows_the_model_unless_it_is_given(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    assert call(*classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 1)).code == 0
    assert json.loads((tmp_path / "run" / RUN_NAME).read_bytes())["options"]["max_length"] == 64


def test_an_adapter_is_replaced_only_when_asked(
    call: Callable[..., Any],
    encoder_folder: Path,
    reviews: Path,
    tmp_path: Path,
    snapshot: Callable[[Path], dict[str, str]],
) -> None:
    arguments = classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 1)
    assert call(*arguments).code == 0
    before = snapshot(tmp_path)
    ended = call(*arguments, "--seed", 1)
    assert ended.code == 2
    assert "holds an adapter already" in ended.err
    assert "--overwrite" in ended.err
    assert snapshot(tmp_path) == before
    assert call(*arguments, "--seed", 1, "--overwrite").code == 0
    assert snapshot(tmp_path)[f"run/{WEIGHTS}"] != before[f"run/{WEIGHTS}"]


def test_targets_that_were_found_in_the_model_are_said_once(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraloom.lora.presets import TARGET_MODULES

    monkeypatch.delitem(TARGET_MODULES, "bert")
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run", "--dry-run", "--set", "lora.target_modules=null"))
    assert ended.code == 0
    said = "model type 'bert' has no preset: query, value were found in the model"
    assert " ".join((ended.out + ended.err).split()).count(said) == 1
