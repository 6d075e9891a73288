"""What one training run is told: checked as a whole before anything is loaded. Names are TrainingArguments'."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from loraloom.config import LoraConfig, TaskType
from loraloom.errors import ConfigError, nearest

#: The names of tasks on the command line and in run files.
TASKS = {"seq-cls": TaskType.SEQ_CLS, "causal-lm": TaskType.CAUSAL_LM}
DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(kw_only=True)
class TrainOptions:
    """One run. ``lora`` holds the adapter's fields; its ``task_type`` follows from ``task``.

    Raises:
        ConfigError: an unknown option, a wrong type or a value out of range.
    """

    model: str
    data: str
    task: str
    output: str
    lora: LoraConfig = field(default_factory=LoraConfig)
    #: Rows to validate on: a share below 1, a count, or a file of their own.
    eval_split: float | str | Path = 0.1
    epochs: float = 3
    #: Steps in all; overrides ``epochs``.
    max_steps: int | None = None
    #: Rows of one forward, and forwards whose gradients make one step.
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    eval_batch_size: int = 64
    learning_rate: float = 2e-4
    #: The rate of B over that of A (LoRA+, Hayou et al. 2024).
    loraplus_lr_ratio: float = 1.0
    #: After the warmup: down to 0 in a line or along a cosine, or constant.
    lr_scheduler_type: str = "linear"
    weight_decay: float = 0.0
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    #: Evaluate every so many steps; by default once an epoch.
    eval_steps: int | None = None
    #: Tokens of a row; longer ones are cut. By default 512, or what the model reads where that is less.
    max_length: int | None = None
    seed: int = 0
    dtype: str = "float32"
    overwrite: bool = False

    def __new__(cls, *args: Any, **kwargs: Any) -> TrainOptions:
        known = [spec.name for spec in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise ConfigError(f"{name}: there is no such training option{nearest(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("model", "data", "output"):
            if not isinstance(getattr(self, name), str | Path) or not str(getattr(self, name)):
                raise ConfigError(f"{name}: must be a path or a name, found {getattr(self, name)!r}")
            setattr(self, name, str(getattr(self, name)))
        if self.task not in TASKS:
            raise ConfigError(
                f"task: must be one of {', '.join(TASKS)}, found {self.task!r}{nearest(str(self.task), TASKS)}"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype: must be one of {', '.join(DTYPES)}, found {self.dtype!r}{nearest(str(self.dtype), DTYPES)}"
            )
        if self.lr_scheduler_type not in SCHEDULES:
            raise ConfigError(
                f"lr_scheduler_type: must be one of {', '.join(SCHEDULES)}, found {self.lr_scheduler_type!r}"
                f"{nearest(str(self.lr_scheduler_type), SCHEDULES)}"
            )
        for name in ("batch_size", "eval_batch_size", "gradient_accumulation_steps"):
            self._whole(name, 1)
        for name in ("max_steps", "eval_steps", "max_length"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        self._whole("seed", 0, 2**63 - 1)
        self._number("epochs", low=0, open_low=True)
        self._number("learning_rate", low=0, open_low=True)
        self._number("loraplus_lr_ratio", low=0, open_low=True)
        self._number("weight_decay", low=0)
        self._number("max_grad_norm", low=0, open_low=True)
        self._number("warmup_ratio", low=0, high=1)
        self._check_eval_split()
        if not isinstance(self.overwrite, bool):
            raise ConfigError(f"overwrite: must be true or false, found {self.overwrite!r}")
        if not isinstance(self.lora, LoraConfig):
            raise ConfigError(f"lora: must be a LoraConfig, found {type(self.lora).__name__}")
        self.lora = self.lora.copy(task_type=TASKS[self.task])

    def _check_eval_split(self) -> None:
        split = self.eval_split
        if isinstance(split, str | Path):
            try:
                split = float(str(split))
            except ValueError:
                self.eval_split = str(split)
                return  # a file; reading it says whether it is one
        if isinstance(split, bool) or not isinstance(split, int | float) or not math.isfinite(split) or split <= 0:
            raise ConfigError(f"eval_split: must be a share below 1, a count of rows, or a file, found {split!r}")
        if split >= 1 and split != int(split):
            raise ConfigError(f"eval_split: a count of rows must be whole, found {split!r}")
        self.eval_split = split if split < 1 else int(split)

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
