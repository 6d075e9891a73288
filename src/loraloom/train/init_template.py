"""A run file to begin with, for a model and data: what can be known of them is filled in, comments say the rest."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraloom import tasks
from loraloom.config import yamltext
from loraloom.config.lora import LoraConfig
from loraloom.config.names import TASKS as NAMES
from loraloom.config.train import TrainConfig
from loraloom.data.read.sources import resolve
from loraloom.data.shape.shapes import Shape, proposals, recognise
from loraloom.errors import ConfigError, DataError, nearest
from loraloom.files.atomic import write_files
from loraloom.models.configs import tokens_at_most, width
from loraloom.models.load import build_empty, length_within, load_config
from loraloom.tasks import TASKS
from loraloom.train.preflight.rates import start

#: More rows than this are many.
_MANY = 30_000
#: Rows by which the shape is recognised.
_LOOK = 100


def guess(
    data: Any,
    task: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    skip: bool = False,
) -> tuple[str, Shape]:
    """The task that the rows of ``data`` are for, and their shape. With ``skip``, bad rows are passed over.

    Raises:
        DataError: they fit no task, or not the one that is given.
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
    if len(wrong) == len(TASKS):  # a format or columns that no task knows
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
        rows: options of the data that are given, by their names in ``TrainConfig``: ``columns``, ``format``, ...

    Raises:
        ConfigError: there is a file already.
        DataError: the rows fit no task.
        ModelError: no such model, or one that is for other tasks.
        SaveError: the file cannot be written.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ConfigError(f"{path}: is there already; choose another name, or give --overwrite")
    config = load_config(model)
    length = length_within(tokens_at_most(config), rows.pop("max_length", None), model)
    given = {key: rows.get(key) for key in ("format", "columns")}
    found, shape = guess(data, task, **given, skip=rows.get("on_bad_row") == "skip")
    build_empty(model, TASKS[found])  # one that is for another task is said now
    name = output or f"runs/{path.stem}"
    count = _count(data, rows.get("format"))
    rate, epochs = start(width(config), TASKS[found], count, TrainConfig.batch_size)
    rows |= {"learning_rate": rate, "epochs": epochs}
    # Checked as a whole: what is written can be read.
    options = TrainConfig(model=model, data=data, task=found, output=name, lora=LoraConfig(**_LORA), **rows)
    tasks.check(options)
    write_files(path.parent, {path.name: _text(options, shape, length, path.name, count).encode()})
    return found


def _more(options: TrainConfig) -> str:
    """Lines of the data's section that are there where they were given."""
    found = [f"  {key}: {yamltext.write(got)}\n" for key in ("format", "chat_template", "problem_type")
             if (got := getattr(options, key)) is not None]  # fmt: skip
    if options.columns:
        found.append(f"  columns: {yamltext.write(options.columns)}  # our names of columns, and yours\n")
    else:
        found.append("  # columns: {text: body}  # our names of columns, and yours\n")
    return "".join(found)


_LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}


def _count(data: Any, format: str | None) -> int:
    """Rows of all sources, or more than anything depends on."""
    readers = (source.read(lambda bad: None) for source in resolve(data, format=format))
    return sum(1 for _ in itertools.islice(itertools.chain.from_iterable(readers), _MANY))


def _text(options: TrainConfig, shape: Shape, length: int, name: str, count: int) -> str:
    value = yamltext.write
    return f"""\
# Look at the data:      loraloom data {name}
# See what it costs:     loraloom train {name} --dry-run
# Train:                 loraloom train {name}
# Go on after a stop:    loraloom train {name} --resume
# Find better values:    loraloom tune {name}
# Change one value:      --set lora.r=8, or the option --lora-r 8

task: {options.task}  # {", ".join(NAMES)}

model:
  name: {value(options.model)}  # a folder or a hub name
  dtype: {options.dtype}  # what the frozen model is held in: float32, bfloat16 or float16
  # device: cuda  # by default an accelerator where there is one
  # attn_implementation: sdpa

data:
  train: {value(options.data)}  # recognised as {shape.name}; a list of sources may have weights
  validation: {value(options.eval_split)}  # a share, a count, or a source of its own
  max_length: {length}  # tokens of a row
  overlong: {options.overlong}  # what becomes of longer rows: error, truncate, drop or split; they are counted
  on_bad_row: {options.on_bad_row}  # or skip: bad rows go to a file, with reasons
{_more(options)}
lora:
  r: {options.lora.r}  # rank of the update: small data needs little
  lora_alpha: {options.lora.lora_alpha}  # the update is scaled by alpha / r
  lora_dropout: {options.lora.lora_dropout}  # on the adapter's input, while training
  target_modules: all-linear  # or names, such as [q_proj, v_proj]

train:
  learning_rate: {value(options.learning_rate)}  # for a model of this width: about ten times that of full fine-tuning
  batch_size: 16  # rows of one forward
  gradient_accumulation_steps: 1  # forwards that make a step
  epochs: {value(options.epochs)}  # times through the data, for {"many" if count == _MANY else f"{count:,}"} rows
  # max_steps: 1000  # instead of epochs
  lr_scheduler_type: linear  # cosine, constant or warmup_stable_decay
  warmup_ratio: 0.05  # share of the steps in which the rate rises
  weight_decay: 0.0  # the optimizer's
  max_grad_norm: 1.0  # gradients are clipped to this norm
  # optim: adamw  # or any class of torch.optim, with optim_args
  # gradient_checkpointing: true  # less memory, about a third more time
  save_total_limit: 2  # checkpoints that stay; the newest and the best always do
  # save_steps: 200  # by default each epoch; or save_minutes: 30, or save_strategy: "no"
  seed: 0  # of the split, the order, the start and the dropout
  # report_to: [tensorboard]  # wandb, mlflow, trackio ..., or [] for none

eval:
  batch_size: 64  # rows at once; changes no result
  # steps: 200  # by default each epoch; or minutes: 30, or strategy: "no"
  # metrics: [accuracy]  # or my_module:my_function
  # load_best_model_at_end: true
  # early_stopping_patience: 3

output: {value(options.output)}  # the folder for what comes out
"""
