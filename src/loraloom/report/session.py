"""``loraloom train`` as a function: prepare, train with progress, draw, and say what came out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from loraloom.errors import SaveError
from loraloom.report.plot import PLOT_NAME, plot_run
from loraloom.report.terminal import Meter, outcome, overview
from loraloom.train.options import TrainOptions
from loraloom.train.run import RUN_NAME, Interrupted, RunResult, prepare, run


def train_run(options: TrainOptions, console: Console | None = None) -> RunResult:
    """Train as ``options`` say, and tell ``console`` (by default the terminal) about it.

    The output folder gets the adapter, ``run.json`` and ``curves.png``.

    Raises:
        LoraloomError: as ``prepare`` and ``run``. What training reached is saved whenever it took a step.
    """
    console = console or Console()
    prepared = prepare(options)
    console.print(overview(prepared), soft_wrap=True)
    try:
        with Meter(console, prepared.steps) as meter:
            result = run(prepared, meter)
    except Interrupted as error:
        if error.record:
            _draw(error.record, options.output)
        raise
    plot = _draw(result.record, options.output)
    console.print(outcome(result, options.output, plot, Path(options.output) / RUN_NAME), soft_wrap=True)
    return result


def _draw(record: Mapping[str, Any], folder: str) -> Path:
    path = Path(folder) / PLOT_NAME
    try:
        plot_run(record, path)
    except OSError as error:
        raise SaveError(
            f"{path}: cannot be written ({error.strerror or error}); the adapter and {RUN_NAME} are saved in {folder}"
        ) from None
    return path
