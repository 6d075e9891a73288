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

_run = partial(option, group="Run")
_model = partial(option, section="model", group="Model")
_data = partial(option, section="data", group="Data")
_train = partial(option, section="train", group="Training", search="varies")
_eval = partial(option, section="eval", group="Evaluation", resume="evaluation", search="unused")
_keep = partial(option, section="train", group="Checkpoints and trackers", resume="nothing", search="unused")
_EACH_EPOCH = "once an epoch"


@dataclass(kw_only=True)
class TrainConfig(Options):
    """One run. ``lora`` holds the adapter's fields; its ``task_type`` follows from ``task``.

    Raises:
        ConfigError: an unknown option, a wrong type, a value out of range, or options that contradict.
    """

    unknown = "there is no such training option"

    # On a resume, weights and rows are compared by their contents: they may lie elsewhere.
    model: str = _run(
        NEEDED, path(), "Pretrained model: a folder or a name on the hub", section="model", key="name", resume="nothing"
    )
    data: Any = _run(
        NEEDED, SOURCES, "Training rows: a file (JSONL, JSON, CSV, TSV, Parquet, text), a folder, a glob or a dataset",
        section="data", key="train",
    )  # fmt: skip
    task: str = _run(NEEDED, choice(*TASKS), "What to train for")
    output: str = _run(NEEDED, path(), "Folder for the adapter, the records and the plots", resume="nothing")
    overwrite: bool = _run(False, flag(), "Replace the adapter and checkpoints in that folder", resume="nothing")

    revision: str | None = _model(None, text(), "Branch, tag or commit of the model on the hub", resume="nothing")
    dtype: str = _model("float32", choice(*DTYPES), "Type of the frozen model's weights; the adapter has float32")
    attn_implementation: str | None = _model(
        None, text(), "Attention: sdpa, eager, flash_attention_2, ...", unset="the model's", resume="rounding"
    )
    device: str | None = _model(
        None, text(), "Device: cpu, cuda, cuda:1, mps", unset="an accelerator, if any", resume="rounding"
    )

    eval_split: Any = _data(
        0.1, SPLIT, "Rows to validate on: a share, a count, or a source of their own", key="validation"
    )
    format: str | None = _data(None, text(), "Shape of the rows, such as text-label", unset="recognised")
    columns: dict[str, str] = _data({}, COLUMNS, 'Names of columns, ours to yours, such as {"text": "body"}')
    max_length: int | None = _data(None, whole(1), "Tokens of a row at most", unset="512, or what the model reads")
    overlong: str = _data("truncate", choice(*OVERLONG), "What becomes of longer rows; they are counted")
    on_bad_row: str = _data("stop", choice(*ON_BAD_ROW), "A bad row ends the run, or goes to a file with the reason")
    allow_untrained: bool = _data(False, flag(), "Leave out rows of which nothing is trained on")
    chat_template: str | None = _data(
        None, text(), "Chat template: a file, or the template itself", unset="the tokenizer's"
    )
    date: str | None = _data(None, DATE, "Day that a chat template writes", unset="the day the run begins")
    stride: int = _data(128, whole(0), "Tokens that windows of a long context share (question-answering)")
    problem_type: str | None = _data(None, choice(*PROBLEMS), "What a label of seq-cls is", unset="recognised")
    data_workers: int | None = _data(
        None, whole(1), "Processes that tokenise", key="workers", unset="by the cores", resume="nothing"
    )

    lora: LoraConfig = field(default_factory=LoraConfig)

    epochs: float = _train(3, number(above=True), "Passes over the training rows; may have a fraction")
    max_steps: int | None = _train(None, whole(1), "Steps in all, instead of epochs")
    batch_size: int = _train(16, whole(1), "Rows of one forward, over all processes")
    gradient_accumulation_steps: int = _train(1, whole(1), "Forwards whose gradients make one step")
    learning_rate: float = _train(
        2e-4, number(above=True), "Peak learning rate; LoRA takes about ten times that of full fine-tuning",
        flags=("--lr", "--learning-rate"),
    )  # fmt: skip
    loraplus_lr_ratio: float = _train(1.0, number(above=True), "Learning rate of B divided by that of A (LoRA+)")
    lr_scheduler_type: str = _train("linear", choice(*SCHEDULES), "Learning rate after the warmup")
    warmup_ratio: float = _train(0.05, number(high=1), "Share of the steps in which the learning rate rises")
    warmup_steps: int | None = _train(None, whole(0), "Steps in which it rises, instead of a share")
    decay_ratio: float = _train(0.2, number(high=1), "Share of the steps in which warmup_stable_decay falls")
    loss: str | None = _train(
        None,
        text(),
        "Loss of your own, my_module:my_function of (outputs, batch), one value a row",
        unset="the task's",
        search="same",
        since="0.2",
    )
    optim: str = _train(
        "adamw", text("adamw or the name of a class of torch.optim", ""), "adamw, or a class of torch.optim"
    )
    optim_args: dict[str, Any] = _train(
        {},
        mapping("be keys and values, such as {momentum: 0.9}", {}),
        'Arguments of that class, such as {"momentum": 0.9}',
    )
    weight_decay: float = _train(0.0, number(), "Weight decay of the optimizer")
    max_grad_norm: float = _train(1.0, number(above=True), "Gradients are clipped to this norm")
    gradient_checkpointing: bool = _train(
        False,
        flag(),
        "Recompute activations in the backward: less memory, about a third more time",
        resume="rounding",
        search="same",
    )
    fsdp: bool = _train(False, flag(), "Shard the frozen model over the processes of torchrun", search="same")
    seed: int = _train(0, whole(0, 2**63 - 1), "Random seed of split, order, initialisation and dropout", search="same")

    eval_strategy: str | None = _eval(None, choice(*MOMENTS), "When to evaluate", key="strategy", unset=_EACH_EPOCH)
    eval_steps: int | None = _eval(None, whole(1), "Evaluate every N steps", key="steps")
    eval_minutes: float | None = _eval(None, number(above=True), "Evaluate every N minutes", key="minutes")
    eval_batch_size: int = _eval(
        64,
        whole(1),
        "Rows at once when evaluating; changes no result",
        key="batch_size",
        resume="nothing",
        search="same",
    )
    metrics: list[str] | None = _eval(
        None, names(), "Metrics beside the loss: names, or my_module:my_function", unset="the task's", search="same"
    )
    metric_for_best_model: str | None = _eval(None, text(), "Metric that says which is best", unset="the first metric")
    load_best_model_at_end: bool = _eval(False, flag(), "Keep the best adapter instead of the last one")
    early_stopping_patience: int | None = _eval(None, whole(1), "Stop after N evaluations without improvement")
    early_stopping_threshold: float = _eval(0.0, number(), "Least improvement that counts")
    max_new_tokens: int = _eval(
        64, whole(1), "Tokens to generate for metrics and examples", resume="nothing", search="same"
    )

    save_strategy: str | None = _keep(None, choice(*MOMENTS), "When to save a checkpoint", unset=_EACH_EPOCH)
    save_steps: int | None = _keep(None, whole(1), "Save a checkpoint every N steps")
    save_minutes: float | None = _keep(None, number(above=True), "Save a checkpoint every N minutes")
    save_total_limit: int = _keep(2, whole(1), "Checkpoints to keep; the newest and the best always stay")
    report_to: list[str] = _keep(
        ["tensorboard"], names(none=True), "Trackers: tensorboard, wandb, mlflow, ..., or none"
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
