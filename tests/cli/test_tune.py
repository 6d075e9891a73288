"""Promises of ``loraloom tune``: it says which configuration to use, and its file trains that."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloom.training.run_record import RUN_NAME


def test_a_search_says_which_to_use_and_its_file_trains_it(
    call: Callable[..., Any],
    encoder_folder: Path,
    reviews: Path,
    tmp_path: Path,
    snapshot: Callable[[Path], dict[str, str]],
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"task: seq-cls\nmodel: {{name: {encoder_folder}}}\ndata: {{train: {reviews}, validation: 40}}\n"
        "lora: {target_modules: all-linear}\ntrain: {max_steps: 144, batch_size: 16}\n"
        f"output: {tmp_path / 'search'}\ntune:\n  slots: 2\n  seeds: 1\n"
        "  finalists: 2\n  space: {lora.r: [2, 4], train.learning_rate: [5e-3, 7e-3]}\n"
    )
    arguments = ["tune", tmp_path / "run.yaml", "--set", "train.seed=3", "--trials", 4]
    ended = call(*arguments)
    assert (ended.code, ended.err) == (0, "")
    folder = tmp_path / "search"
    record = json.loads((folder / "result.json").read_text())
    assert {"best.yaml", "best", "result.json", "search.png", "tradeoff.png"} <= {*os.listdir(folder)}
    assert len(record["trials"]) == 6
    assert f"loraloom train {folder / 'best.yaml'}" in ended.out
    for name in ("best", "result.json", "search.png", "tradeoff.png"):
        assert str(folder / name) in ended.out
    # The same command says it again, and an option that makes it another search is refused.
    again = call(*arguments)
    assert again.code == 0
    conclusion = re.split(r"(?m)^(?=use |no configuration)", ended.out)[1]
    assert conclusion in again.out
    before = snapshot(folder)
    assert call(*arguments, "--seed", 4).code == 2
    assert snapshot(folder) == before
    ended = call("train", folder / "best.yaml", "--output", tmp_path / "full")
    assert ended.code == 0
    best = record["trials"][record["best"]["number"]]
    full = json.loads((tmp_path / "full" / RUN_NAME).read_text())
    assert full["result"]["accuracy"] == pytest.approx(best["metric"])
    assert full["options"]["seed"] == 3


def test_tunes_own_options_win_over_the_file(
    call: Callable[..., Any], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "tune: {trials: 5, sampler: grid, metric: accuracy, slots: 1, seeds: 0, space: {lora.r: [1, 2, 3]}}"
    )
    arguments = ["--model", encoder_folder, "--data", reviews, "--task", "seq-cls", "--output", tmp_path / "out"]
    given = ["--trials", 2, "--sampler", "random", "--metric", "loss", "--slots", 2, "--max-steps", 72]
    for option in ("train.batch_size=16", "lora.target_modules=all-linear", "train.learning_rate=0.015"):
        given += ["--set", option]
    given += ["--eval-split", 40]
    ended = call("tune", file, *arguments, *given)
    assert ended.code == 0
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(record["trials"]) == 2
    assert record["best"]["metric_name"] == "loss"
    assert record["machine"]["slots"] == 2
    padding = record["machine"]["padding"]
    assert 0 < padding < 1
    assert f"padding  {padding:.0%} of the positions that the model computed in training" in ended.out + ended.err


def test_the_chat_template_is_kept_with_the_best_adapter(
    call: Callable[..., Any], decoder_folder: Path, tmp_path: Path
) -> None:
    talks = [
        [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}] for word in ("good", "bad")
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks * 20))
    arguments = ["--model", decoder_folder, "--data", tmp_path / "a.jsonl", "--task", "causal-lm"]
    arguments.append("--allow-shared-rows")  # two talks, again and again
    given = ["--set", "tune.space={lora.r: [2, 4]}", "--set", "tune.seeds=0", "--trials", 2, "--slots", 2]
    for option in ("train.batch_size=8", "lora.target_modules=all-linear", "train.learning_rate=0.01"):
        given += ["--set", option]
    ended = call("tune", *arguments, *given, "--max-steps", 72, "--output", tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    assert "### Assistant:" in (tmp_path / "out" / "best" / "chat_template.jinja").read_text()


def test_tags_that_mark_no_entities_are_searched_by_the_accuracy_of_words(
    call: Callable[..., Any], encoder_folder: Path, tmp_path: Path
) -> None:
    tags = {"the": "DET", "film": "NOUN", "was": "VERB"}
    rows = [{"tokens": list(tags), "tags": list(tags.values())}] * 12
    data = tmp_path / "pos.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", encoder_folder, "--data", data, "--task", "token-cls", "--output", tmp_path / "o"]
    given += ["--trials", 2, "--max-steps", 2, "--preset", "quick", "--slots", 2, "--eval-split", 4]
    given.append("--allow-shared-rows")
    ended = call("tune", *given, "--set", "tune.space={lora.r: [2, 4]}")
    assert ended.code == 0, ended.err
    assert "training loss" in ended.out
    assert "f1" not in ended.out.replace("f1_macro", "").replace("f1_micro", "")
    assert "accuracy" in ended.out
    refused = call("tune", *given, "--set", "tune.space={lora.r: [2, 4]}", "--metric", "recall", "--overwrite")
    assert (refused.code, "metric: 'recall' is not measured of this data" in refused.err) == (2, True)
