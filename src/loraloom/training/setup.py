"""What all adapters of a run or a search share: the session (model, task, tokenizer), the config and the data."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from loraloom import tasks
from loraloom.config import objects
from loraloom.config.lora import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.data.dataset import Data, Part, read_rows, tokenise, with_date
from loraloom.data.dataset import HeldOut as HeldOutRows
from loraloom.data.table.scan import OnProgress, silent
from loraloom.distributed import launch
from loraloom.distributed.launch import Placement
from loraloom.engine import optimizers
from loraloom.engine.slot import Slot
from loraloom.errors import ConfigError, ModelError, some
from loraloom.inference.evaluation import Evaluator, HeldOut
from loraloom.inference.session import Session
from loraloom.lora.matching import matches_name
from loraloom.lora.model import class_for_task
from loraloom.lora.targets import Plan
from loraloom.models.configs import tokens_at_most
from loraloom.models.given import hash_of_weights
from loraloom.models.labels import SHOWN, as_the_model
from loraloom.models.load import build_empty, length_within, load_base, load_config, load_tokenizer
from loraloom.tasks.metrics.registry import Metrics, choose
from loraloom.training import early_stopping

#: The name of the adapter of a run.
ADAPTER = "default"
#: Options of a run that a slot takes under the same name.
SLOT_OPTIONS = (
    *("batch_size", "gradient_accumulation_steps", "learning_rate", "loraplus_lr_ratio", "lr_scheduler_type"),
    *("weight_decay", "warmup_ratio", "warmup_steps", "decay_ratio", "optim", "optim_args", "max_grad_norm", "seed"),
)


@dataclass(kw_only=True)
class Setup(Session):
    """A session with the config and the data of a run or a search. ``options`` have nothing left open."""

    options: TrainConfig
    data: Data
    #: modules without weights in the model's folder, which are therefore trained in full
    new_modules: list[str]
    metrics: Metrics
    #: a hash that identifies the frozen model
    weights: str

    def config(self, options: TrainConfig) -> LoraConfig:
        """The adapter's config of ``options``, with the model's new modules to train in full."""
        given = list(options.lora.modules_to_save or ())
        known = [*given, *self.task.heads]
        new = [n for n in self.new_modules if not any(matches_name(k, n) or f".{k}." in f".{n}." for k in known)]
        return self.task.adapted(self.base, options.lora.copy(modules_to_save=[*given, *new] or None))

    def empty(self) -> nn.Module:
        """The model without weights, for counting."""
        options = self.options
        return build_empty(
            options.model, self.task, max(len(self.data.names), 1), self.data.problem, revision=options.revision
        )

    def steps_of(self, options: TrainConfig) -> tuple[int, int]:
        """Optimizer steps of the training and of an epoch."""
        rows = options.batch_size * options.gradient_accumulation_steps
        per_epoch = math.ceil(len(self.data.train.examples) / rows)
        return options.max_steps or max(1, round(per_epoch * options.epochs)), per_epoch

    def slot(self, adapter: str, options: TrainConfig, steps: int) -> Slot:
        """The training state of ``adapter``, which trains for ``steps`` steps."""
        return Slot(
            adapter,
            self.model.adapter_parameters(adapter),
            self.data.train.examples,
            steps=steps,
            task=self.task,
            scaled=options.dtype == "float16",
            world=self.world,
            **{name: getattr(options, name) for name in SLOT_OPTIONS},
        )

    def evaluator(self, rows: Sequence[int] | None = None) -> Evaluator:
        """Adapters on the held-out examples, or on those at ``rows``."""
        found = self._evaluator(self.data.validation, self.data.validation_rows)
        return found if rows is None else found.on(rows)

    def test_evaluator(self) -> Evaluator | None:
        """Adapters on the examples of the test; None if no rows were kept for one."""
        data = self.data
        return None if data.test is None or data.test_rows is None else self._evaluator(data.test, data.test_rows)

    def _evaluator(self, part: Part, records: HeldOutRows) -> Evaluator:
        options = self.options
        held_out = HeldOut(
            metrics=self.metrics,
            records=records,
            rows=records.of.tolist(),
            max_length=options.max_length or 0,
            stride=options.stride,
            max_new_tokens=options.max_new_tokens,
            block=options.batch_size,
        )
        return Evaluator(self, part.examples, held_out, options.eval_batch_size)

    def shown(self, count: int, adapter: str) -> list[dict[str, str]]:
        """The first ``count`` held-out rows as ``{"input", "expected", "predicted"}``."""
        rows = self.data.validation_rows
        numbers = [number for number, row in enumerate(rows.of.tolist()) if row < count]
        found = self.evaluator(numbers)
        # Only the first rows are in memory: the file of the others may be gone.
        return replace(found, held_out=replace(found.held_out, records=rows[:count])).shown(adapter)


@dataclass(kw_only=True)
class TrainJob(Setup):
    """A setup whose model carries the adapter to train; ``plan`` says what will train."""

    plan: Plan
    steps: int
    steps_per_epoch: int


def load(
    options: TrainConfig, where: Placement | None = None, reading: OnProgress = silent, date: str | None = None
) -> Setup:
    """Read and check rows, tokenizer and model, the cheapest first. ``reading`` gets the progress of the rows.

    ``date`` is that of the resumed run, for a chat template that writes one: see ``TrainConfig.date``.

    Raises:
        InputError: anything wrong with what the user gave.
    """
    tasks.check(options)
    task = tasks.get(options.task)
    if options.loss is not None:
        task = task.with_loss(objects.load("loss", options.loss))
    where = where or launch.find(options.device)
    if options.fsdp and where.world.size == 1:
        how = launch.single_process_warning() or "start them with torchrun or accelerate launch"
        raise ConfigError(f"fsdp: needs several processes; {how}")
    if options.optim != "adamw":
        optimizers.find(options.optim, options.weight_decay, options.optim_args)
    if options.problem_type or "problem_type" not in task.options:
        choose(task, options.problem_type, options.metrics)  # before anything is read
    rows = read_rows(options, task, reading)
    config = load_config(options.model, options.revision)
    limit = tokens_at_most(config)
    options = replace(options, max_length=length_within(limit, options.max_length, options.model))
    if rows.names and (names := as_the_model(rows.names, config)) and names != rows.names:
        rows = replace(rows, names=names)
        rows.notes.append(f"classes are numbered as {options.model} numbers them: {some(names, SHOWN)}")
    tokenizer = load_tokenizer(options.model, options.revision)
    day = where.world.gather(today())[0]  # the same in all processes, also at midnight
    options = with_date(rows, options, tokenizer, date or day)
    data = tokenise(rows, options, task, tokenizer, reading)
    metrics = choose(task, data.problem, options.metrics).of_labels(data.names)
    if options.metric_for_best_model and not metrics.own:  # the names that a function returns are not known yet
        early_stopping.watched(dict.fromkeys(["loss", *metrics.names], 0.0), options.metric_for_best_model)
    torch.manual_seed(options.seed)  # for the weights of a new head
    base, new = load_base(
        options.model,
        task,
        options.dtype,
        data.names,
        data.problem,
        revision=options.revision,
        attn_implementation=options.attn_implementation,
        tokenizer=tokenizer,
        log=data.notes.append,
    )
    weights = hash_of_weights(base)
    if not options.fsdp:  # FSDP moves the shards itself
        base.to(where.device)
    _check_vocabulary(base, data, options.model)
    return Setup(
        model=class_for_task(task.task_type)(base),
        task=task,
        tokenizer=tokenizer,
        labels=data.names,
        world=where.world,
        options=options,
        data=data,
        new_modules=new,
        metrics=metrics,
        weights=weights,
    )


def today() -> str:
    return datetime.date.today().isoformat()


def _check_vocabulary(model: nn.Module, data: Data, name: str) -> None:
    known = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    largest = max(part.largest for part in (data.train, data.validation, data.test) if part)
    if largest >= known:
        raise ModelError(
            f"{name}: its tokenizer gives token {largest}, and the model has {known} (numbered from 0), so they do "
            "not belong together; resize the model's embeddings (resize_token_embeddings) or copy the right tokenizer"
        )
