"""One run from options to a folder: data, model, adapter, loop, files.

The folder gets the adapter in PEFT's format and ``run.json``: every setting, the versions, the data's hash, curves.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

import loraloom
from loraloom.config import LoraConfig, TaskType
from loraloom.data.encode import Example
from loraloom.data.rows import Row
from loraloom.errors import ConfigError, FailureError, LoraloomError, ModelError, SaveError, TrainingError
from loraloom.lora.atomic import write_files
from loraloom.lora.checkpoint import WEIGHTS_NAME
from loraloom.lora.model import PeftModel, get_peft_model
from loraloom.lora.targets import Plan, matches_name, plan
from loraloom.train.dataset import Data, encode_run_rows, read_data, read_run_rows
from loraloom.train.load import length_within, load_base, load_limit, load_tokenizer
from loraloom.train.loop import Progress, evaluate, train_pack
from loraloom.train.metrics import metric_name
from loraloom.train.options import TASKS, TrainOptions
from loraloom.train.slot import Slot

RUN_NAME = "run.json"
ADAPTER = "default"


@dataclass
class RunResult:
    """What came out. ``record`` is what ``run.json`` holds."""

    record: dict[str, Any]
    model: PeftModel
    predictions: list[dict[str, str]] = field(default_factory=list)


class Interrupted(FailureError):
    """Training was stopped by the user; what was there is saved. ``record`` is what ``run.json`` then holds."""

    def __init__(self, message: str, record: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.record = record


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


def prepare(options: TrainOptions) -> Prepared:
    """Read and check everything: options, output, data, tokenizer, model.

    Raises:
        InputError: anything wrong with what the user gave. Nothing was written.
    """
    check_output(options)
    loaded = load(options)
    options, config = loaded.options, loaded.config(loaded.options)
    made = plan(loaded.base, config)
    model = get_peft_model(loaded.base, config, adapter_name=ADAPTER, seed=options.seed)
    steps, per_epoch = loaded.steps(options)
    return Prepared(loaded, model, made, steps, per_epoch)


def explain(error: Exception) -> str:
    """One line on an error that is not loraloom's own; for the commonest one, what to do."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out of memory; lower batch_size or max_length, or use dtype bfloat16"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run(prepared: Prepared, watch: Callable[[Progress], None] = lambda progress: None) -> RunResult:
    """Train, evaluate, and write the folder. Whatever ends training early, the adapter as it was then is written.

    Raises:
        Interrupted: Ctrl-C.
        TrainingError: the loss is not finite, or the machine's memory was not enough.
        SaveError: the folder cannot be written; the message says where the adapter is instead.
    """
    options, model, task = prepared.options, prepared.model, prepared.task
    pad_id = prepared.tokenizer.pad_token_id
    slot = prepared.loaded.slot(ADAPTER, model, options, prepared.steps)

    def measure(slot: Slot) -> dict[str, float]:
        return evaluate(model, slot.name, task, prepared.data.evaluation.examples, pad_id, options.eval_batch_size)

    started = time.perf_counter()
    tokens, ended = 0, None

    def count(progress: Progress) -> None:
        nonlocal tokens
        tokens = progress.tokens
        watch(progress)

    with ctrl_c() as pressed:
        try:
            train_pack(
                model,
                [slot],
                task,
                pad_id,
                evaluate_every=options.eval_steps or prepared.steps_per_epoch,
                evaluate=measure,
                watch=count,
                stopped=pressed.is_set,
            )
        except BaseException as error:  # saved below, then raised again
            ended = error
        seconds = time.perf_counter() - started
        record = _record(prepared, slot, tokens, seconds, "finished")
        if slot.done and ended is None:
            _save(prepared, record)
    if ended is not None or not slot.done:
        _end_early(prepared, slot, tokens, seconds, ended, measure)
    return RunResult(record, model, predict(prepared, count=3))


def _end_early(
    prepared: Prepared,
    slot: Slot,
    tokens: int,
    seconds: float,
    error: BaseException | None,
    measure: Callable[[Slot], dict[str, float]],
) -> NoReturn:
    """Save what is there, then say why training ended. ``error`` is None for a Ctrl-C that was waited for."""
    stopped = error is None or isinstance(error, KeyboardInterrupt)
    record = _record(prepared, slot, tokens, seconds, "interrupted" if stopped else "failed")
    where = "nothing was written"
    if slot.step:
        _save(prepared, record)
        where = (
            f"the adapter as it was after step {slot.step} is saved in {prepared.options.output}; "
            f"to see it: loraloom inspect {shlex.quote(prepared.options.output)}"
        )
    if stopped:
        if error is None and slot.step and not any(e["step"] == slot.step for e in slot.curve.evaluations):
            # After saving: a second Ctrl-C may end this, and nothing is lost.
            with contextlib.suppress(KeyboardInterrupt):
                slot.curve.evaluations.append({"step": slot.step, **measure(slot)})
                record = _record(prepared, slot, tokens, seconds, "interrupted")
                _save(prepared, record)
        at = f"stopped at step {slot.step} of {slot.steps}" if slot.step else "stopped before the first step"
        raise Interrupted(f"{at}; {where}", record if slot.step else None) from None
    assert error is not None
    if isinstance(error, Exception) and slot.step:
        said = str(error) if isinstance(error, LoraloomError) else f"step {slot.step + 1}: {explain(error)}"
        raise TrainingError(f"{said.rstrip('.')}; {where}") from error
    raise error


def _check_vocabulary(model: nn.Module, data: Data, name: str) -> None:
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    largest = max(max(e.input_ids) for part in (data.train, data.evaluation) for e in part.examples)
    if largest >= known:
        raise ModelError(
            f"{name}: its tokenizer gives token {largest}, and the model has {known} (numbered from 0), so they do "
            "not belong together; resize the model's embeddings (resize_token_embeddings) or copy the right tokenizer"
        )


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


def check_output(options: TrainOptions) -> None:
    """An output that cannot be used is said before training, not after it. Leaves no trace."""
    folder = Path(options.output)
    made: list[Path] = []
    try:
        if (folder / WEIGHTS_NAME).exists() and not options.overwrite:
            raise ConfigError(f"output: {folder} holds an adapter already; choose another folder, or give --overwrite")
        if (folder / "config.json").exists():
            # With an adapter in it, transformers would load the folder as model and adapter together.
            raise ConfigError(f"output: {folder} holds a model; choose another folder")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _record(prepared: Prepared, slot: Slot, tokens: int, seconds: float, state: str) -> dict[str, Any]:
    import transformers

    last = slot.curve.evaluations[-1] if slot.curve.evaluations else {}
    data = prepared.data
    return {
        "state": state,
        "steps": slot.step,
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / max(seconds, 1e-9),
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
    text = json.dumps(_finite(record), indent=2, sort_keys=True, allow_nan=False).encode()

    def write(folder: str) -> None:
        prepared.model.save_pretrained(folder)
        write_files(folder, {RUN_NAME: text})

    try:
        write(prepared.options.output)
    except SaveError as error:
        rescue = None
        try:
            rescue = tempfile.mkdtemp(prefix="loraloom-rescued-")
            write(rescue)
        except (SaveError, OSError):
            if rescue:
                shutil.rmtree(rescue, ignore_errors=True)
            raise SaveError(
                f"{error}. The trained adapter could not be saved in {tempfile.gettempdir()} either"
            ) from None
        raise SaveError(f"{error}. The trained adapter is saved in {rescue} instead") from None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value


@contextmanager
def ctrl_c() -> Iterator[threading.Event]:
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


__all__ = [
    "Interrupted",
    "Loaded",
    "Prepared",
    "RunResult",
    "explain",
    "load",
    "predict",
    "prepare",
    "read_data",
    "run",
]
