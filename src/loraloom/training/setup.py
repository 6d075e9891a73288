"""What all adapters of a run or a search share: rows, tokenizer, frozen model, and how each of them is measured."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from loraloom import tasks
from loraloom.config import objects
from loraloom.config.lora import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.data.dataset import Data, read_rows, tokenise, with_date
from loraloom.data.table.scan import OnProgress, silent
from loraloom.distributed import launch
from loraloom.distributed.launch import Placement
from loraloom.distributed.process_group import SINGLE
from loraloom.engine import optimizers
from loraloom.engine.slot import Slot
from loraloom.errors import ConfigError, ModelError, some
from loraloom.inference.evaluation import Evaluator, HeldOut
from loraloom.inference.jackknife import Figures, divide
from loraloom.lora.matching import matches_name
from loraloom.lora.model import PeftModel
from loraloom.lora.targets import Plan
from loraloom.models.configs import tokens_at_most
from loraloom.models.given import hash_of_weights
from loraloom.models.labels import SHOWN, as_the_model
from loraloom.models.load import build_empty, length_within, load_base, load_config, load_tokenizer
from loraloom.tasks.base import Task
from loraloom.tasks.metrics.registry import Metrics, choose
from loraloom.training import early_stopping


@dataclass
class Setup:
    """``options`` have nothing left open."""

    options: TrainConfig
    data: Data
    tokenizer: Any
    base: nn.Module
    task: Task
    #: modules without weights in the model's folder, which are therefore trained in full
    new_modules: list[str]
    metrics: Metrics
    place: Placement
    #: a hash by which the frozen model is known again
    weights: str

    def config(self, options: TrainConfig) -> LoraConfig:
        """The adapter of ``options`` on this model: its new modules train with it."""
        given = list(options.lora.modules_to_save or ())
        known = [*given, *self.task.heads]
        new = [n for n in self.new_modules if not any(matches_name(k, n) or f".{k}." in f".{n}." for k in known)]
        return self.task.adapted(self.base, options.lora.copy(modules_to_save=[*given, *new] or None))

    def empty(self) -> nn.Module:
        """The model without its weights, for counting."""
        options = self.options
        return build_empty(
            options.model, self.task, max(len(self.data.names), 1), self.data.problem, revision=options.revision
        )

    def steps(self, options: TrainConfig) -> tuple[int, int]:
        """Optimizer steps of a whole training, and of once through the rows."""
        rows = options.batch_size * options.gradient_accumulation_steps
        per_epoch = math.ceil(len(self.data.train.examples) / rows)
        return options.max_steps or max(1, round(per_epoch * options.epochs)), per_epoch

    def slot(self, name: str, model: PeftModel, options: TrainConfig, steps: int) -> Slot:
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
            warmup_steps=options.warmup_steps,
            decay_ratio=options.decay_ratio,
            optim=options.optim,
            optim_args=options.optim_args,
            max_grad_norm=options.max_grad_norm,
            seed=options.seed,
            task=self.task,
            scaled=options.dtype == "float16",
            world=self.place.world,
        )

    def evaluate(self, model: PeftModel, name: str, rows: Sequence[int] | None = None) -> dict[str, float]:
        """The metrics of one adapter over the held-out examples, or over those at ``rows``."""
        return self.evaluator(model, rows).evaluate(name)

    def evaluate_parts(self, model: PeftModel, name: str) -> Figures:
        """The same over all held-out examples, each figure with those of all but each part: see ``jackknife``."""
        return self.evaluator(model).evaluate_parts(name, self.parts)

    def evaluator(self, model: PeftModel, rows: Sequence[int] | None = None, **changes: Any) -> Evaluator:
        """Adapters of ``model`` on the held-out examples, or on those at ``rows``."""
        examples = self.data.validation.examples if rows is None else self.data.validation.examples.view(rows)
        pad_id, size = self.tokenizer.pad_token_id, self.options.eval_batch_size
        held_out = replace(self.held_out(rows), **changes)
        return Evaluator(model, self.task, examples, held_out, pad_id, size, self.place.world)

    @property
    def parts(self) -> list[list[int]]:
        """The held-out examples in parts, for the error of figures."""
        return divide(self.data.validation_rows.of.tolist())

    def held_out(self, rows: Sequence[int] | None = None) -> HeldOut:
        """What metrics need to know of the held-out examples, or of those at ``rows``."""
        data, options, of = self.data, self.options, self.data.validation_rows.of
        return HeldOut(
            metrics=self.metrics,
            records=data.validation_rows if self.metrics.needs_predictions else (),
            rows=(of if rows is None else of[list(rows)]).tolist(),
            labels=data.names,
            tokenizer=self.tokenizer,
            max_length=options.max_length or 0,
            stride=options.stride,
            max_new_tokens=options.max_new_tokens,
            block=options.batch_size,
        )


@dataclass
class TrainJob:
    """Everything that training needs, loaded and checked; ``plan`` says what will train."""

    setup: Setup
    model: PeftModel
    plan: Plan
    steps: int
    steps_per_epoch: int

    @property
    def options(self) -> TrainConfig:
        return self.setup.options

    @property
    def data(self) -> Data:
        return self.setup.data

    @property
    def tokenizer(self) -> Any:
        return self.setup.tokenizer

    @property
    def task(self) -> Task:
        return self.setup.task

    @property
    def new_modules(self) -> list[str]:
        return self.setup.new_modules


def predict(job: TrainJob, count: int, name: str = "default") -> list[dict[str, str]]:
    """The first ``count`` held-out rows as ``{"input", "expected", "predicted"}``.

    ``name`` is an adapter of the model, or ``"__base__"`` for the frozen model alone.
    """
    rows = job.data.validation_rows
    count = min(count, len(rows))
    numbers = [number for number, row in enumerate(rows.of.tolist()) if row < count]
    evaluator = job.setup.evaluator(job.model, numbers, records=rows[:count], metrics=None)
    return replace(evaluator, world=SINGLE).shown(name)


def load(
    options: TrainConfig, where: Placement | None = None, reading: OnProgress = silent, date: str | None = None
) -> Setup:
    """Read and check rows, tokenizer and model, in the order in which it costs. ``reading`` is told how far rows are.

    ``date`` is that of the run that is resumed, for a chat template that writes one: see ``TrainConfig.date``.

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
    if options.metric_for_best_model and not metrics.own:  # what a function returns is not known before
        early_stopping.watched(dict.fromkeys(["loss", *metrics.names], 0.0), options.metric_for_best_model)
    torch.manual_seed(options.seed)  # the new head's numbers
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
    if not options.fsdp:  # else its parts go there one by one
        base.to(where.device)
    _check_vocabulary(base, data, options.model)
    return Setup(options, data, tokenizer, base, task, new, metrics, where, weights)


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
