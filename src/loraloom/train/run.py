"""One run from options to a folder: data, model, adapter, loop, files.

The folder gets the adapter in PEFT's format and ``run.json``: every setting, the versions, the data's hash, curves.
On the way it gets checkpoints, from which a run that was stopped goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from loraloom.config import LoraConfig, TaskType
from loraloom.data.encode import Example
from loraloom.data.rows import Row
from loraloom.errors import ModelError
from loraloom.lora.model import PeftModel, get_peft_model
from loraloom.lora.targets import Plan, matches_name, plan
from loraloom.train.course import Course
from loraloom.train.dataset import Data, encode_run_rows, read_data, read_run_rows
from loraloom.train.failures import Interrupted, explain
from loraloom.train.load import length_within, load_base, load_limit, load_tokenizer
from loraloom.train.loop import Progress, evaluate
from loraloom.train.options import TASKS, TrainOptions
from loraloom.train.output import check_output
from loraloom.train.record import RUN_NAME
from loraloom.train.resume import Resume, Say, goes_on
from loraloom.train.signals import asked_to_stop
from loraloom.train.slot import Slot

ADAPTER = "default"


@dataclass
class RunResult:
    """What came out. ``record`` is what ``run.json`` holds."""

    record: dict[str, Any]
    model: PeftModel
    predictions: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Loaded:
    """What all adapters of a run or a search share: options with nothing left open, rows, tokenizer, frozen model."""

    options: TrainOptions
    data: Data
    tokenizer: Any
    base: nn.Module
    task: TaskType
    #: modules without weights in the model's folder, which are therefore trained in full
    new_modules: list[str]

    def config(self, options: TrainOptions) -> LoraConfig:
        """The adapter of ``options`` on this model: its new modules train with it."""
        given = list(options.lora.modules_to_save or ())
        known = [*given, "classifier", "score"]
        new = [n for n in self.new_modules if not any(matches_name(k, n) or f".{k}." in f".{n}." for k in known)]
        return options.lora.copy(modules_to_save=[*given, *new] or None)

    def steps(self, options: TrainOptions) -> tuple[int, int]:
        """Optimizer steps of a whole training, and of once through the rows."""
        rows = options.batch_size * options.gradient_accumulation_steps
        per_epoch = math.ceil(len(self.data.train.examples) / rows)
        return options.max_steps or max(1, round(per_epoch * options.epochs)), per_epoch

    def slot(self, name: str, model: PeftModel, options: TrainOptions, steps: int) -> Slot:
        return Slot(
            name,
            model.adapter_parameters(name),
            self.data.train.examples,
            steps=steps,
            batch_size=options.batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            learning_rate=options.learning_rate,
            loraplus_lr_ratio=options.loraplus_lr_ratio,
            lr_scheduler_type=options.lr_scheduler_type,
            weight_decay=options.weight_decay,
            warmup_ratio=options.warmup_ratio,
            max_grad_norm=options.max_grad_norm,
            seed=options.seed,
        )


def load(options: TrainOptions) -> Loaded:
    """Read and check rows, tokenizer and model, in the order in which it costs.

    Raises:
        InputError: anything wrong with what the user gave.
    """
    task = TASKS[options.task]
    rows = read_run_rows(options)
    limit = load_limit(options.model)
    options = replace(options, max_length=length_within(limit, options.max_length, options.model))
    tokenizer = load_tokenizer(options.model)
    data = encode_run_rows(rows, options, tokenizer)
    torch.manual_seed(options.seed)  # the new head's numbers
    base, new = load_base(options.model, task, options.dtype, data.names)
    _check_vocabulary(base, data, options.model)
    return Loaded(options, data, tokenizer, base, task, new)


@dataclass
class Prepared:
    """Everything that training needs, loaded and checked; ``plan`` says what will train."""

    loaded: Loaded
    model: PeftModel
    plan: Plan
    steps: int
    steps_per_epoch: int

    @property
    def options(self) -> TrainOptions:
        return self.loaded.options

    @property
    def data(self) -> Data:
        return self.loaded.data

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def task(self) -> TaskType:
        return self.loaded.task

    @property
    def new_modules(self) -> list[str]:
        return self.loaded.new_modules


def prepare(options: TrainOptions, resume: Resume = None) -> Prepared:
    """Read and check everything: options, output, data, tokenizer, model.

    Args:
        resume: what ``run`` will be given: the folder may then hold what is gone on with.

    Raises:
        InputError: anything wrong with what the user gave. Nothing was written.
    """
    check_output(options, going_on=goes_on(options, resume))
    loaded = load(options)
    options, config = loaded.options, loaded.config(loaded.options)
    made = plan(loaded.base, config)
    model = get_peft_model(loaded.base, config, adapter_name=ADAPTER, seed=options.seed)
    steps, per_epoch = loaded.steps(options)
    return Prepared(loaded, model, made, steps, per_epoch)


def run(
    prepared: Prepared,
    watch: Callable[[Progress], None] = lambda progress: None,
    resume: Resume = None,
    say: Say = lambda text: None,
) -> RunResult:
    """Train, evaluate, and write the folder, with checkpoints on the way. What ends it early, loses nothing.

    Args:
        watch: called after each step.
        resume: True goes on from the newest whole checkpoint of the output folder, and begins afresh where there is
            none; a path goes on from that checkpoint. On a CPU, with as many threads, the adapter comes out as that of
            a run that was never stopped, to the byte. A run that has come to its end is not trained again.
        say: told what there is to know beside the steps: where it goes on, which checkpoint is damaged.

    Raises:
        ConfigError: what is to be resumed was trained with other options, data or weights.
        Interrupted: Ctrl-C, or SIGTERM.
        TrainingError: the loss is not finite, or the machine's memory was not enough.
        SaveError: the folder cannot be written; the message says what is saved, and where.
    """
    options, model, task = prepared.options, prepared.model, prepared.task
    slot = prepared.loaded.slot(ADAPTER, model, options, prepared.steps)
    pad_id = prepared.tokenizer.pad_token_id

    def measure(slot: Slot) -> dict[str, float]:
        return evaluate(model, slot.name, task, prepared.data.evaluation.examples, pad_id, options.eval_batch_size)

    course = Course(prepared, slot, measure, watch, say)
    if finished := course.begin(resume):
        return RunResult(finished, model, predict(prepared, count=3))
    record, ended = None, None
    with asked_to_stop() as stop:
        try:
            course.train(stop)
        except BaseException as error:  # what is there is saved below, then it is raised again
            ended = error
        if slot.done and ended is None:
            record = course.finish()
    if record is None:
        course.end_early(ended, stop)
    return RunResult(record, model, predict(prepared, count=3))


def _check_vocabulary(model: nn.Module, data: Data, name: str) -> None:
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    largest = max(data.train.largest, data.evaluation.largest)
    if largest >= known:
        raise ModelError(
            f"{name}: its tokenizer gives token {largest}, and the model has {known} (numbered from 0), so they do "
            "not belong together; resize the model's embeddings (resize_token_embeddings) or copy the right tokenizer"
        )


# -- predictions --------------------------------------------------------------------------------------------------


def predict(prepared: Prepared, count: int) -> list[dict[str, str]]:
    """A few held-out rows with what the adapter says of them: ``{"input", "expected", "predicted"}``."""
    model, task = prepared.model, prepared.task
    held, examples = prepared.data.evaluation_rows, prepared.data.evaluation.examples[:count]
    rows = [held[at] for at in held.of[:count]]  # a row may have several examples
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return [
                _classify(prepared, row, example) if task is TaskType.SEQ_CLS else _complete(prepared, row, example)
                for row, example in zip(rows, examples, strict=True)
            ]
    finally:
        model.train(training)


def _classify(prepared: Prepared, row: Row, example: Example) -> dict[str, str]:
    device = next(prepared.model.parameters()).device
    logits = prepared.model(input_ids=torch.tensor([example.input_ids], device=device)).logits[0].float()
    best = int(logits.argmax())
    names = prepared.data.names
    assert isinstance(example.labels, int)
    return {
        "input": str(row.fields["text"]),
        "expected": names[example.labels],
        "predicted": f"{names[best]} ({float(logits.softmax(-1)[best]):.0%})",
    }


def _complete(prepared: Prepared, row: Row, example: Example) -> dict[str, str]:
    tokenizer = prepared.tokenizer
    assert isinstance(example.labels, list)
    # A plain text has no prompt: go on from its first tokens.
    start = next((i for i, label in enumerate(example.labels) if label >= 0), 0) or min(8, len(example.input_ids))
    prompt = torch.tensor([example.input_ids[:start]], device=next(prepared.model.parameters()).device)
    out = prepared.model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=32,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {
        "input": str(row.fields.get("prompt") or tokenizer.decode(prompt[0], skip_special_tokens=True)),
        "expected": tokenizer.decode(example.input_ids[start:], skip_special_tokens=True),
        "predicted": tokenizer.decode(out[0, start:], skip_special_tokens=True),
    }


__all__ = [
    "RUN_NAME",
    "Interrupted",
    "Loaded",
    "Prepared",
    "RunResult",
    "check_output",
    "explain",
    "load",
    "predict",
    "prepare",
    "read_data",
    "run",
]
