"""The options of one training run, checked as a whole before anything is loaded. Names are TrainingArguments'.

What follows from the task is checked by ``tasks.check``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from loraloom.config.checks import choice, flag, mapping, names, number, path, text, whole
from loraloom.config.lora import LoraConfig
from loraloom.config.names import OVERLONG, TASKS
from loraloom.config.options import NEEDED, Options, option
from loraloom.config.sources import COLUMNS, DATE, SOURCES, SPLIT
from loraloom.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "constant", "warmup_stable_decay")
ON_BAD_ROW = ("stop", "skip")
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
MOMENTS = ("no", "steps", "epoch", "minutes")

_COUNT, _POSITIVE, _SHARE, _TEXT, _FLAG = whole(1), number(above=True), number(high=1), text(), flag()
_OPTIM, _MOMENT = text("adamw or the name of a class of torch.optim", ""), choice(*MOMENTS)
_ARGUMENTS = mapping("be keys and values, such as {momentum: 0.9}", {})

_run = partial(option, group="Run")
_model = partial(option, section="model", group="Model")
_data = partial(option, section="data", group="Data", prefix="data_")
_train = partial(option, section="train", group="Training", search="varies")
_base = partial(_train, search="same")  # of the model, which trials share
_eval = partial(option, section="eval", group="Evaluation", prefix="eval_")
_moment = partial(_eval, resume="evaluation", search="unused")
_keep = partial(option, section="train", group="Checkpoints and trackers", resume="nothing", search="unused")


@dataclass(kw_only=True)
class TrainConfig(Options):
    """One run. ``lora`` holds the adapter's fields; its ``task_type`` follows from ``task``.

    Raises:
        ConfigError: an unknown option, a wrong type, a value out of range, or options that contradict.
    """

    unknown = "there is no such training option"

    # On a resume, weights and rows are compared by their contents: they may lie elsewhere.
    model: str = _run(NEEDED, path(), "Model folder, or name on the hub", key="model.name", resume="nothing")
    data: Any = _run(NEEDED, SOURCES, "Training data: file, folder, glob, or name of a dataset", key="data.train")
    task: str = _run(NEEDED, choice(*TASKS), "What to train for")
    output: str = _run(NEEDED, path(), "Folder for the adapter, the records and the plots", resume="nothing")
    overwrite: bool = _run(False, _FLAG, "Replace the adapter and checkpoints in that folder", resume="nothing")

    revision: str | None = _model(None, _TEXT, "Branch, tag or commit of the model on the hub", resume="nothing")
    dtype: str = _model("float32", choice(*DTYPES), "Data type of the frozen model; the adapter is in float32")
    attn_implementation: str | None = _model(
        None, _TEXT, "Attention: sdpa, eager, flash_attention_2, ...", unset="the model's", resume="rounding"
    )
    device: str | None = _model(
        None, _TEXT, "cpu, cuda, cuda:1, mps", unset="an accelerator, if any", resume="rounding"
    )

    eval_split: Any = _data(0.1, SPLIT, "Held-out rows: a share, a count, or data of their own", key="data.validation")
    test_split: Any = _data(
        None, SPLIT, "Rows kept for a last test, in the same ways", key="data.test", unset="none", since="0.2"
    )
    format: str | None = _data(None, _TEXT, "Shape of the rows, such as text-label", unset="recognised")
    columns: dict[str, str] = _data({}, COLUMNS, 'Names of columns, ours to yours, such as {"text": "body"}')
    max_length: int | None = _data(None, _COUNT, "Longest row, in tokens", unset="512, or what the model reads")
    overlong: str = _data("truncate", choice(*OVERLONG), "What to do with longer rows")
    on_bad_row: str = _data("stop", choice(*ON_BAD_ROW), "What to do at a bad row; skip lists them in bad-rows.jsonl")
    allow_untrained: bool = _data(False, _FLAG, "Leave out rows that have no token to train on")
    chat_template: str | None = _data(None, _TEXT, "Chat template: a file, or the text", unset="the tokenizer's")
    date: str | None = _data(None, DATE, "Date that a chat template writes", unset="the day the run begins")
    stride: int = _data(128, whole(0), "Tokens that windows of a long context share (question-answering)")
    problem_type: str | None = _data(None, choice(*PROBLEMS), "Kind of label (seq-cls)", unset="recognised")
    data_workers: int | None = _data(None, _COUNT, "Processes that tokenize", unset="by the cores", resume="nothing")

    lora: LoraConfig = field(default_factory=LoraConfig)

    epochs: float = _train(3, _POSITIVE, "Passes over the training rows; may be a fraction")
    max_steps: int | None = _train(None, _COUNT, "Total number of steps, instead of epochs")
    batch_size: int = _train(16, _COUNT, "Rows of one forward, over all processes")
    gradient_accumulation_steps: int = _train(1, _COUNT, "Forwards whose gradients make one step")
    learning_rate: float = _train(
        2e-4,
        _POSITIVE,
        "Peak learning rate; about ten times that of full fine-tuning",
        flags=("--lr", "--learning-rate"),
    )
    loraplus_lr_ratio: float = _train(1.0, _POSITIVE, "Learning rate of B divided by that of A (LoRA+)")
    lr_scheduler_type: str = _train("linear", choice(*SCHEDULES), "Learning rate schedule after the warmup")
    warmup_ratio: float = _train(0.05, _SHARE, "Warmup, as a share of the steps")
    warmup_steps: int | None = _train(None, whole(0), "Warmup, in steps instead of a share")
    decay_ratio: float = _train(0.2, _SHARE, "Share of the steps in which warmup_stable_decay falls")
    loss: str | None = _base(
        None, _TEXT, "Your own loss, my_module:my_function of (outputs, batch)", unset="the task's", since="0.2"
    )
    optim: str = _train("adamw", _OPTIM, "Optimizer: adamw, or a class of torch.optim")
    optim_args: dict[str, Any] = _train({}, _ARGUMENTS, 'Arguments of that class, such as {"momentum": 0.9}')
    weight_decay: float = _train(0.0, number(), "Weight decay of the optimizer")
    max_grad_norm: float = _train(1.0, _POSITIVE, "Largest norm of the gradients; beyond it they are clipped")
    gradient_checkpointing: bool = _base(
        False, _FLAG, "Recompute activations in the backward: less memory, about a third more time", resume="rounding"
    )
    fsdp: bool = _base(False, _FLAG, "Shard the frozen model over the processes of torchrun")
    seed: int = _base(0, whole(0, 2**63 - 1), "Random seed of split, order, initialisation and dropout")

    eval_strategy: str | None = _moment(None, _MOMENT, "When to evaluate", unset="once an epoch")
    eval_steps: int | None = _moment(None, _COUNT, "Evaluate every N steps")
    eval_minutes: float | None = _moment(None, _POSITIVE, "Evaluate every N minutes")
    eval_batch_size: int = _eval(64, _COUNT, "Rows of one forward in evaluations; changes no result", resume="nothing")
    metrics: list[str] | None = _eval(
        None, names(), "Metrics beside the loss, or my_module:my_function", unset="the task's", resume="evaluation"
    )
    metric_for_best_model: str | None = _moment(None, _TEXT, "Metric to choose the best by", unset="the first metric")
    load_best_model_at_end: bool = _moment(False, _FLAG, "Keep the best adapter instead of the last one")
    early_stopping_patience: int | None = _moment(None, _COUNT, "Stop after N evaluations without improvement")
    early_stopping_threshold: float = _moment(0.0, number(), "Least improvement that counts")
    max_new_tokens: int = _eval(64, _COUNT, "Tokens to generate for metrics and examples", resume="nothing")

    save_strategy: str | None = _keep(None, _MOMENT, "When to save a checkpoint", unset="once an epoch")
    save_steps: int | None = _keep(None, _COUNT, "Save a checkpoint every N steps")
    save_minutes: float | None = _keep(None, _POSITIVE, "Save a checkpoint every N minutes")
    save_total_limit: int = _keep(2, _COUNT, "Checkpoints to keep; the newest and the best always stay")
    report_to: list[str] = _keep(
        ["tensorboard"], names(none=True), "Trackers such as tensorboard, wandb, or none", search="same"
    )

    def __post_init__(self) -> None:
        self.check_fields()
        if self.optim_args and self.optim == "adamw":
            raise ConfigError("optim_args: adamw takes none; for torch's own class with arguments give optim: AdamW")
        self._check_moments()
        if not isinstance(self.lora, LoraConfig):
            raise ConfigError(f"lora: must be a LoraConfig, found {type(self.lora).__name__}")
        self.lora = self.lora.copy(task_type=TASKS[self.task])

    def _check_moments(self) -> None:
        """What does nothing is an error: a moment that another option has switched off."""
        for what in ("eval", "save"):
            strategy, given = getattr(self, f"{what}_strategy"), self._given(what)
            if len(given) > 1:
                raise ConfigError(f"{what}_minutes: {what}_steps is given as well; keep one of them")
            if strategy and given and given[0] != strategy:
                raise ConfigError(f"{what}_{given[0]}: does nothing with {what}_strategy={strategy}; leave one out")
            if strategy in ("steps", "minutes") and not given:
                raise ConfigError(f"{what}_strategy: {strategy} needs {what}_{strategy}")
        if self.warmup_steps is not None and self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ConfigError(f"warmup_steps: must be at most max_steps ({self.max_steps}), found {self.warmup_steps}")
        for name in ("load_best_model_at_end", "early_stopping_patience", "metric_for_best_model"):
            if getattr(self, name) and self.eval_at == "no":
                raise ConfigError(f"{name}: needs evaluations, and eval_strategy is no")
        if self.load_best_model_at_end and self.save_at == "no":
            raise ConfigError("load_best_model_at_end: needs checkpoints, and save_strategy is no")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ConfigError("early_stopping_threshold: does nothing without early_stopping_patience; give both")

    @property
    def eval_at(self) -> str:
        """``no``, ``steps``, ``epoch`` or ``minutes``."""
        return self._moment("eval")

    @property
    def save_at(self) -> str:
        """``no``, ``steps``, ``epoch`` or ``minutes``."""
        return self._moment("save")

    def _moment(self, what: str) -> str:
        return getattr(self, f"{what}_strategy") or next(iter(self._given(what)), "epoch")

    def _given(self, what: str) -> list[str]:
        return [unit for unit in ("steps", "minutes") if getattr(self, f"{what}_{unit}") is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for ``run.json``."""
        return {
            spec.name: self.lora.to_dict() if spec.name == "lora" else getattr(self, spec.name) for spec in fields(self)
        }
