"""Promises of the command line: real runs leave real files; whatever goes wrong is one message and the right code."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loraloom
from loraloom import LoraConfig, PeftModel
from loraloom.cli import _run, main
from loraloom.errors import AdapterError
from loraloom.train.load import load_base
from loraloom.train.options import TASKS
from loraloom.train.run import RUN_NAME

WEIGHTS = "adapter_model.safetensors"


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = _run([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return run


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loraloom.cli", *map(str, arguments)]


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below ``folder`` with the hash of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


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


@pytest.fixture(scope="session")
def trained(encoder_folder: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that ``loraloom train`` wrote."""
    output = tmp_path_factory.mktemp("trained") / "adapter"
    assert (
        _run([*map(str, classify(encoder_folder, reviews, output, "--max-steps", 2, "--init-lora-weights", "false"))])
        == 0
    )
    return output


# Training -------------------------------------------------------------------------------------------------


def test_a_classifier_learns_and_leaves_adapter_record_and_plot(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "run"
    options = ["--epochs", 8, "--lr", 1e-2, "--lora-alpha", 32, "--target-modules", "all-linear", "--eval-split", 20]
    ended = call(*classify(encoder_folder, reviews, output, *options))
    assert (ended.code, ended.err) == (0, "")
    assert sorted(os.listdir(output)) == ["adapter_config.json", WEIGHTS, "curves.png", RUN_NAME]
    record = json.loads((output / RUN_NAME).read_bytes())
    assert record["state"] == "finished"
    assert record["data"]["evaluation_rows"] == 20
    assert record["curve"]["evaluations"][-1]["loss"] < 0.75 * record["curve"]["evaluations"][0]["loss"]
    assert record["result"]["accuracy"] >= 0.75
    # What is printed is what is recorded, and where it is.
    assert f"accuracy {record['result']['accuracy']:.3f} after 96 steps" in ended.out
    for name in ("", RUN_NAME, "curves.png"):
        assert str(output / name) in ended.out
    assert f"padding {record['data']['padding_share']:.1%}" in ended.out


def test_the_adapter_of_a_run_gives_the_recorded_accuracy_when_it_is_loaded(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
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
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    table = as_csv(reviews, tmp_path / "reviews.csv")
    for name, data in (("a", reviews), ("b", table)):
        assert call(*classify(encoder_folder, data, tmp_path / name, "--max-steps", 3)).code == 0
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_a_decoder_learns_completions_and_shows_three_of_them(
    call: Callable[..., Ended], decoder_folder: Path, chats: Path, tmp_path: Path
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
    call: Callable[..., Ended], decoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    ended = call(*complete(decoder_folder, reviews, tmp_path / "run", "--max-steps", 2))
    assert (ended.code, ended.err) == (0, "")


def test_a_decoder_can_be_a_classifier(
    call: Callable[..., Ended], decoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    assert call(*classify(decoder_folder, reviews, tmp_path / "run", "--max-steps", 2)).code == 0
    keys = load_file(tmp_path / "run" / WEIGHTS)
    assert "base_model.model.score.weight" in keys


def test_every_option_is_in_the_record(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
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
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"task: seq-cls\nmodel: {{name: {encoder_folder}}}\ndata: {{train: {reviews}, validation: 11}}\n"
        "lora: {r: 3, lora_alpha: 6, target_modules: [query, dense], rank_pattern: {query: 2}}\n"
        f"train: {{learning_rate: 1e-3, max_steps: 2, seed: 4}}\noutput: {tmp_path / 'file'}\ntune: {{trials: 3}}\n"
    )
    ended = call("train", tmp_path / "run.yaml", "--set", "train.seed=5", "--set", "lora.bias=all", "--r", 4)
    assert (ended.code, ended.err) == (0, "")
    given = [
        "--eval-split", 11, "--r", 4, "--lora-alpha", 6, "--target-modules", "query,dense",
        "--rank-pattern", '{"query": 2}', "--lr", 1e-3, "--max-steps", 2, "--seed", 5, "--bias", "all",
    ]  # fmt: skip
    assert call(*classify(encoder_folder, reviews, tmp_path / "options", *given)).code == 0
    of_file, of_options = (json.loads((tmp_path / name / RUN_NAME).read_bytes()) for name in ("file", "options"))
    assert of_file["options"] == of_options["options"] | {"output": str(tmp_path / "file")}
    assert (tmp_path / "file" / WEIGHTS).read_bytes() == (tmp_path / "options" / WEIGHTS).read_bytes()


def test_an_option_that_is_given_wins_over_the_file_even_at_its_default(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora: {r: 3}\ntrain: {max_steps: 1, seed: 4}\n")
    assert call("train", file, *classify(encoder_folder, reviews, tmp_path / "run", "--seed", 0)[1:]).code == 0
    found = json.loads((tmp_path / "run" / RUN_NAME).read_bytes())["options"]
    assert (found["seed"], found["lora"]["r"], found["max_steps"]) == (0, 3, 1)


def test_max_length_follows_the_model_unless_it_is_given(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    assert call(*classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 1)).code == 0
    assert json.loads((tmp_path / "run" / RUN_NAME).read_bytes())["options"]["max_length"] == 64


def test_an_adapter_is_replaced_only_when_asked(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
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


# Tuning ---------------------------------------------------------------------------------------------------


def test_a_search_says_which_to_use_and_its_file_trains_it(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"task: seq-cls\nmodel: {{name: {encoder_folder}}}\ndata: {{train: {reviews}, validation: 40}}\n"
        f"train: {{max_steps: 9, batch_size: 8}}\noutput: {tmp_path / 'search'}\ntune:\n  slots: 2\n  seeds: 1\n"
        "  finalists: 2\n  space: {lora.r: [2, 4], train.learning_rate: [1e-3, 1e-2]}\n"
    )
    arguments = ["tune", tmp_path / "run.yaml", "--set", "train.seed=3", "--trials", 4]
    ended = call(*arguments)
    assert (ended.code, ended.err) == (0, "")
    folder = tmp_path / "search"
    record = json.loads((folder / "result.json").read_text())
    assert {"best.yaml", "best", "result.json", "search.png", "pareto.png"} <= {*os.listdir(folder)}
    assert len(record["trials"]) == 6
    assert f"loraloom train {folder / 'best.yaml'}" in ended.out
    for name in ("best", "result.json", "search.png", "pareto.png"):
        assert str(folder / name) in ended.out
    # The same command says it again, and an option that makes it another search is refused.
    again = call(*arguments)
    assert again.code == 0
    conclusion = ended.out[ended.out.index("use ") :]
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
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "tune: {trials: 5, sampler: grid, metric: accuracy, slots: 1, seeds: 0, space: {lora.r: [1, 2, 3]}}"
    )
    arguments = ["--model", encoder_folder, "--data", reviews, "--task", "seq-cls", "--output", tmp_path / "out"]
    given = ["--trials", 2, "--sampler", "random", "--metric", "loss", "--slots", 2, "--max-steps", 1]
    assert call("tune", file, *arguments, *given).code == 0
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(record["trials"]) == 2
    assert record["best"]["metric_name"] == "loss"
    assert record["machine"]["slots"] == 2


# Plan and inspect -----------------------------------------------------------------------------------------


def test_a_plan_shows_modules_totals_and_memory_from_the_config_alone(
    call: Callable[..., Ended], decoder_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(decoder_folder / "config.json", tmp_path)
    ended = call("plan", "--model", tmp_path, "--task", "causal-lm", "--r", 4, "--batch-size", 3, "--max-length", 10)
    assert (ended.code, ended.err) == (0, "")
    assert "model.layers.1.self_attn.v_proj" in ended.out
    assert f"{4 * (2 * (32 + 32) + 2 * (32 + 16)):,} of" in ended.out
    assert "3 rows of 10 tokens in float32" in ended.out
    for part in ("frozen model", "adapter", "its gradients", "AdamW", "kept for backward", "in all"):
        assert part in ended.out
    assert os.listdir(tmp_path) == ["config.json"]


def test_an_adapter_is_shown_with_norms_and_the_rank_it_uses(call: Callable[..., Ended], trained: Path) -> None:
    ended = call("inspect", trained)
    assert (ended.code, ended.err) == (0, "")
    # Whole names, at any width of the terminal: they are what the user copies into target_modules.
    for name in ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.value"):
        assert f"\n{name} " in ended.out
    assert "classifier.weight: 2×32, in full" in ended.out
    assert "init_lora_weights: False" in ended.out


def test_the_singular_values_of_inspect_are_those_of_the_whole_update(
    call: Callable[..., Ended], trained: Path
) -> None:
    found = json.loads(call("inspect", trained, "--json").out)
    tensors = load_file(trained / WEIGHTS)
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert found["config"]["task_type"] == "SEQ_CLS"
    assert len(found["updates"]) == 4
    for update in found["updates"]:
        key = f"base_model.model.{update['name']}.lora_"
        delta = tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()
        values = torch.linalg.svdvals(delta)[:8]
        assert update["singular_values"] == pytest.approx(values.tolist(), rel=1e-6, abs=1e-9)
        assert update["norm"] == pytest.approx(float(delta.norm()))
        assert update["used_rank"] == int((values.square().cumsum(0) < 0.99 * values.square().sum()).sum()) + 1


# The program itself ---------------------------------------------------------------------------------------


def test_help_lists_the_commands_and_every_option(call: Callable[..., Ended]) -> None:
    ended = call("--help")
    assert ended.code == 0
    for word in ("train", "tune", "plan", "inspect", "--version"):
        assert word in ended.out
    ended = call("tune", "-h")
    assert ended.code == 0
    for word in ("--preset", "--trials", "--sampler", "--metric", "--slots", "--memory", "--set", "RUN.yaml"):
        assert word in ended.out
    ended = call("train", "-h")
    assert ended.code == 0
    for word in (
        "--eval-split",
        "--max-steps",
        "--lr",
        "--dtype",
        "--max-length",
        "--target-modules",
        "--r ",
        "--set",
        "RUN.yaml",
    ):
        assert word in ended.out


def test_the_version_is_that_of_the_package(call: Callable[..., Ended]) -> None:
    assert call("--version") == Ended(0, f"loraloom {loraloom.__version__}\n", "")


def test_main_exits_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2
    assert "trian" in capsys.readouterr().err


def test_the_program_is_installed_and_help_loads_no_model_library() -> None:
    program = Path(sys.executable).with_name("loraloom")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"loraloom {loraloom.__version__}\n"
    code = (
        "import sys, loraloom.cli as cli; cli._run(['train', '-h']); print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


# Bad input ------------------------------------------------------------------------------------------------


@dataclass
class World:
    """What the rows of the table are made from. Everything they write lies in ``tmp``."""

    tmp: Path
    encoder: Path
    decoder: Path
    reviews: Path
    chats: Path
    adapter: Path

    def file(self, name: str, text: str) -> Path:
        path = self.tmp / name
        path.write_text(text, encoding="utf-8")
        return path

    def put(self, folder: Path, name: str, text: str) -> Path:
        """``folder``, with a file in it."""
        (folder / name).write_text(text, encoding="utf-8")
        return folder

    def copy(self, source: Path) -> Path:
        return Path(shutil.copytree(source, self.tmp / "copy"))

    def cut(self, source: Path, name: str) -> Path:
        """A copy of a folder with a file that ends too early."""
        folder = self.copy(source)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) - 100])
        return folder

    def config(self, source: Path, **changes: Any) -> Path:
        folder = self.copy(source)
        values = json.loads((folder / "config.json").read_bytes())
        (folder / "config.json").write_text(json.dumps(values | changes))
        return folder

    def without(self, source: Path, *names: str) -> Path:
        folder = self.copy(source)
        for name in names:
            (folder / name).unlink()
        return folder

    def train(self, *more: object, model: object = None, data: object = None, task: str = "seq-cls") -> list[object]:
        model, data = model or self.encoder, data or (self.chats if task == "causal-lm" else self.reviews)
        arguments = ["train", "--model", model, "--data", data, "--task", task, "--max-steps", "1"]
        return [*arguments, *([] if "--output" in more else ["--output", self.tmp / "out"]), *more]

    def tune(self, *more: object, space: object = None, data: object = None, task: str = "seq-cls") -> list[object]:
        """A search over two ranks, in slots that need no measuring."""
        chosen = {"lora.r": [2, 4]} if space is None else space
        model, data = self.decoder if task == "causal-lm" else self.encoder, data or self.reviews
        arguments = ["tune", "--model", model, "--data", data, "--task", task, "--max-steps", 1, "--slots", 2]
        arguments += [] if "--output" in more else ["--output", self.tmp / "out"]
        return [*arguments, "--set", f"tune.space={json.dumps(chosen)}", *more]

    def searched(self, text: str) -> Path:
        """A folder with a ``search.json`` of ``text``."""
        folder = self.tmp / "out"
        folder.mkdir()
        (folder / "search.json").write_text(text)
        return folder

    def rows(self, *rows: object) -> Path:
        good = [{"text": "good film", "label": "a"}, {"text": "bad film", "label": "b"}] * 5
        return self.file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in [*good, *rows]))


LABELLED = '{"text": "good", "label": "a"}\n'

BAD_INPUT: dict[str, tuple[Callable[[World], list[object]], list[str]]] = {
    # the data
    "a missing file": (lambda w: w.train(data=w.tmp / "rveiews.jsonl"), ["rveiews.jsonl: no such file"]),
    "a missing file with a neighbour": (
        lambda w: (w.file("rows.jsonl", LABELLED), w.train(data=w.tmp / "row.jsonl"))[1],
        ["row.jsonl: no such file; did you mean 'rows.jsonl'?"],
    ),
    "an empty file": (lambda w: w.train(data=w.file("a.jsonl", "")), ["a.jsonl: the file is empty"]),
    "a header alone": (lambda w: w.train(data=w.file("a.csv", "text,label\n")), ["a.csv: the file is empty"]),
    "a folder as data": (lambda w: w.train(data=w.tmp), ["a directory, where a data file"]),
    "a file of another kind": (lambda w: w.train(data=w.file("a.txt", "x")), ["'.txt'", ".jsonl", ".csv"]),
    "a line that is not JSON": (
        lambda w: w.train(data=w.file("a.jsonl", LABELLED + "\n{oops}\n")),
        ["a.jsonl, line 3: not JSON"],
    ),
    "a row with too many fields": (
        lambda w: w.train(data=w.file("a.csv", "text,label\ngood,a\nbad, really,b\n")),
        ["a.csv, line 3: 3 fields, where the header has 2"],
    ),
    "not UTF-8": (
        lambda w: ((w.tmp / "a.csv").write_bytes(b"text,label\ncaf\xe9,a\n"), w.train(data=w.tmp / "a.csv"))[1],
        ["a.csv, line 2: not UTF-8", "save the file as UTF-8"],
    ),
    "a missing column": (
        lambda w: w.train(data=w.rows({"text": "good", "lable": "a"})),
        ["rows.jsonl, line 11: no column 'label'", "'text', 'lable'", "did you mean 'lable'?"],
    ),
    "the columns of another task": (lambda w: w.train(data=w.chats), ["line 1: no column 'text'", "'prompt'"]),
    "half of the columns": (
        lambda w: w.train(task="causal-lm", model=w.decoder, data=w.file("a.csv", "prompt,answer\na,b\n")),
        ["a.csv, line 2: no column 'completion'", "'answer'"],
    ),
    "an empty text": (lambda w: w.train(data=w.rows({"text": " ", "label": "a"})), ["line 11: 'text' is empty"]),
    "one class only": (
        lambda w: w.train(data=w.file("a.jsonl", LABELLED * 20)),
        ["a.jsonl: a classifier needs two classes or more; all 20 rows are labelled 'a'"],
    ),
    "one row": (lambda w: w.train(data=w.file("a.csv", "text,label\ngood,a\n")), ["two classes"]),
    "a label never seen in training": (
        lambda w: w.train("--eval-split", w.file("eval.csv", "text,label\nfine,praise\nweak,blaem\n")),
        ["eval.csv, line 3: the label 'blaem' is never seen in training", "did you mean 'blame'?"],
    ),
    "a missing validation file": (lambda w: w.train("--eval-split", w.tmp / "eval.csv"), ["eval.csv: no such file"]),
    "more rows held out than there are": (
        lambda w: w.train("--eval-split", 200),
        ["200 of 200 rows cannot be held out", "give more rows or hold out fewer"],
    ),
    "a prompt that leaves no room": (
        lambda w: w.train("--max-length", 3, task="causal-lm", model=w.decoder),
        ["chats.jsonl, line 1", "nothing of 'completion' is left to train on within max_length=3", "raise max_length"],
    ),
    # the model
    "no such folder": (lambda w: w.train(model=w.tmp / "nothing"), ["nothing: no such folder"]),
    "no such name": (lambda w: w.train(model="nothing-here"), ["nothing-here", "no folder of this name is here"]),
    "a folder that is no model": (lambda w: w.train(model=w.tmp), ["holds no config.json, so it is no model"]),
    "a file as model": (
        lambda w: w.train(model=w.encoder / "model.safetensors"),
        ["model.safetensors: is a file; a model is a folder"],
    ),
    "an adapter as model": (
        lambda w: w.train(model=w.adapter),
        ["so it is no model; it is an adapter: give the model that it was trained on"],
    ),
    "a truncated model": (
        lambda w: w.train(model=w.cut(w.encoder, "model.safetensors")),
        ["copy/model.safetensors: cut off or damaged", "copy it again"],
    ),
    "a model without weights": (
        lambda w: w.train(model=w.without(w.encoder, "model.safetensors")),
        ["cannot be loaded as a model for seq-cls", "model.safetensors"],
    ),
    "a model without a tokenizer": (
        lambda w: w.train(model=w.without(w.encoder, "tokenizer.json", "tokenizer_config.json")),
        ["holds no tokenizer", "tokenizer.json"],
    ),
    "a config that is not JSON": (
        lambda w: w.train(model=w.put(w.copy(w.encoder), "config.json", "{")),
        ["its config cannot be read", "not a valid JSON file"],
    ),
    "a tokenizer that is not JSON": (
        lambda w: w.train(model=w.put(w.copy(w.encoder), "tokenizer.json", "{")),
        ["its tokenizer cannot be loaded"],
    ),
    "a model type that nobody knows": (
        lambda w: w.train(model=w.config(w.encoder, model_type="brand-new", architectures=None)),
        ["brand-new"],
    ),
    "weights of fewer layers than the config": (
        lambda w: w.train(model=w.config(w.encoder, num_hidden_layers=3)),
        ["16 weights are not in its file", "bert.encoder.layer.2.", "config.json"],
    ),
    "weights of another size than the config": (
        lambda w: w.train(model=w.config(w.decoder, intermediate_size=80), task="causal-lm"),
        ["6 weights are of another size in its file", "mlp", "config.json"],
    ),
    "a decoder without its language head": (
        lambda w: w.train(model=w.config(w.encoder, is_decoder=True), task="causal-lm"),
        ["weights are not in its file", "cls.predictions"],
    ),
    "an encoder for a task that reads forwards": (
        lambda w: w.train(task="causal-lm"),
        ["bert reads a text in both directions", "seq-cls"],
    ),
    "more tokens than the model reads": (
        lambda w: w.train("--max-length", 65),
        ["max_length:", "reads at most 64 tokens, found 65"],
    ),
    # the adapter's options
    "a target that matches nothing": (
        lambda w: w.train("--target-modules", "query,vlaue"),
        ["target_modules: 'vlaue' matches no module", "did you mean 'value' (2 modules)?"],
    ),
    "an expression that matches nothing": (
        lambda w: w.train("--target-modules", ".*q_proj"),
        ["target_modules: '.*q_proj' matches no module", "query (2)"],
    ),
    "an expression that is none": (lambda w: w.train("--target-modules", "(["), ["target_modules: '(['"]),
    "no target at all": (lambda w: w.train("--target-modules", " , "), ["target_modules: holds no name"]),
    "an exclusion that matches nothing": (lambda w: w.train("--exclude-modules", "foo"), ["exclude_modules: 'foo'"]),
    "a saved module that is not there": (lambda w: w.train("--modules-to-save", "foo"), ["modules_to_save: 'foo'"]),
    "a rank pattern that matches nothing": (
        lambda w: w.train("--rank-pattern", '{"quer": 4}'),
        ["rank_pattern: 'quer' matches no adapted module; did you mean 'query'"],
    ),
    "a pattern that is not JSON": (lambda w: w.train("--alpha-pattern", "query=4"), ["alpha_pattern: not JSON"]),
    "a pattern that is no object": (lambda w: w.train("--rank-pattern", "[4]"), ["rank_pattern: must be a JSON obj"]),
    "layers that are no numbers": (lambda w: w.train("--layers-to-transform", "all"), ["layers_to_transform:"]),
    "a rank of 0": (lambda w: w.train("--r", 0), ["r: must be at least 1, found 0"]),
    "an alpha that is not finite": (lambda w: w.train("--lora-alpha", "nan"), ["lora_alpha: must be finite"]),
    "a dropout of 1": (lambda w: w.train("--lora-dropout", 1), ["lora_dropout: must be at least 0 and below 1"]),
    "another bias": (lambda w: w.train("--bias", "some"), ["bias: must be one of", "'some'"]),
    "another start": (lambda w: w.train("--init-lora-weights", "gausian"), ["did you mean 'gaussian'?"]),
    # the run's options
    "an unknown task": (lambda w: w.train(task="seq-clas"), ["task: must be", "'seq-clas'; did you mean 'seq-cls'?"]),
    "an unknown dtype": (lambda w: w.train("--dtype", "float8"), ["dtype: must be one of float32", "'float8'"]),
    "a batch of 0": (lambda w: w.train("--batch-size", 0), ["batch_size: must be a whole number of at least 1"]),
    "no epochs": (lambda w: w.train("--epochs", 0), ["epochs: must be a number above 0"]),
    "no steps": (lambda w: w.train("--max-steps", 0), ["max_steps: must be a whole number of at least 1"]),
    "a negative rate": (lambda w: w.train("--lr", -1), ["learning_rate: must be a number above 0, found -1.0"]),
    "a rate that is infinite": (lambda w: w.train("--lr", "inf"), ["learning_rate: must be a number above 0"]),
    "a warmup above 1": (lambda w: w.train("--warmup-ratio", 2), ["warmup_ratio: must be", "at most 1, found 2.0"]),
    "a seed that is negative": (lambda w: w.train("--seed", -1), ["seed: must be a whole number of at least 0"]),
    "a seed that torch does not take": (lambda w: w.train("--seed", 2**64), ["seed: must be", f"found {2**64}"]),
    "nothing held out": (lambda w: w.train("--eval-split", 0), ["eval_split: must be a share below 1"]),
    "half a row held out": (lambda w: w.train("--eval-split", 2.5), ["eval_split: a count of rows must be whole"]),
    "a length without room for text": (lambda w: w.train("--max-length", 2), ["max_length: 2 leaves no room"]),
    "an empty name": (lambda w: w.train("--output", ""), ["output: must be a path or a name"]),
    # the run file
    "no run file": (
        lambda w: (w.file("run.yaml", "task: seq-cls\n"), ["train", w.tmp / "rnu.yaml"])[1],
        ["rnu.yaml: no such run file; did you mean 'run.yaml'?"],
    ),
    "a run file without a model": (
        lambda w: ["train", w.file("run.yaml", "task: seq-cls\n")],
        ["run.yaml: model.name: not given", "--model"],
    ),
    "a key of the run file that is unknown": (
        lambda w: w.train(w.file("run.yaml", "lora:\n  r: 8\n  lora_alhpa: 8\n")),
        ["run.yaml:3: lora.lora_alhpa: there is no such key; did you mean 'lora_alpha'?"],
    ),
    "a value of the run file that is out of range": (
        lambda w: w.train(w.file("run.yaml", "train: {epochs: 0}\n")),
        ["run.yaml:1: train.epochs: must be a number above 0, found 0"],
    ),
    "a run file that is no YAML": (lambda w: w.train(w.file("run.yaml", "a: [\n")), ["run.yaml:2: not YAML"]),
    "a setting that is none": (lambda w: w.train("--set", "lora.r"), ["--set: must be key=value"]),
    "a setting out of range": (lambda w: w.train("--set", "lora.r=0"), ["--set lora.r: lora.r: must be at least 1"]),
    # the output folder
    "a file as output": (lambda w: w.train("--output", w.file("out", "")), ["output:", "cannot be written"]),
    "an output below a file": (
        lambda w: w.train("--output", w.file("out", "") / "a" / "b"),
        ["output:", "cannot be written (Not a directory); choose another folder"],
    ),
    "a name that no file system takes": (lambda w: w.train("--output", w.tmp / ("a" * 300)), ["output:", "too long"]),
    "a model's folder as output": (
        lambda w: (folder := w.copy(w.encoder)) and w.train("--output", folder, model=folder),
        ["output:", "holds a model; choose another folder"],
    ),
    # the command
    "an unknown command": (lambda w: ["tarin"], ["tarin"]),
    "no command": (lambda w: [], ["a command is missing; see loraloom --help"]),
    "an unknown option": (lambda w: w.train("--learning-rat", 1), ["--learning-rat", "--learning-rate"]),
    "an option without its value": (lambda w: w.train("--seed"), ["--seed", "requires an argument"]),
    "a number that is none": (lambda w: w.train("--r", "eight"), ["--r"]),
    "a word too many": (lambda w: w.train("twice"), ["twice"]),
    "a missing option": (lambda w: ["train", "--model", w.encoder], ["Missing option '--data'"]),
    # tune
    "an empty space": (lambda w: w.tune(space={}), ["tune.space", "must map keys such as lora.r to lists or ranges"]),
    "a space in which nothing varies": (lambda w: w.tune(space={"lora.r": [4]}), ["space: nothing varies"]),
    "an empty list in a space": (lambda w: w.tune(space={"lora.r": []}), ["space.lora.r: the list is empty"]),
    "a space with a rank of 0": (
        lambda w: w.tune(space={"lora.r": [0, 4]}),
        ["tune.space", "space.lora.r: must be at least 1, found 0"],
    ),
    "a space with a dropout of 1": (
        lambda w: w.tune(space={"lora.lora_dropout": [0.0, 1.0]}),
        ["space.lora.lora_dropout: must be at least 0 and below 1"],
    ),
    "a space with a range that ends at a dropout of 1": (
        lambda w: w.tune(space={"lora.lora_dropout": {"range": [0.0, 1.0]}}),
        ["space.lora.lora_dropout: must be at least 0 and below 1"],
    ),
    "a space with targets that match nothing": (
        lambda w: w.tune(space={"lora.target_modules": ["q-v", "q_prj"]}),
        ["space.lora.target_modules: 'q_prj' matches no module"],
    ),
    "a space that contradicts itself": (
        lambda w: w.tune(space={"lora.lora_alpha": ["2r", "rslora"], "lora.use_rslora": [True, False]}),
        ["space.lora.use_rslora: contradicts the choice rslora of lora.lora_alpha"],
    ),
    "a space that contradicts the run": (
        lambda w: w.tune(space={"train.epochs": [1, 2]}),
        ["space.train.epochs: has no effect, because max_steps is given"],
    ),
    "a key of a space that is unknown": (
        lambda w: w.tune(space={"lora.lora_alhpa": [1, 2]}),
        ["space.lora.lora_alhpa: there is no such key; did you mean 'lora_alpha'?"],
    ),
    "a key that cannot vary": (lambda w: w.tune(space={"train.seed": [1, 2]}), ["space.train.seed: must be the same"]),
    "held-out rows of one class": (
        lambda w: w.tune("--eval-split", w.file("held-out.csv", "text,label\ngood,praise\nfine,praise\n")),
        ["held-out.csv: all 2 held-out rows are labelled 'praise'", "hold out more rows"],
    ),
    "a metric that the task lacks": (
        lambda w: w.tune("--metric", "perplexity"),
        ["metric: seq-cls is measured by accuracy, f1_macro or loss, found 'perplexity'"],
    ),
    "a metric of nobody": (lambda w: w.tune("--metric", "acuracy"), ["metric:", "did you mean 'accuracy'?"]),
    "the folder of another search": (
        lambda w: w.tune("--output", w.searched('{"fingerprint": "f"}')),
        ["out holds another search, of other options, space or data", "--overwrite"],
    ),
    "a search that is damaged": (
        lambda w: w.tune("--output", w.searched("{")),
        ["search.json: not what a search writes", "--overwrite"],
    ),
    "a folder with an adapter": (
        lambda w: w.tune("--output", w.copy(w.adapter)),
        ["output:", "holds an adapter already"],
    ),
    "more finalists than trials": (
        lambda w: w.tune("--set", "tune.finalists=3", "--trials", 2),
        ["finalists: must be at most trials (2), found 3"],
    ),
    "more trials than the space has": (
        lambda w: w.tune("--trials", 3),
        ["trials: the space has 2 configurations, found 3"],
    ),
    "no trials": (lambda w: w.tune("--trials", 0), ["trials: must be a whole number of at least 1, found 0"]),
    "no slots": (lambda w: w.tune("--slots", 0), ["slots: must be a whole number of at least 1, found 0"]),
    "memory that is too small": (
        lambda w: w.tune("--memory", "10KiB"),
        ["memory: a trial needs", "lower batch_size, max_length or the ranks"],
    ),
    "memory that is no size": (lambda w: w.tune("--memory", "lots"), ["memory: must be bytes or a size such as 8GiB"]),
    "an unknown key of a search": (
        lambda w: w.tune(w.file("run.yaml", "task: seq-cls\ntune:\n  trails: 4\n")),
        ["run.yaml:3: tune.trails: there is no such key; did you mean 'trials'?"],
    ),
    "an unknown preset": (lambda w: w.tune("--preset", "quik"), ["preset: must be one of", "did you mean 'quick'?"]),
    "an unknown sampler": (lambda w: w.tune("--sampler", "tep"), ["sampler: must be one of", "did you mean 'tpe'?"]),
    "a grid over a range": (
        lambda w: w.tune("--sampler", "grid", space={"train.learning_rate": {"log": [1e-4, 1e-3]}}),
        ["space.train.learning_rate: a grid needs choices or a step"],
    ),
    "a search of no data": (lambda w: w.tune(data=w.tmp / "none.csv"), ["none.csv: no such file"]),
    "an encoder that is searched for a task that reads forwards": (
        lambda w: ["tune", "--model", w.encoder, "--data", w.reviews, "--task", "causal-lm", "--output", w.tmp / "out"],
        ["bert reads a text in both directions"],
    ),
    # plan
    "a plan of no model": (lambda w: ["plan", "--model", w.tmp, "--task", "seq-cls"], ["holds no config.json"]),
    "a plan of a task unknown": (lambda w: ["plan", "--model", w.encoder, "--task", "qa"], ["task: must be one of"]),
    "a plan of no target": (
        lambda w: ["plan", "--model", w.encoder, "--task", "seq-cls", "--target-modules", "q_proj"],
        ["target_modules: 'q_proj' matches no module", "query (2)"],
    ),
    "a plan of no rows": (
        lambda w: ["plan", "--model", w.encoder, "--task", "seq-cls", "--batch-size", 0],
        ["batch_size: must be a whole number of at least 1, found 0"],
    ),
    "a plan of more tokens than the model reads": (
        lambda w: ["plan", "--model", w.encoder, "--task", "seq-cls", "--max-length", 65],
        ["max_length:", "reads at most 64 tokens, found 65"],
    ),
    "a plan of an encoder that reads forwards": (
        lambda w: ["plan", "--model", w.encoder, "--task", "causal-lm"],
        ["bert reads a text in both directions"],
    ),
    # inspect
    "an adapter that is not there": (lambda w: ["inspect", w.tmp / "nothing"], ["nothing: no such folder"]),
    "a model as adapter": (lambda w: ["inspect", w.encoder], ["holds no adapter_model.safetensors"]),
    "a truncated adapter": (
        lambda w: ["inspect", w.cut(w.adapter, WEIGHTS)],
        ["adapter_model.safetensors: cut off or damaged", "copy it again"],
    ),
    "a pickled adapter": (
        lambda w: ["inspect", w.put(w.without(w.adapter, WEIGHTS), "adapter_model.bin", "pickle")],
        ["adapter_model.bin: a pickled adapter can run code", "Convert it"],
    ),
    "an adapter without its config": (
        lambda w: ["inspect", w.without(w.adapter, "adapter_config.json")],
        ["adapter_config.json: cannot be read", "is this an adapter folder?"],
    ),
    "an adapter whose config is not JSON": (
        lambda w: ["inspect", w.put(w.copy(w.adapter), "adapter_config.json", '{"r": 8,\n')],
        ["adapter_config.json, line 2: not valid JSON"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_nothing_is_written(
    case: str,
    call: Callable[..., Ended],
    encoder_folder: Path,
    decoder_folder: Path,
    reviews: Path,
    chats: Path,
    trained: Path,
    tmp_path: Path,
) -> None:
    make, parts = BAD_INPUT[case]
    arguments = make(World(tmp_path, encoder_folder, decoder_folder, reviews, chats, trained))
    before = snapshot(tmp_path)
    ended = call(*arguments)
    assert ended.code == 2, ended
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
    assert "please report it" not in lines[0]
    assert snapshot(tmp_path) == before


def test_bad_input_gives_no_traceback_in_a_process_of_its_own(encoder_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{oops}\n")
    done = subprocess.run(
        command(*classify(encoder_folder, tmp_path / "a.jsonl", tmp_path / "out")), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'a.jsonl'}, line 1: not JSON")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_another_base_is_refused_with_its_folder_and_the_shapes(
    call: Callable[..., Ended], decoder_folder: Path, llama_folder: Path, chats: Path, tmp_path: Path
) -> None:
    assert call(*complete(decoder_folder, chats, tmp_path / "run", "--max-steps", 1)).code == 0
    other, _ = load_base(str(llama_folder), TASKS["causal-lm"], "float32")
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(AdapterError) as error:
        PeftModel.from_pretrained(other, tmp_path / "run")
    for part in (str(tmp_path / "run"), "(8, 32)", "(8, 64)", "another base"):
        assert part in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    call: Callable[..., Ended], decoder_folder: Path, chats: Path, tmp_path: Path
) -> None:
    base, _ = load_base(str(decoder_folder), TASKS["causal-lm"], "float32")
    base.resize_token_embeddings(10)  # type: ignore[operator]
    model = shutil.copytree(decoder_folder, tmp_path / "model")
    base.save_pretrained(model)  # type: ignore[operator]
    ended = call(*complete(model, chats, tmp_path / "run", "--max-steps", 1))
    assert ended.code == 2
    assert "the model has 10" in ended.err
    assert not (tmp_path / "run").exists()


# Failures -------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_what_is_there_and_says_how(encoder_folder: Path, reviews: Path, tmp_path: Path) -> None:
    arguments = classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 10**6, "--eval-steps", 5)
    process = subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5:"):
            process.send_signal(signal.SIGINT)
            break
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "stopping after this step" in said
    record = json.loads((tmp_path / "run" / RUN_NAME).read_bytes())
    assert f"stopped at step {record['steps']} of 1000000" in said.splitlines()[-1]
    assert f"saved in {tmp_path / 'run'}" in said
    assert record["state"] == "interrupted"
    assert record["steps"] == len(record["curve"]["loss"]) == record["curve"]["evaluations"][-1]["step"] >= 5
    assert (tmp_path / "run" / "curves.png").is_file()
    base, _ = load_base(str(encoder_folder), TASKS["seq-cls"], "float32", record["data"]["labels"])
    model = PeftModel.from_pretrained(base, tmp_path / "run")
    assert any(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_ctrl_c_while_the_model_is_loading_leaves_nothing(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraloom.train.run.load_base", lambda *_: signal.raise_signal(signal.SIGINT))
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run"))
    assert (ended.code, ended.err) == (1, "error: stopped\n")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_said_and_the_adapter_from_before_is_still_there(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    arguments = classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 2)
    assert call(*arguments).code == 0
    before = snapshot(tmp_path)
    scratch = tmp_path.parent / f"{tmp_path.name}-scratch"
    scratch.mkdir()
    done = subprocess.run(
        command(*arguments, "--overwrite", "--seed", 1),
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(scratch), "MPLCONFIGDIR": str(scratch)},
        # No file may grow beyond this, wherever it lies: every write of the adapter fails.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message = done.stderr.splitlines()[-1]
    for part in (f"error: {tmp_path / 'run'}", "cannot be written", "what was there is unchanged", str(scratch)):
        assert part in message
    assert "please report it" not in message
    assert snapshot(tmp_path) == before
    assert not list(scratch.glob("loraloom-rescued*"))


def test_an_output_lost_in_the_middle_of_training_sends_the_adapter_elsewhere(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraloom.report.terminal import Meter

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    seen = Meter.__call__

    def lose(meter: Meter, progress: Any) -> None:
        seen(meter, progress)
        if progress.slot.step == 1:
            (tmp_path / "run").write_text("a file where the folder should be")

    monkeypatch.setattr(Meter, "__call__", lose)
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 2))
    assert ended.code == 1
    (rescued,) = scratch.glob("loraloom-rescued-*")
    assert ended.err.count("\n") == 1
    assert f"The trained adapter is saved in {rescued} instead" in ended.err
    assert sorted(os.listdir(rescued)) == ["adapter_config.json", WEIGHTS, RUN_NAME]
    assert call("inspect", rescued).code == 0


def test_a_plot_that_cannot_be_written_is_said_with_what_is_saved(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "curves.png").mkdir(parents=True)
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run", "--max-steps", 2))
    assert ended.code == 1
    assert "curves.png: cannot be written" in ended.err
    assert f"the adapter and {RUN_NAME} are saved in {tmp_path / 'run'}" in ended.err
    assert (tmp_path / "run" / WEIGHTS).exists()


def test_training_that_diverges_says_the_step_and_keeps_the_weights_from_before(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path
) -> None:
    options = ["--max-steps", 200, "--lr", 1e30, "--warmup-ratio", 0]
    ended = call(*classify(encoder_folder, reviews, tmp_path / "run", *options))
    assert ended.code == 1
    record = json.loads((tmp_path / "run" / RUN_NAME).read_bytes())
    assert record["state"] == "failed"
    assert f"error: step {record['steps'] + 1}: the loss is" in ended.err
    assert "lower the learning rate" in ended.err
    assert f"after step {record['steps']} is saved in {tmp_path / 'run'}" in ended.err
    assert ended.err.count("\n") == 1


def test_an_error_that_nobody_foresaw_is_one_line_and_the_trace_is_there_for_the_asking(
    call: Callable[..., Ended], encoder_folder: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the moon is full\nand so on")

    monkeypatch.setattr("loraloom.train.run.load_base", fail)
    arguments = classify(encoder_folder, reviews, tmp_path / "run")
    ended = call(*arguments)
    assert ended.code == 1
    assert ended.err == (
        "error: unexpected, please report it: RuntimeError: the moon is full (LORALOOM_TRACEBACK=1 shows where)\n"
    )
    monkeypatch.setenv("LORALOOM_TRACEBACK", "1")
    assert "in fail" in call(*arguments).err
    monkeypatch.setattr("loraloom.train.run.load_base", lambda *_: (_ for _ in ()).throw(MemoryError))
    monkeypatch.delenv("LORALOOM_TRACEBACK")
    ended = call(*arguments)
    assert ended.code == 1
    assert ended.err.startswith("error: out of memory; lower batch_size or max_length")


def test_a_reader_that_closes_the_pipe_hears_no_complaint(trained: Path) -> None:
    first = subprocess.Popen(command("inspect", trained, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.close()
    assert first.stderr is not None
    assert first.stderr.read() == b""
    assert first.wait(timeout=60) == 1
