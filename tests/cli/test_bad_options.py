"""Promises about options that cannot be used: the message begins with the option, or with the run file and the line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Case = tuple[Callable[[Any], list[object]], list[str]]

CHAT = [{"role": "user", "content": "say good"}, {"role": "assistant", "content": "good"}]


def decode(w: Any, *more: object) -> list[object]:
    return w.train(*more, task="causal-lm", model=w.decoder)


def talk(w: Any, *more: object) -> list[object]:
    data = w.lines("a.jsonl", *[{"messages": CHAT}] * 12)
    return w.train(*more, task="causal-lm", model=w.decoder, data=data)


def told(w: Any, text: str, *more: object) -> list[object]:
    """A run file of ``text``, with the rest as options."""
    return w.train(w.file("run.yaml", text), *more)


TRAIN: dict[str, Case] = {
    # the model
    "a revision of a folder": (lambda w: w.train("--revision", "main"), ["revision: ", "which has no revisions"]),
    "a model without a name": (
        lambda w: ["train", "--model", "", "--data", w.reviews, "--task", "seq-cls", "--output", w.tmp / "out"],
        ["model: must be a path or a name, found ''"],
    ),
    "a device that nobody has": (lambda w: w.train("--device", "cdua"), ["device: must be cpu, cuda", "'cdua'"]),
    "a device that is not here": (lambda w: w.train("--device", "cuda:99"), ["device: cuda:99 cannot be used here"]),
    "a device without numbers": (lambda w: w.train("--device", "meta"), ["device: meta holds no numbers"]),
    "attention by a name that is unknown": (
        lambda w: w.train("--attn-implementation", "sdap"),
        [".*cannot be loaded as a model for seq-cls", "sdap"],
    ),
    # the data
    "a stride for what is not cut in windows": (
        lambda w: decode(w, "--stride", 64),
        ["stride: does nothing with task=causal-lm", "question-answering"],
    ),
    "a stride that is negative": (lambda w: w.train("--stride", -1), ["stride: must be a whole number of at least 0"]),
    "a problem type without classes": (
        lambda w: decode(w, "--problem-type", "regression"),
        ["problem_type: does nothing with task=causal-lm", "seq-cls"],
    ),
    "a problem type that is unknown": (
        lambda w: w.train("--problem-type", "regresion"),
        ["problem_type: must be one of", "did you mean 'regression'?"],
    ),
    "a split of rows that are whole": (
        lambda w: w.train("--overlong", "split"),
        ["overlong: seq-cls cannot split a row", "choose truncate, drop or error"],
    ),
    "a split of translations": (
        lambda w: w.train("--overlong", "split", task="seq2seq-lm", model=w.translator),
        ["overlong: seq2seq-lm cannot split a row"],
    ),
    "something else than skip": (
        lambda w: w.train("--on-bad-row", "skipp"),
        ["on_bad_row: must be one of stop, skip, found 'skipp'; did you mean 'skip'?"],
    ),
    "no workers": (lambda w: w.train("--data-workers", 0), ["data_workers: must be a whole number of at least 1"]),
    "a chat template where nobody talks": (
        lambda w: decode(w, "--chat-template", "{{ messages }}"),
        ["chat_template: does nothing, for the rows hold no conversations (prompt-completion)"],
    ),
    "a chat template for classes": (
        lambda w: w.train("--chat-template", "{{ messages }}"),
        ["chat_template: does nothing with task=seq-cls"],
    ),
    "a chat template that is no file": (
        lambda w: talk(w, "--chat-template", "chatml.jinja"),
        ["chat_template: 'chatml.jinja' is neither a file nor a template"],
    ),
    "a chat template that is empty": (
        lambda w: talk(w, "--chat-template", w.file("a.jinja", " \n")),
        ["chat_template: ", "a.jinja is empty"],
    ),
    "a chat template that is a folder": (
        lambda w: talk(w, "--chat-template", w.tmp),
        ["chat_template: ", "is neither a file nor a template"],
    ),
    "a chat template that is not UTF-8": (
        lambda w: talk(w, "--chat-template", w.bytes("a.jinja", b"caf\xe9")),
        ["chat_template: ", "a.jinja cannot be read"],
    ),
    "a chat template that is broken": (
        lambda w: talk(w, "--chat-template", "{% for m in messages %}\n{{ m.content }"),
        ["chat_template, line 2: "],
    ),
    "a chat template that fails": (
        lambda w: talk(w, "--chat-template", "{% for m in messages %}\n{{ m.content.nothing() }}{% endfor %}"),
        ["chat_template, line 2: "],
    ),
    "a chat template that refuses the rows": (
        lambda w: talk(w, "--chat-template", "{{ raise_exception('only for cats') }}{{ messages }}"),
        ["a.jsonl, line 1: chat_template does not take this conversation: only for cats"],
    ),
    "a chat template that drops answers": (
        lambda w: talk(w, "--chat-template", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
        ["a.jsonl, line 1: "],
    ),
    # training
    "an optimizer that nobody has": (
        lambda w: w.train("--optim", "AdmaW"),
        ["optim: torch.optim has no 'AdmaW'; did you mean 'AdamW'?"],
    ),
    "an optimizer that needs a closure": (lambda w: w.train("--optim", "LBFGS"), ["optim: LBFGS needs a closure"]),
    "arguments of the usual optimizer": (
        lambda w: w.train("--optim-args", '{"betas": [0.9, 0.99]}'),
        ["optim_args: adamw takes none"],
    ),
    "an argument that the optimizer does not take": (
        lambda w: w.train("--optim", "SGD", "--optim-args", '{"momentun": 0.9}'),
        ["optim_args: SGD takes no 'momentun'; did you mean 'momentum'?"],
    ),
    "a rate among the arguments": (
        lambda w: w.train("--optim", "SGD", "--optim-args", '{"lr": 1}'),
        ["optim_args: lr is set by learning_rate"],
    ),
    "an argument that the optimizer refuses": (
        lambda w: w.train("--optim", "SGD", "--optim-args", '{"momentum": -1}'),
        ["optim: SGD cannot be made (Invalid momentum value: -1)"],
    ),
    "arguments that are no JSON": (
        lambda w: w.train("--optim", "SGD", "--optim-args", "momentum=0.9"),
        ["optim_args: not JSON"],
    ),
    "decay of an optimizer that has none": (
        lambda w: w.train("--optim", "Rprop", "--weight-decay", 0.1),
        ["weight_decay: Rprop has none, found 0.1"],
    ),
    "a schedule that is unknown": (
        lambda w: w.train("--lr-scheduler-type", "cosin"),
        ["lr_scheduler_type: must be one of", "did you mean 'cosine'?"],
    ),
    "the decay of another schedule": (
        lambda w: w.train("--decay-ratio", 0.3),
        ["decay_ratio: does nothing with lr_scheduler_type=linear"],
    ),
    "a decay above 1": (
        lambda w: w.train("--decay-ratio", 1.5, "--lr-scheduler-type", "warmup_stable_decay"),
        ["decay_ratio: must be a number of at least 0 and at most 1, found 1.5"],
    ),
    "a warmup longer than the training": (
        lambda w: w.train("--warmup-steps", 9),
        ["warmup_steps: must be at most max_steps (1), found 9"],
    ),
    "a ratio of 0": (lambda w: w.train("--loraplus-lr-ratio", 0), ["loraplus_lr_ratio: must be a number above 0"]),
    "no accumulation": (
        lambda w: w.train("--gradient-accumulation-steps", 0),
        ["gradient_accumulation_steps: must be a whole number of at least 1"],
    ),
    "parts in one process": (lambda w: w.train("--fsdp"), ["fsdp: needs several processes"]),
    # evaluation and saving
    "a moment that is unknown": (
        lambda w: w.train("--eval-strategy", "epochs"),
        ["eval_strategy: must be one of no, steps, epoch, minutes, found 'epochs'; did you mean 'epoch'?"],
    ),
    "steps and minutes": (
        lambda w: w.train("--eval-steps", 5, "--eval-minutes", 1),
        ["eval_minutes: eval_steps is given as well; keep one of them"],
    ),
    "steps without evaluations": (
        lambda w: w.train("--eval-strategy", "no", "--eval-steps", 5),
        ["eval_steps: does nothing with eval_strategy=no"],
    ),
    "a strategy of steps without their number": (
        lambda w: w.train("--save-strategy", "steps"),
        ["save_strategy: steps needs save_steps"],
    ),
    "minutes of saving by epochs": (
        lambda w: w.train("--save-strategy", "epoch", "--save-minutes", 3),
        ["save_minutes: does nothing with save_strategy=epoch"],
    ),
    "no minutes": (lambda w: w.train("--save-minutes", 0), ["save_minutes: must be a number above 0"]),
    "no checkpoint that stays": (
        lambda w: w.train("--save-total-limit", 0),
        ["save_total_limit: must be a whole number of at least 1"],
    ),
    "the best of no evaluations": (
        lambda w: w.train("--load-best-model-at-end", "--eval-strategy", "no"),
        ["load_best_model_at_end: needs evaluations, and eval_strategy is no"],
    ),
    "the best of no checkpoints": (
        lambda w: w.train("--load-best-model-at-end", "--save-strategy", "no"),
        ["load_best_model_at_end: needs checkpoints, and save_strategy is no"],
    ),
    "patience without evaluations": (
        lambda w: w.train("--early-stopping-patience", 2, "--eval-strategy", "no"),
        ["early_stopping_patience: needs evaluations"],
    ),
    "a threshold without patience": (
        lambda w: w.train("--early-stopping-threshold", 0.1),
        ["early_stopping_threshold: does nothing without early_stopping_patience"],
    ),
    "the best by what is not measured": (
        lambda w: w.train("--metric-for-best-model", "acuracy"),
        ["metric_for_best_model: 'acuracy' is not measured; did you mean 'accuracy'?"],
    ),
    "a metric of another task": (
        lambda w: decode(w, "--metrics", "accuracy"),
        ["metrics: 'accuracy' is none of causal-lm, which has loss, perplexity"],
    ),
    "a metric that is misspelt": (
        lambda w: w.train("--metrics", "f1_marco"),
        ["metrics: 'f1_marco' is none of seq-cls", "did you mean 'f1_macro'?"],
    ),
    "a module that is not there": (
        lambda w: w.train("--metrics", "no_such_module_here:score"),
        ["metrics: no_such_module_here:score: there is no module 'no_such_module_here'"],
    ),
    "a function that is not there": (
        lambda w: w.train("--metrics", "math:cot"),
        ["metrics: math has no 'cot'"],
    ),
    "a metric that is a number": (lambda w: w.train("--metrics", "math:pi"), ["metrics: math:pi is not a function"]),
    "a metric that is no name": (
        lambda w: w.train("--metrics", "my metric:f"),
        ["metrics: 'my metric:f' must have the form package.module:function"],
    ),
    "metrics without a name": (lambda w: w.train("--metrics", " , "), ["metrics: must be a list of names"]),
    "a tracker without a name": (lambda w: w.train("--report-to", ""), ["report_to: must be a list of names"]),
    "new tokens where nothing is generated": (
        lambda w: w.train("--max-new-tokens", 5),
        ["max_new_tokens: does nothing with task=seq-cls"],
    ),
    # trackers, the output, resuming
    "a tracker that nobody knows": (
        lambda w: w.train("--report-to", "tensorbord"),
        ["report_to: no tracker is called 'tensorbord'; did you mean 'tensorboard'?"],
    ),
    "a tracker that is not installed": (
        lambda w: w.train("--report-to", absent()),
        ["report_to: ", "is not installed; pip install"],
    ),
    "a checkpoint that is not there": (
        lambda w: w.train("--resume", w.tmp / "out" / "checkpoint-5"),
        ["resume: ", "checkpoint-5"],
    ),
    "an adapter to resume from": (lambda w: w.train("--resume", w.copy(w.adapter)), ["resume: "]),
    "a checkpoint that is damaged": (
        lambda w: w.train("--resume", damaged(w)),
        ["resume: ", "checkpoint-2 is no whole checkpoint", "state.safetensors"],
    ),
    "a checkpoint of other options": (
        lambda w: w.train("--resume", w.adapter / "checkpoint-1", "--seed", 5),
        ["resume: ", "checkpoint-1 was trained with other options", "seed is 5 and was 0"],
    ),
    "a folder that is resumed with other options": (
        lambda w: w.train("--resume", "--seed", 5, "--output", w.copy(w.adapter)),
        ["resume: ", "was trained with other options", "seed is 5 and was 0"],
    ),
}  # fmt: skip


def absent() -> str:
    """A tracker that accelerate knows and that is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    here = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
    return next(name for name in LOGGER_TYPE_TO_CLASS if name not in here)


def damaged(w: Any) -> Path:
    folder = Path(shutil.copytree(w.adapter / "checkpoint-2", w.tmp / "checkpoint-2"))
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    return folder


RUN_FILES: dict[str, Case] = {
    "a key twice": (
        lambda w: told(w, "lora:\n  r: 8\n  r: 16\n"),
        ["run.yaml:3: lora.r is given twice, first in line 2; keep one"],
    ),
    "a section that is unknown": (
        lambda w: told(w, "trian: {epochs: 1}\n"),
        ["run.yaml:1: trian: there is no such key; did you mean 'train'?"],
    ),
    "a section that is a value": (lambda w: told(w, "train: 3\n"), ["run.yaml:1: train: must be a section"]),
    "a name from elsewhere": (
        lambda w: told(w, "train:\n  num_train_epochs: 3\n"),
        ["run.yaml:2: train.num_train_epochs: there is no such key; did you mean 'train.epochs'?"],
    ),
    "a key in another section": (
        lambda w: told(w, "train:\n  max_length: 3\n"),
        ["run.yaml:2: train.max_length: there is no such key; did you mean 'data.max_length'?"],
    ),
    "a key with a dot": (lambda w: told(w, "lora.r: 8\n"), ["run.yaml:1: lora.r: write it below its section"]),
    "a wrong type": (
        lambda w: told(w, "train:\n  batch_size: eight\n"),
        ["run.yaml:2: train.batch_size: must be a whole number of at least 1, found 'eight'"],
    ),
    "nothing where a number must be": (
        lambda w: told(w, "train:\n  learning_rate:\n"),
        ["run.yaml:2: train.learning_rate: must be a number above 0, found None"],
    ),
    "a path that no system takes": (
        lambda w: w.train("--set", 'data.validation="a\\0b"'),
        ["--set data.validation: data.validation: must be a path or a name"],
    ),
    "a switch that is a word": (
        lambda w: told(w, "train:\n  gradient_checkpointing: yes\n"),
        ["run.yaml:2: train.gradient_checkpointing: must be true or false, found 'yes'"],
    ),
    "a contradiction": (
        lambda w: told(w, "eval:\n  steps: 5\n  strategy: epoch\n"),
        ["run.yaml:2: eval.steps: does nothing with eval_strategy=epoch"],
    ),
    "an option that does nothing": (
        lambda w: told(w, "data:\n  stride: 64\n"),
        ["run.yaml:2: data.stride: does nothing with task=seq-cls"],
    ),
    "tabs": (lambda w: told(w, "lora:\n\tr: 8\n"), ["run.yaml:2: not YAML"]),
    "an alias": (lambda w: told(w, "lora: &a {r: 8}\ntrain: *a\n"), ["run.yaml:", "an alias"]),
    "a list": (lambda w: told(w, "- task\n"), ["run.yaml: holds no keys"]),
    "nothing": (lambda w: told(w, "# nothing\n"), ["run.yaml: is empty"]),
    "not UTF-8": (lambda w: w.train(w.bytes("run.yaml", b"task: caf\xe9\n")), ["run.yaml: not UTF-8 at byte 9"]),
    "a folder": (
        lambda w: ((w.tmp / "run.yaml").mkdir(), w.train(w.tmp / "run.yaml"))[1],
        ["run.yaml: cannot be read as a run file (Is a directory)"],
    ),
    "the task of PEFT": (
        lambda w: told(w, "lora:\n  task_type: SEQ_CLS\n"),
        ["run.yaml:2: lora.task_type: follows from task; leave it out"],
    ),
    "a key of a search that is unknown": (
        lambda w: told(w, "tune:\n  trails: 4\n"),
        ["run.yaml:2: tune.trails: there is no such key; did you mean 'trials'?"],
    ),
    "a key of a search that is set for a training": (
        lambda w: w.train("--set", "tune.trials=4"),
        ["--set tune.trials: does nothing here; it is read by loraloom tune alone"],
    ),
    "a section that is set": (lambda w: w.train("--set", "lora=8"), ["--set lora: lora: is a section"]),
    "a setting that is unknown": (
        lambda w: w.train("--set", "lora.rank=8"),
        ["--set lora.rank: lora.rank: there is no such key; did you mean 'lora.r'?"],
    ),
    "a setting that is no YAML": (lambda w: w.train("--set", "lora.r=["), ["--set lora.r: not YAML"]),
}

OTHERS: dict[str, Case] = {
    # data
    "data without a model": (lambda w: ["data", w.reviews], ["Missing option '--model'"]),
    "data that is not there": (
        lambda w: ["data", w.tmp / "a.jsonl", "--model", w.encoder],
        ["a.jsonl: no such file"],
    ),
    "data for no task": (
        lambda w: ["data", w.lines("a.jsonl", {"x": 1}), "--model", w.encoder],
        ["a.jsonl, line 1: the columns 'x' fit no task"],
    ),
    "data of a format that nobody knows": (
        lambda w: ["data", w.chats, "--model", w.decoder, "--format", "mesages"],
        ["format: 'mesages' is not a shape of causal-lm", "did you mean 'messages'?"],
    ),
    "data for a task that is unknown": (
        lambda w: ["data", w.reviews, "--model", w.encoder, "--task", "seq-clas"],
        ["task: must be one of", "did you mean 'seq-cls'?"],
    ),
    "data for the task of other rows": (
        lambda w: ["data", w.lines("a.jsonl", {"text": "x"}), "--model", w.encoder, "--task", "token-cls"],
        ["a.jsonl, line 1: no column 'tokens'"],
    ),
    "data with a bad row": (
        lambda w: ["data", w.rows({"text": 3, "label": "a"}), "--model", w.encoder],
        ["rows.jsonl, line 11: 'text' must be a string"],
    ),
    "fewer rows than none": (
        lambda w: ["data", w.reviews, "--model", w.encoder, "--rows", -1],
        ["rows: must be a whole number of at least 0, found -1"],
    ),
    "a run file without data": (
        lambda w: ["data", w.file("run.yaml", f"model: {{name: {w.encoder}}}\ntask: seq-cls\n")],
        ["run.yaml: data.train: not given"],
    ),
    "data as a word too many": (lambda w: ["data", w.reviews, w.chats], ["Got unexpected extra argument"]),
    # init
    "a run file that is there": (
        lambda w: ["init", "--model", w.encoder, "--data", w.reviews, w.file("run.yaml", "x")],
        ["run.yaml: is there already; choose another name, or give --overwrite"],
    ),
    "a run file for no model": (
        lambda w: ["init", "--model", w.tmp / "none", "--data", w.reviews, w.tmp / "run.yaml"],
        ["none: no such folder"],
    ),
    "a run file for no data": (
        lambda w: ["init", "--model", w.encoder, "--data", w.tmp / "none.csv", w.tmp / "run.yaml"],
        ["none.csv: no such file"],
    ),
    "a run file for a task that is unknown": (
        lambda w: ["init", "--model", w.encoder, "--data", w.reviews, "--task", "seq-clas", w.tmp / "run.yaml"],
        ["task: must be one of", "did you mean 'seq-cls'?"],
    ),
    "a run file for the task of other rows": (
        lambda w: ["init", "--model", w.decoder, "--data", w.chats, "--task", "seq-cls", w.tmp / "run.yaml"],
        [".*line 1: no column 'text'"],
    ),
    "a run file for a model of another kind": (
        lambda w: ["init", "--model", w.encoder, "--data", w.chats, w.tmp / "run.yaml"],
        [".*bert reads a text in both directions"],
    ),
    # plan
    "a plan with classes of no classifier": (
        lambda w: ["plan", "--model", w.decoder, "--task", "causal-lm", "--labels", 3],
        ["labels: does nothing with task=causal-lm"],
    ),
    "a plan with no classes": (
        lambda w: ["plan", "--model", w.encoder, "--task", "seq-cls", "--labels", 0],
        ["labels: must be a whole number of at least 1, found 0"],
    ),
    "a plan with more classes than there are": (
        lambda w: ["plan", "--model", w.encoder, "--task", "seq-cls", "--labels", 10**15],
        ["labels: must be at most 1,000,000"],
    ),
    "a plan of a model without a name": (
        lambda w: ["plan", "--model", "", "--task", "seq-cls"],
        ["model: must be a path or a name, found ''"],
    ),
    "a plan in a type that is unknown": (
        lambda w: ["plan", "--model", w.encoder, "--task", "seq-cls", "--dtype", "bf16"],
        ["dtype: must be one of float32", "found 'bf16'"],
    ),
    "a plan of answers by a model that translates": (
        lambda w: ["plan", "--model", w.encoder, "--task", "seq2seq-lm"],
        [".*bert has no encoder and decoder"],
    ),
    # tune
    "a search by what the task does not measure": (
        lambda w: w.tune("--metric", "mse"),
        ["metric: seq-cls is measured by accuracy, f1_macro or loss"],
    ),
    "a search over what does nothing": (
        lambda w: w.tune("--set", "data.stride=5"),
        ["--set data.stride: data.stride: does nothing with task=seq-cls"],
    ),
    "a search in parts": (lambda w: w.tune("--set", "train.fsdp=true"), ["fsdp: needs several processes"]),
    "a search over a seed": (lambda w: w.tune(space={"train.seed": [1, 2]}), [".*space.train.seed"]),
    "a search with a row that is bad": (
        lambda w: w.tune(data=w.rows({"text": "x", "lable": "a"})),
        ["rows.jsonl, line 11: no column 'label'"],
    ),
}
CASES = {**TRAIN, **{f"run file: {name}": case for name, case in RUN_FILES.items()}, **OTHERS}


@pytest.mark.parametrize("case", CASES)
def test_bad_options_are_one_message_that_says_which_and_nothing_is_written(
    case: str, world: Any, refused: Callable[..., None]
) -> None:
    make, (first, *parts) = CASES[case]
    refused(make(world), first.removeprefix(".*"), *parts, begins=not first.startswith(".*"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def score(a, b): return len(a) / 0", "failed with ZeroDivisionError: division by zero (own_scores_1.py"),
        ("def score(a, b): return 'good'", "must return a number or a dict of numbers by name, found str ('good')"),
        ("def score(a, b): return {'loss': 1.0}", "returns 'loss', which is measured already; rename it"),
        ("def score(a): return 1.0", "failed with TypeError"),
    ],
)  # fmt: skip
def test_a_metric_of_ones_own_that_fails_is_said_with_its_line_and_the_adapter_is_kept(
    body: str, words: str, world: Any, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.tmp)
    monkeypatch.delitem(__import__("sys").modules, "own_scores_1", raising=False)
    world.file("own_scores_1.py", body)
    ended = call(*world.train("--metrics", "own_scores_1:score", "--report-to", "none"))
    assert ended.code == 2
    assert ended.err.startswith("error: metrics: own_scores_1:score ")
    assert words in ended.err
    assert ended.err.count("\n") == 1
    record = world.tmp / "out" / "run.json"
    assert not record.exists() or json.loads(record.read_bytes())["state"] == "failed"


def test_a_module_that_cannot_be_imported_is_said_before_anything_is_read(
    world: Any, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.tmp)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    world.file("own_scores_2.py", "import nothing_of_that_name\n")
    world.file("own_scores_3.py", "def score(:\n")
    for name, words in (("own_scores_2", "No module named 'nothing_of_that_name'"), ("own_scores_3", "SyntaxError")):
        arguments = world.train("--metrics", f"{name}:score", task="causal-lm", data=world.tmp / "nothing.csv")
        refused(arguments, f"metrics: {name}:score: importing {name} failed", words)


def test_a_model_whose_name_is_of_the_hub_is_not_fetched_without_a_network(
    world: Any, refused: Callable[..., None]
) -> None:
    name = "nobody/no-such-model"
    refused(world.train(model=name), f"{name} (no folder of this name is here, so it was looked for on the hub)")


def test_what_a_search_has_no_use_for_is_said(world: Any, call: Callable[..., Any]) -> None:
    given = ["--set", "train.save_steps=5", "--set", "eval.early_stopping_patience=2", "--trials", 2]
    given += ["--set", "tune.seeds=0", "--set", "train.report_to=[]"]
    ended = call(*world.tune(*world.learns, *given, space=world.space))
    assert (ended.code, ended.err) == (0, "")
    said = "not used by the search, but when the best is trained in full (best.yaml): "
    assert f"{said}eval.early_stopping_patience, train.save_steps" in " ".join(ended.out.split())
    assert "save_steps: 5" in (world.tmp / "out" / "best.yaml").read_text()


def test_torchrun_takes_the_rank_by_a_name_that_is_not_its_own(call: Any, world: Any) -> None:
    from torch.distributed.run import get_args_parser

    arguments = ["--nproc-per-node", "2", "-m", "loraloom.cli", "train", "run.yaml"]
    for name in ("--lora-r", "--rank"):
        assert get_args_parser().parse_args([*arguments, name, "8"]).training_script_args[-2:] == [name, "8"]
        ended = call("plan", "--model", world.encoder, "--task", "seq-cls", name, 3, "--target-modules", "query")
        assert ended.code == 0, ended.err
        assert " 3 " in ended.out
    with pytest.raises(SystemExit):
        get_args_parser().parse_args([*arguments, "--r", "8"])
