"""A commented run file for a model and data, with the values that follow from them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraloom import tasks
from loraloom.config import runfile
from loraloom.config.lora import LoraConfig
from loraloom.config.names import TASKS as NAMES
from loraloom.config.options import Option, options_of
from loraloom.config.train import TrainConfig
from loraloom.data.read.sources import resolve
from loraloom.data.shape.shapes import Shape, proposals, recognise
from loraloom.errors import ConfigError, DataError, nearest
from loraloom.files.atomic import write_files
from loraloom.models.configs import tokens_at_most, width
from loraloom.models.load import build_empty, length_within, load_config
from loraloom.tasks import TASKS
from loraloom.training.preflight.rates import start

#: More rows are not counted.
_MANY = 30_000
#: Rows from which the shape is recognised.
_LOOK = 100


def guess(
    data: Any,
    task: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    skip: bool = False,
) -> tuple[str, Shape]:
    """The task of the rows of ``data``, and their shape. With ``skip``, bad rows are ignored.

    Raises:
        DataError: the rows fit no task, or not the given one.
    """
    source = resolve(data, format=format)[0]
    rows = source.first(_LOOK, (lambda bad: None) if skip else None)
    if task is not None:
        if task not in TASKS:
            raise ConfigError(f"task: must be one of {', '.join(NAMES)}, found {task!r}{nearest(task, NAMES)}")
        return task, recognise(rows, TASKS[task], format, columns, skip=skip)
    wrong: list[ConfigError] = []
    for name in TASKS:
        try:
            return name, recognise(rows, TASKS[name], format, columns, skip=skip)
        except DataError:
            continue
        except ConfigError as error:
            wrong.append(error)
    if len(wrong) == len(TASKS):  # a format or columns of no task
        raise next((error for error in wrong if "did you mean" in str(error)), wrong[-1])
    there = ", ".join(map(repr, rows[0].fields))
    seem = [f"--task {name} {option}" for name in TASKS for option in proposals(rows[0], TASKS[name])[:1]]
    if seem:
        raise DataError(
            f"{rows[0].where}: the columns {there} fit no task as they are called; give what they are, for example "
            f"{' or '.join(seem[:3])}"
        )
    raise DataError(
        f"{rows[0].where}: the columns {there} fit no task; give the task, and columns to say which is which "
        "(docs/data.md has all shapes)"
    )


def begin(
    model: str,
    data: Any,
    path: str | Path,
    *,
    task: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
    **rows: Any,
) -> str:
    """Write a commented run file to ``path`` for ``model`` and ``data``. Returns the task.

    Args:
        rows: given options of the data, by their names in ``TrainConfig``: ``columns``, ``format``, ...

    Raises:
        ConfigError: the file exists.
        DataError: the rows fit no task.
        ModelError: no such model, or one for other tasks.
        SaveError: the file cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ConfigError(f"{path}: is there already; choose another name, or give --overwrite")
    config = load_config(model)
    length = length_within(tokens_at_most(config), rows.pop("max_length", None), model)
    given = {key: rows.get(key) for key in ("format", "columns")}
    found, shape = guess(data, task, **given, skip=rows.get("on_bad_row") == "skip")
    build_empty(model, TASKS[found])  # raises for a model of another task
    name = output or f"runs/{path.stem}"
    count = _count(data, rows.get("format"))
    rate, epochs = start(width(config), TASKS[found], count, TrainConfig.batch_size)
    rows |= {"learning_rate": rate, "epochs": epochs, "max_length": length}
    lora = LoraConfig(**{one.name: one.starter for one in options_of(LoraConfig).values() if one.starter is not None})
    # Checked as a whole, so that the written file can be read.
    options = TrainConfig(model=model, data=data, task=found, output=name, lora=lora, **rows)
    tasks.check(options)
    many = "many" if count == _MANY else f"{count:,}"
    comments = {
        "data.train": f"recognised as {shape.name}; a list of sources may have weights",
        "train.learning_rate": "For a model of this width: about ten times that of full fine-tuning",
        "train.epochs": f"Passes over the training rows; chosen for {many} rows",
    }
    text = runfile.render(options, _is_written, _COMMENTED, comments)
    write_files(path.parent, {path.name: f"{_HEAD.format(name=path.name)}\n{text}".encode()})
    return found


def _count(data: Any, format: str | None) -> int:
    """Rows of all sources, at most ``_MANY``."""
    readers = (source.read(lambda bad: None) for source in resolve(data, format=format))
    return sum(1 for _ in itertools.islice(itertools.chain.from_iterable(readers), _MANY))


#: Keys in every starter file, and keys in it as comments.
_WRITTEN = {
    *("model.dtype", "data.validation", "data.max_length", "data.overlong", "data.on_bad_row"),
    *("train.learning_rate", "train.epochs", "train.batch_size", "train.gradient_accumulation_steps"),
    *("train.lr_scheduler_type", "train.warmup_ratio", "train.weight_decay", "train.max_grad_norm"),
    *("train.save_total_limit", "train.seed", "eval.batch_size"),
}
_COMMENTED: dict[str, Any] = {
    "model.device": "cuda",
    "model.attn_implementation": "sdpa",
    "data.columns": {"text": "body"},
    "train.max_steps": 1000,
    "train.optim": "adamw",
    "train.gradient_checkpointing": True,
    "train.save_steps": 200,
    "train.report_to": ["tensorboard"],
    "eval.steps": 200,
    "eval.metrics": ["accuracy"],
    "eval.load_best_model_at_end": True,
    "eval.early_stopping_patience": 3,
}
_HEAD = """\
# Look at the data:         loraloom data {name}
# Memory and time:          loraloom train {name} --dry-run
# Find better values:       loraloom tune {name}
# Train:                    loraloom train {name}
# Resume after a stop:      loraloom train {name} --resume
# Change one value:         --set lora.r=8, or the option --lora-r 8
"""


def _is_written(option: Option, value: Any) -> bool:
    return bool(option.help) and (option.key in _WRITTEN or option.starter is not None or value != option.default)
