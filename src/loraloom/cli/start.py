"""Commands to begin with: a run file, a look at the data, a count of what training needs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from loraloom.cli.command import Settings, check_task, need
from loraloom.config import keys, runfile
from loraloom.config.lora import LoraConfig
from loraloom.config.options import GROUPS
from loraloom.config.schema import schema as make_schema
from loraloom.report.screen import log

_RUN = GROUPS[0]


def init(
    given: dict[str, Any],
    path: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The file to write [default: run.yaml]")] = "run.yaml",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file", rich_help_panel=_RUN)] = False,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON Schema of run files, and write nothing", rich_help_panel=_RUN),
    ] = False,
) -> None:
    """Write a run file for a model and data, with a comment on every key."""
    if schema:
        print(json.dumps(make_schema(), indent=2))
        return
    need(given, keys.TRAIN["model"], keys.TRAIN["data"])
    from loraloom.training.init_template import begin

    rows = keys.fields_of(given)
    task = begin(rows.pop("model"), rows.pop("data"), path, overwrite=overwrite, **rows)
    log(f"{path}: {task}; next: loraloom data {path}, then loraloom tune {path} or loraloom train {path}")


def data(
    given: dict[str, Any],
    source: Annotated[str, typer.Argument(metavar="DATA", help="Rows, as --data of train; or a run file (.yaml)")],
    settings: Settings = None,
    rows: Annotated[int, typer.Option(metavar="N", help="Rows to show [default: 3]", rich_help_panel=_RUN)] = 3,
) -> None:
    """Show what the model will see: rows with the trained tokens marked, lengths, duplicates, memory and time."""
    given = {**given, "output": "-"}
    if source.lower().endswith((".yaml", ".yml")):
        found = runfile.read(source, settings or (), given, check_task)
    else:
        need(given, keys.TRAIN["model"])
        from loraloom.training.init_template import guess

        rest = given.get("data.format"), given.get("data.columns"), given.get("data.on_bad_row") == "skip"
        given.setdefault("task", given.get("task") or guess(source, None, *rest)[0])
        found = runfile.read(None, settings or (), {**given, "data.train": source}, check_task)
    from loraloom.report.session import data_run

    data_run(found.options, rows=rows)


def plan(
    given: dict[str, Any],
    labels: Annotated[
        int, typer.Option(metavar="N", help="Classes of a new head (seq-cls) [default: 2]", rich_help_panel=_RUN)
    ] = 2,
) -> None:
    """Show what would be adapted and the memory that training needs, from the model's config alone."""
    need(given, keys.TRAIN["model"], keys.TRAIN["task"])
    notes: list[str] = []
    lora, rest = keys.split(runfile.with_starter(given, notes))
    config = LoraConfig(**lora)
    from loraloom.report.terminal import memory_table
    from loraloom.training.preflight.memory import forecast

    values = {name: one.default for name, one in keys.TRAIN.items()} | rest
    chosen = {name: values[name] for name in ("batch_size", "max_length", "dtype", "gradient_checkpointing")}
    made, memory, length = forecast(values["model"], values["task"], config, labels=labels, **chosen)
    for note in [*notes, str(made)]:
        log(note)
    log(f"memory of a training step with {chosen['batch_size']} rows of {length} tokens in {chosen['dtype']}:")
    log(memory_table(memory))
    if memory.logits:
        log(memory.logits)
