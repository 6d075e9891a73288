"""Commands that train: a search, and one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loraloom.cli.command import RunFile, Settings, check_task
from loraloom.config import runfile
from loraloom.config.options import GROUPS
from loraloom.errors import ConfigError

#: What ``--resume`` means that names no checkpoint.
NEWEST = "newest"


def tune(
    given: dict[str, Any],
    run_file: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN.yaml|DIR",
            help="Run file, or folder of a search to resume or extend; options that are given beside it win over it",
        ),
    ] = None,
    settings: Settings = None,
    add_trials: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Extend the search in the folder by N trials, also a finished one",
            rich_help_panel="Search",
        ),
    ] = None,
    stop: Annotated[
        list[int] | None,
        typer.Option(
            metavar="TRIAL",
            help="Ask the search that runs in DIR to stop a trial; repeatable",
            rich_help_panel="Search",
        ),
    ] = None,
    keep: Annotated[
        list[int] | None,
        typer.Option(
            metavar="TRIAL",
            help="Ask the search that runs in DIR to pause a trial at no rung; repeatable",
            rich_help_panel="Search",
        ),
    ] = None,
) -> None:
    """Train many configurations at once on one frozen model, and say which to use and why.

    Give a run file, or --model, --data, --task and --output. Key tune.space sets what varies, for example --set
    'tune.space={lora.r: [8, 16]}'. After a stop the same command, or the folder alone, resumes the search.
    """
    from loraloom.report.session import steer_run, tune_run
    from loraloom.tuning import extension

    if stop or keep:
        if run_file is None or not Path(run_file).is_dir() or given or settings or add_trials is not None:
            option = "stop" if stop else "keep"
            raise ConfigError(f"--{option}: stands alone with the folder of a search: loraloom tune DIR --{option} 3")
        steer_run(run_file, stop or (), keep or ())
    else:
        tune_run(extension.read(run_file, settings or (), given), add_trials=add_trials)


def train(
    given: dict[str, Any],
    run_file: RunFile = None,
    settings: Settings = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[PATH]",
            help="Resume from the newest checkpoint of the output folder, or from PATH (a checkpoint, or an output "
            "folder); options that are not given are those of that run",
            rich_help_panel=GROUPS[0],
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do all checks and estimates, but do not train", rich_help_panel=GROUPS[0])
    ] = False,
) -> None:
    """Train one adapter: the adapter, its records and a plot go to the output folder.

    Give a run file, or --model, --data, --task and --output.
    """
    found = runfile.read(run_file, settings or (), given, check_task, resume=resume == NEWEST or resume)
    for key, place in found.places.items():
        if key.startswith("tune.") and place.startswith("--set"):
            raise ConfigError(f"{place}: does nothing here; it is read by loraloom tune alone")
    from loraloom.report.session import train_run

    train_run(found.options, resume=found.resume, dry_run=dry_run, notes=found.notes)


def whole_resume(arguments: list[str]) -> list[str]:
    """``--resume`` may stand alone, which the parser does not know."""
    out = []
    for argument, following in zip(arguments, [*arguments, "-"][1:], strict=True):
        alone = following.startswith("-") or following.lower().endswith((".yaml", ".yml"))
        out.append(f"--resume={NEWEST}" if argument == "--resume" and alone else argument)
    return out
