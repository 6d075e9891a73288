"""One run from options to a folder: data, model, adapter, loop, files.

The folder gets the adapter in PEFT's format and ``run.json``: every setting, the versions, the data's hash, curves.
"""

from __future__ import annotations

import json
import math
import platform
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loraloom
from loraloom.config import LoraConfig, TaskType
from loraloom.data.batches import bucketed, padding_share
from loraloom.data.encode import Encoded, Example, encode
from loraloom.data.rows import Row, check_columns, check_labels, data_hash, label_names, read_rows, split
from loraloom.errors import ConfigError, FailureError, SaveError
from loraloom.lora.atomic import write_files
from loraloom.lora.checkpoint import WEIGHTS_NAME
from loraloom.lora.model import PeftModel, get_peft_model
from loraloom.lora.targets import Plan, matches_name, plan
from loraloom.train.load import load_base, load_tokenizer
from loraloom.train.loop import Progress, evaluate, train_pack
from loraloom.train.options import TASKS, TrainOptions
from loraloom.train.slot import Slot
from loraloom.train.tasks import metric_name

RUN_NAME = "run.json"
ADAPTER = "default"


@dataclass
class Data:
    """The rows of a run, tokenised. ``names`` are the labels in the order of their numbers."""

    train: Encoded
    evaluation: Encoded
    evaluation_rows: list[Row]
    names: list[str]
    padding: float
    hashes: dict[str, str]


@dataclass
class Prepared:
    """Everything that training needs, loaded and checked; ``plan`` says what will train."""

    options: TrainOptions
    data: Data
    tokenizer: Any
    model: PeftModel
    plan: Plan
    steps: int
    steps_per_epoch: int
    task: TaskType
    #: modules without weights in the model's folder, which are therefore trained in full
    new_modules: list[str]


@dataclass
class RunResult:
    """What came out. ``record`` is what ``run.json`` holds."""

    record: dict[str, Any]
    model: PeftModel
    predictions: list[dict[str, str]] = field(default_factory=list)


class Interrupted(FailureError):
    """Training was stopped by the user; what was there is saved."""


def prepare(options: TrainOptions) -> Prepared:
    """Read and check everything, in the order in which it costs: options, output, data, tokenizer, model.

    Raises:
        InputError: anything wrong with what the user gave. Nothing was written.
    """
    _check_output(options)
    task = TASKS[options.task]
    tokenizer = load_tokenizer(options.model)
    data = read_data(options, tokenizer)
    torch.manual_seed(options.seed)  # the new head's numbers, and the dropout that follows
    base, new = load_base(options.model, task, options.dtype, data.names)
    _check_length(base, options)
    known = [*(options.lora.modules_to_save or ()), "classifier", "score"]
    extra = [name for name in new if not any(matches_name(k, name) or f".{k}." in f".{name}." for k in known)]
    config = options.lora.copy(modules_to_save=[*(options.lora.modules_to_save or ()), *extra] or None)
    made = plan(base, config)
    model = get_peft_model(base, config, adapter_name=ADAPTER, seed=options.seed)
    per_epoch = math.ceil(len(data.train.examples) / options.batch_size)
    steps = options.max_steps or max(1, round(per_epoch * options.epochs))
    return Prepared(options, data, tokenizer, model, made, steps, per_epoch, task, new)


def run(prepared: Prepared, watch: Callable[[Progress], None] = lambda progress: None) -> RunResult:
    """Train, evaluate, and write the folder.

    Raises:
        Interrupted: Ctrl-C. The adapter as it was then is saved.
        TrainingError: the loss is not finite.
        SaveError: the folder cannot be written; the message says where the adapter is instead.
    """
    options, model, task = prepared.options, prepared.model, prepared.task
    pad_id = prepared.tokenizer.pad_token_id
    slot = Slot(
        ADAPTER,
        model.adapter_parameters(ADAPTER),
        prepared.data.train.examples,
        steps=prepared.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        warmup_ratio=options.warmup_ratio,
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
    )

    def measure(slot: Slot) -> dict[str, float]:
        return evaluate(model, slot.name, task, prepared.data.evaluation.examples, pad_id, options.eval_batch_size)

    started = time.perf_counter()
    with _ctrl_c() as pressed:
        tokens = train_pack(
            model,
            [slot],
            task,
            pad_id,
            evaluate_every=options.eval_steps or prepared.steps_per_epoch,
            evaluate=measure,
            watch=watch,
            stopped=pressed.is_set,
        )
    seconds = time.perf_counter() - started
    finished = slot.done
    if not finished and slot.step:
        slot.curve.evaluations.append({"step": slot.step, **measure(slot)})
    record = _record(prepared, slot, tokens, seconds, finished)
    if slot.step or finished:
        _save(prepared, record)
    if not finished:
        raise Interrupted(
            f"stopped at step {slot.step} of {slot.steps}; the adapter as it was is saved in {options.output}"
            if slot.step
            else "stopped before the first step; nothing was written"
        )
    return RunResult(record, model, predict(prepared, count=3))


# -- data ---------------------------------------------------------------------------------------------------------


def read_data(options: TrainOptions, tokenizer: Any) -> Data:
    task = TASKS[options.task]
    rows = read_rows(options.data)
    check_columns(rows, task, options.data)
    hashes = {options.data: data_hash(options.data)}
    source = options.data
    if isinstance(options.eval_split, str):
        source = options.eval_split
        held_out = read_rows(source)
        check_columns(held_out, task, source)
        hashes[source] = data_hash(source)
    else:
        rows, held_out = split(rows, options.eval_split, options.seed, keep_labels=task is TaskType.SEQ_CLS)
    names: list[str] = []
    if task is TaskType.SEQ_CLS:
        names = label_names(rows, options.data)
        check_labels(rows, held_out, source)
    train = encode(rows, tokenizer, task, options.max_length, options.data, names)
    evaluation = encode(held_out, tokenizer, task, options.max_length, source, names)
    batches = bucketed(train.lengths, options.batch_size, options.seed, 0)
    return Data(train, evaluation, held_out, names, padding_share(train.lengths, batches), hashes)


def _check_length(model: nn.Module, options: TrainOptions) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and options.max_length > limit:
        raise ConfigError(f"max_length: {options.model} reads at most {limit} tokens, found {options.max_length}")


# -- predictions --------------------------------------------------------------------------------------------------


def predict(prepared: Prepared, count: int) -> list[dict[str, str]]:
    """A few held-out rows with what the adapter says of them: ``{"input", "expected", "predicted"}``."""
    model, task = prepared.model, prepared.task
    rows, examples = prepared.data.evaluation_rows[:count], prepared.data.evaluation.examples[:count]
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


# -- files --------------------------------------------------------------------------------------------------------


def _check_output(options: TrainOptions) -> None:
    """An output that cannot be used is said before training, not after it."""
    folder = Path(options.output)
    if (folder / WEIGHTS_NAME).exists() and not options.overwrite:
        raise ConfigError(f"output: {folder} holds an adapter already; choose another folder, or give --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be written ({error.strerror}); choose another folder") from None


def _record(prepared: Prepared, slot: Slot, tokens: int, seconds: float, finished: bool) -> dict[str, Any]:
    import transformers

    last = slot.curve.evaluations[-1] if slot.curve.evaluations else {}
    data = prepared.data
    return {
        "state": "finished" if finished else "interrupted",
        "steps": slot.step,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "metric": metric_name(prepared.task),
        "result": {key: value for key, value in last.items() if key != "step"},
        "options": prepared.options.to_dict(),
        "trainable_parameters": prepared.plan.parameters,
        "base_parameters": prepared.plan.base_parameters,
        "trained_in_full": [extra.name for extra in prepared.plan.saved],
        "data": {
            "sha256": data.hashes,
            "rows": len(data.train.examples),
            "evaluation_rows": len(data.evaluation.examples),
            "truncated": data.train.truncated,
            "labels": data.names,
            "padding_share": data.padding,
        },
        "versions": {
            "python": platform.python_version(),
            "loraloom": loraloom.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "curve": asdict(slot.curve),
    }


def _save(prepared: Prepared, record: dict[str, Any]) -> None:
    folder = prepared.options.output
    text = json.dumps(record, indent=2, sort_keys=True).encode()
    try:
        prepared.model.save_pretrained(folder)
        write_files(folder, {RUN_NAME: text})
    except SaveError as error:
        rescue = tempfile.mkdtemp(prefix="loraloom-rescued-")
        try:
            prepared.model.save_pretrained(rescue)
            write_files(rescue, {RUN_NAME: text})
        except SaveError:
            raise error from None
        raise SaveError(f"{error} The trained adapter is saved in {rescue} instead") from None


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """The first Ctrl-C asks the loop to end after its step; the second one ends at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def once(number: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)
        print("\nstopping after this step; press Ctrl-C again to end at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, once)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


__all__ = ["Interrupted", "LoraConfig", "Prepared", "RunResult", "predict", "prepare", "read_data", "run"]
