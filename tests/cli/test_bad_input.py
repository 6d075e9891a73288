"""Promises of the command line about bad input: one message that says where, exit code 2, and nothing is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loraloom import PeftModel
from loraloom.errors import AdapterError
from loraloom.models.load import load_base
from loraloom.tasks import TASKS

WEIGHTS = "adapter_model.safetensors"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "loraloom.cli", *map(str, arguments)]


def classify(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    return ["train", "--model", model, "--data", data, "--task", "seq-cls", "--output", output, *more]


def complete(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    return ["train", "--model", model, "--data", data, "--task", "causal-lm", "--output", output, *more]


LABELLED = '{"text": "good", "label": "a"}\n'

BAD_INPUT: dict[str, tuple[Callable[[Any], list[object]], list[str]]] = {
    # the data
    "a missing file": (lambda w: w.train(data=w.tmp / "rveiews.jsonl"), ["rveiews.jsonl: no such file"]),
    "a missing file with a neighbour": (
        lambda w: (w.file("rows.jsonl", LABELLED), w.train(data=w.tmp / "row.jsonl"))[1],
        ["row.jsonl: no such file; did you mean 'rows.jsonl'?"],
    ),
    "an empty file": (lambda w: w.train(data=w.file("a.jsonl", "")), ["a.jsonl: the file is empty"]),
    "a header alone": (lambda w: w.train(data=w.file("a.csv", "text,label\n")), ["a.csv: the file is empty"]),
    "a folder as data": (lambda w: w.train(data=w.tmp), ["a directory without data files in it"]),
    "a file of another kind": (lambda w: w.train(data=w.file("a.docx", "x")), ["'.docx'", ".jsonl", ".csv"]),
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
    "a rank of 0": (lambda w: w.train("--r", 0), ["r: must be a whole number of at least 1, found 0"]),
    "an alpha that is not finite": (lambda w: w.train("--lora-alpha", "nan"), ["lora_alpha: must be a finite number"]),
    "a dropout of 1": (
        lambda w: w.train("--lora-dropout", 1),
        ["lora_dropout: must be a number of at least 0 and below 1"],
    ),
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
        ["run.yaml: model.name, data.train, output: not given", "--model"],
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
    "a setting out of range": (
        lambda w: w.train("--set", "lora.r=0"),
        ["--set lora.r: lora.r: must be a whole number of at least 1"],
    ),
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
    "a missing option": (
        lambda w: ["train", "--model", w.encoder],
        ["Missing options --data, --task, --output; give them, or a run file"],
    ),
    # tune
    "an empty space": (lambda w: w.tune(space={}), ["tune.space", "must map keys such as lora.r to lists or ranges"]),
    "a space in which nothing varies": (lambda w: w.tune(space={"lora.r": [4]}), ["space: nothing varies"]),
    "an empty list in a space": (lambda w: w.tune(space={"lora.r": []}), ["space.lora.r: the list is empty"]),
    "a space with a rank of 0": (
        lambda w: w.tune(space={"lora.r": [0, 4]}),
        ["tune.space", "space.lora.r: must be a whole number of at least 1, found 0"],
    ),
    "a space with a dropout of 1": (
        lambda w: w.tune(space={"lora.lora_dropout": [0.0, 1.0]}),
        ["space.lora.lora_dropout: must be a number of at least 0 and below 1"],
    ),
    "a space with a range that ends at a dropout of 1": (
        lambda w: w.tune(space={"lora.lora_dropout": {"range": [0.0, 1.0]}}),
        ["space.lora.lora_dropout: must be a number of at least 0 and below 1"],
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
    "a test set that shares rows with training": (
        lambda w: w.tune("--test-split", w.file("t.jsonl", "".join(w.reviews.read_text().splitlines(True)[:50]))),
        ["t.jsonl: ", " of 50 test rows are among the ", "is the same as ", "--allow-shared-rows"],
    ),
    "a distance without a metric": (
        lambda w: w.tune("--metric", "loss", "--within", "0.005"),
        ["within: 0.005 is a difference of a metric", "this search compares by the loss", "give --metric"],
    ),
    "a preference that does not exist": (
        lambda w: w.tune("--prefer", "smal"),
        ["prefer: must be one of quality, balanced, small, fast", "did you mean 'small'?"],
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
    "more trials than there may be": (
        lambda w: w.tune("--trials", 2, "--max-trials", 1),
        ["trials: must be at most max_trials (1), found 2"],
    ),
    "a time that is none": (
        lambda w: w.tune("--max-time", "soon"),
        ["max_time: must be a time such as 2h, 90m or 30s, found 'soon'"],
    ),
    "more trials for no search": (
        lambda w: w.tune("--add-trials", 2),
        ["add_trials: ", "out holds no search to extend"],
    ),
    "a search in an empty folder": (
        lambda w: ["tune", Path(shutil.copytree(w.encoder, w.tmp / "empty"))],
        ["empty: a folder without a search; give a run file, or the folder of a search"],
    ),
    "a trial to stop in a folder without a search": (
        lambda w: ["tune", w.tmp, "--stop", 3],
        ["--stop 3: ", " holds no search"],
    ),
    "a trial to stop in no folder": (
        lambda w: w.tune("--stop", 3),
        ["--stop: stands alone with the folder of a search: loraloom tune DIR --stop 3"],
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
def test_bad_input_is_one_message_and_nothing_is_written(case: str, world: Any, refused: Callable[..., None]) -> None:
    make, parts = BAD_INPUT[case]
    refused(make(world), *parts, begins=False)


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
    call: Callable[..., Any], decoder_folder: Path, llama_folder: Path, chats: Path, tmp_path: Path
) -> None:
    assert call(*complete(decoder_folder, chats, tmp_path / "run", "--max-steps", 1)).code == 0
    other, _ = load_base(str(llama_folder), TASKS["causal-lm"], "float32")
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(AdapterError) as error:
        PeftModel.from_pretrained(other, tmp_path / "run")
    for part in (str(tmp_path / "run"), "(16, 64)", "(16, 128)", "another base"):
        assert part in str(error.value)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    call: Callable[..., Any], decoder_folder: Path, chats: Path, tmp_path: Path
) -> None:
    base, _ = load_base(str(decoder_folder), TASKS["causal-lm"], "float32")
    base.resize_token_embeddings(10)  # type: ignore[operator]
    model = shutil.copytree(decoder_folder, tmp_path / "model")
    base.save_pretrained(model)  # type: ignore[operator]
    ended = call(*complete(model, chats, tmp_path / "run", "--max-steps", 1))
    assert ended.code == 2
    assert "the model has 10" in ended.err
    assert not (tmp_path / "run").exists()
