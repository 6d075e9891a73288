"""What one training run is told: checked as a whole before anything is loaded. Names are TrainingArguments'."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from loraloom.config.lora import LoraConfig
from loraloom.config.names import OVERLONG, SOURCE_KEYS, TASKS
from loraloom.errors import ConfigError, nearest

#: The names of tasks on the command line and in run files.
DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "constant", "warmup_stable_decay")
ON_BAD_ROW = ("stop", "skip")
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
MOMENTS = ("no", "steps", "epoch", "minutes")
#: Fields with a fixed choice of words.
_CHOICES = {
    "task": tuple(TASKS),
    "dtype": DTYPES,
    "lr_scheduler_type": SCHEDULES,
    "overlong": OVERLONG,
    "on_bad_row": ON_BAD_ROW,
    "problem_type": PROBLEMS,
    "eval_strategy": MOMENTS,
    "save_strategy": MOMENTS,
}


@dataclass(kw_only=True)
class TrainConfig:
    """One run. ``lora`` holds the adapter's fields; its ``task_type`` follows from ``task``.

    Raises:
        ConfigError: an unknown option, a wrong type, a value out of range, or options that contradict.
    """

    # -- the model
    model: str
    #: A branch, tag or commit on the hub; a folder has none.
    revision: str | None = None
    dtype: str = "float32"
    #: What computes attention, by transformers' name (sdpa, eager, ...); by default the model's own choice.
    attn_implementation: str | None = None
    #: cpu, cuda, cuda:1, mps; by default the accelerator where there is one.
    device: str | None = None

    # -- the rows
    #: A file, a folder, a glob, a hub name; or a list of these, each with a weight: {"path": "a.jsonl", "weight": 2}.
    data: Any
    task: str
    #: Rows to validate on: a share below 1, a count, or a source of their own.
    eval_split: Any = 0.1
    #: The shape of the rows, which is otherwise recognised.
    format: str | None = None
    #: Our name of a column → the user's.
    columns: dict[str, str] = field(default_factory=dict)
    #: Tokens of a row. By default 512, or what the model reads where that is less.
    max_length: int | None = None
    #: What becomes of longer rows.
    overlong: str = "truncate"
    #: A row that cannot be used ends the run, or is written to a file with the reason and left out.
    on_bad_row: str = "stop"
    #: Rows of which nothing is trained on are left out, instead of being bad ones.
    allow_untrained: bool = False
    #: A chat template in place of the tokenizer's: a file, or the template.
    chat_template: str | None = None
    #: The day, such as 2026-07-26, for a chat template that writes one; by default that on which the run begins.
    date: str | None = None
    #: Tokens that windows of a long context share (question-answering).
    stride: int = 128
    #: What a seq-cls label is; by default it is recognised.
    problem_type: str | None = None
    #: Processes that tokenise; by default as many as there are cores, for many rows.
    data_workers: int | None = None

    # -- the adapter
    lora: LoraConfig = field(default_factory=LoraConfig)

    # -- training
    epochs: float = 3
    #: Steps in all; overrides ``epochs``.
    max_steps: int | None = None
    #: Rows of one forward, over all processes, and forwards whose gradients make one step.
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    #: The rate of B over that of A (LoRA+, Hayou et al. 2024).
    loraplus_lr_ratio: float = 1.0
    #: After the warmup: down to 0 in a line or along a cosine; constant; or constant, and down to 0 at the end.
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.05
    #: Steps in which the rate rises; overrides ``warmup_ratio``.
    warmup_steps: int | None = None
    #: The last share of the steps, in which the rate of ``warmup_stable_decay`` goes down.
    decay_ratio: float = 0.2
    #: ``adamw``, or the name of any class of torch.optim, with ``optim_args`` beyond rate and weight decay.
    optim: str = "adamw"
    optim_args: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    #: Compute activations again in the backward instead of keeping them: less memory, about a third more time.
    gradient_checkpointing: bool = False
    #: Spread the frozen model over the processes, instead of a whole one on each.
    fsdp: bool = False
    seed: int = 0

    # -- evaluation
    #: When: no, steps, epoch or minutes; by default what ``eval_steps`` or ``eval_minutes`` say, else once an epoch.
    eval_strategy: str | None = None
    eval_steps: int | None = None
    eval_minutes: float | None = None
    eval_batch_size: int = 64
    #: What is measured beside the loss: names, or "package.module:function"; by default what the task has.
    metrics: list[str] | None = None
    #: By which the best checkpoint is known; by default the first metric.
    metric_for_best_model: str | None = None
    #: The adapter of the output is the best one, not the last one.
    load_best_model_at_end: bool = False
    #: End after so many evaluations without a better one, by more than the threshold.
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    #: Tokens that are generated for metrics and examples.
    max_new_tokens: int = 64

    # -- what is kept
    output: str
    overwrite: bool = False
    #: When a checkpoint is saved, as with ``eval_strategy``.
    save_strategy: str | None = None
    save_steps: int | None = None
    save_minutes: float | None = None
    #: Checkpoints that stay; the newest and the best one always do.
    save_total_limit: int = 2
    #: Trackers by accelerate's names: tensorboard, wandb, mlflow, trackio ...
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __new__(cls, *args: Any, **kwargs: Any) -> TrainConfig:
        known = [spec.name for spec in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise ConfigError(f"{name}: there is no such training option{nearest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("model", "output"):
            if not _is_path(getattr(self, name)):
                raise ConfigError(f"{name}: must be a path or a name, found {getattr(self, name)!r}")
            setattr(self, name, str(getattr(self, name)))
        self.data = _sources("data", self.data)
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known and not (value is None and name in _OPTIONAL):
                hint = nearest(str(value), known)
                raise ConfigError(f"{name}: must be one of {', '.join(known)}, found {value!r}{hint}")
        for name in ("revision", "attn_implementation", "device", "format", "chat_template", "metric_for_best_model"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ConfigError(f"{name}: must be text, found {value!r}; leave it out for the default")
        self._check_date()
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation_steps", "save_total_limit"):
            self._whole(name, 1)
        self._whole("max_new_tokens", 1)
        for name in ("max_steps", "eval_steps", "save_steps", "max_length", "early_stopping_patience", "data_workers"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        if self.warmup_steps is not None:
            self._whole("warmup_steps", 0)
        self._whole("stride", 0)
        self._whole("seed", 0, 2**63 - 1)
        for name in ("epochs", "learning_rate", "loraplus_lr_ratio", "max_grad_norm", "eval_minutes", "save_minutes"):
            if getattr(self, name) is not None or not name.endswith("_minutes"):
                self._number(name, low=0, open_low=True)
        for name in ("weight_decay", "early_stopping_threshold"):
            self._number(name, low=0)
        for name in ("warmup_ratio", "decay_ratio"):
            self._number(name, low=0, high=1)
        for name in ("overwrite", "allow_untrained", "gradient_checkpointing", "fsdp", "load_best_model_at_end"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: must be true or false, found {getattr(self, name)!r}")
        self._check_eval_split()
        self._check_mappings()
        self._check_lists()
        self._check_moments()
        self._check_of_task()
        if not isinstance(self.lora, LoraConfig):
            raise ConfigError(f"lora: must be a LoraConfig, found {type(self.lora).__name__}")
        self.lora = self.lora.copy(task_type=TASKS[self.task])

    def _check_date(self) -> None:
        try:
            if self.date is not None:  # YAML reads a date as one
                self.date = datetime.date.fromisoformat(str(self.date)).isoformat()
        except ValueError:
            raise ConfigError(f"date: must be a day such as 2026-07-26, found {self.date!r}") from None

    def _check_eval_split(self) -> None:
        split = self.eval_split
        if isinstance(split, str | Path):
            try:
                split = float(str(split))
            except ValueError:
                self.eval_split = _sources("eval_split", split)
                return  # reading it says whether it is there
        elif isinstance(split, list | Mapping):
            self.eval_split = _sources("eval_split", split)
            return
        if isinstance(split, bool) or not isinstance(split, int | float) or not math.isfinite(split) or split <= 0:
            raise ConfigError(f"eval_split: must be a share below 1, a count of rows, or a file, found {split!r}")
        if split >= 1 and split != int(split):
            raise ConfigError(f"eval_split: a count of rows must be whole, found {split!r}")
        self.eval_split = split if split < 1 else int(split)

    def _check_mappings(self) -> None:
        if not isinstance(self.columns, Mapping) or not all(
            isinstance(part, str) and part for pair in self.columns.items() for part in pair
        ):
            raise ConfigError(
                f"columns: must give names for names, such as {{prompt: question}}, found {self.columns!r}"
            )
        if not isinstance(self.optim_args, Mapping) or not all(isinstance(key, str) for key in self.optim_args):
            raise ConfigError(
                f"optim_args: must be keys and values, such as {{momentum: 0.9}}, found {self.optim_args!r}"
            )
        self.columns, self.optim_args = dict(self.columns), dict(self.optim_args)
        if not isinstance(self.optim, str) or not self.optim:
            raise ConfigError(f"optim: must be adamw or the name of a class of torch.optim, found {self.optim!r}")
        if self.optim_args and self.optim == "adamw":
            raise ConfigError("optim_args: adamw takes none; for torch's own class with arguments give optim: AdamW")

    def _check_lists(self) -> None:
        for name in ("metrics", "report_to"):
            value = getattr(self, name)
            if value is None and name == "metrics":
                continue
            names = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
            written = isinstance(names, list | tuple) and all(isinstance(part, str) and part for part in names)
            if not written or (isinstance(value, str) and not names):
                raise ConfigError(f"{name}: must be a list of names, found {value!r}")
            setattr(self, name, list(names))
        if self.report_to == ["none"]:
            self.report_to = []

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

    def _check_of_task(self) -> None:
        """What does nothing is an error: an option of other tasks than this one."""
        for name, (tasks, what) in _OF_TASKS.items():
            if self.task not in tasks and getattr(self, name) != _DEFAULTS[name]:
                raise ConfigError(
                    f"{name}: does nothing with task={self.task}; it is {what} ({', '.join(tasks)}); leave it out"
                )
        if self.overlong == "split" and self.task in _WHOLE:
            raise ConfigError(
                f"overlong: {self.task} cannot split a row, for {_WHOLE[self.task]}; choose truncate, drop or error"
            )
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

    def _whole(self, name: str, low: int, high: float = math.inf) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low or value > high:
            words = f" and at most {high}" if math.isfinite(high) else ""
            raise ConfigError(f"{name}: must be a whole number of at least {low}{words}, found {value!r}")

    def _number(self, name: str, low: float, high: float = math.inf, open_low: bool = False) -> None:
        value = getattr(self, name)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or value < low or (open_low and value == low) or value > high:
            words = f"above {low}" if open_low else f"at least {low}"
            words += f" and at most {high}" if math.isfinite(high) else ""
            raise ConfigError(f"{name}: must be a number {words}, found {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for ``run.json``."""
        return {
            spec.name: self.lora.to_dict() if spec.name == "lora" else getattr(self, spec.name) for spec in fields(self)
        }


_DEFAULTS = {spec.name: spec.default for spec in fields(TrainConfig)}
#: Options of some tasks alone, and what they are.
_OF_TASKS = {
    "stride": (("question-answering",), "how much the windows of a long context share"),
    "problem_type": (("seq-cls",), "what the labels of texts are"),
    "chat_template": (("causal-lm",), "how conversations are written"),
    "date": (("causal-lm",), "the day that a chat template writes"),
    "max_new_tokens": (("causal-lm", "seq2seq-lm"), "how much is generated for metrics"),
}
#: Tasks whose rows are one whole, and why.
_WHOLE = {
    "seq-cls": "its label is of the text as a whole",
    "seq2seq-lm": "it is not known which part of the target belongs to which part of the source",
}
_OPTIONAL = ("problem_type", "eval_strategy", "save_strategy")


def _is_path(value: Any) -> bool:
    return isinstance(value, str | Path) and bool(str(value)) and "\0" not in str(value)


def _sources(name: str, value: Any) -> Any:
    """A path or name as text; a list of them as a list of these and of ``{"path", "weight"}``."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list | tuple) and value:
        return [_weighted(name, entry) if isinstance(entry, Mapping) else _sources(name, entry) for entry in value]
    if _is_path(value):
        return str(value)
    raise ConfigError(f"{name}: must be a path or a name, or a list of these, found {value!r}")


def _weighted(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    for key in entry:
        if key not in SOURCE_KEYS:
            raise ConfigError(
                f"{name}: a source has {', '.join(SOURCE_KEYS)}; found {key!r}{nearest(str(key), SOURCE_KEYS)}"
            )
    weight = entry.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight <= 0:
        raise ConfigError(f"{name}: a weight must be a number above 0, found {weight!r}")
    if not _is_path(entry.get("path")):
        raise ConfigError(f"{name}: a source must have a path, found {dict(entry)!r}")
    return {**entry, "path": str(entry["path"]), "weight": weight}
