"""``loraloom train`` and ``loraloom tune`` as functions: prepare, train with progress, draw, and say what came out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from loraloom.errors import SaveError
from loraloom.report.plot import PLOT_NAME, plot_run
from loraloom.report.terminal import Meter, outcome, overview
from loraloom.report.tune import TuneMeter, conclusion, leaderboard
from loraloom.report.tune_plot import PARETO_NAME, SEARCH_NAME, plot_pareto, plot_search
from loraloom.train.options import TrainOptions
from loraloom.train.resume import Resume
from loraloom.train.run import RUN_NAME, Interrupted, RunResult, prepare, run
from loraloom.tune.options import TuneOptions
from loraloom.tune.search import BEST_FILE, BEST_NAME, RESULT_NAME, SearchResult, search


def train_run(options: TrainOptions, console: Console | None = None, *, resume: Resume = None) -> RunResult:
    """Train as ``options`` say, and tell ``console`` (by default the terminal) about it.

    The output folder gets the adapter, ``run.json`` and ``curves.png``, and checkpoints on the way. ``resume`` is True
    to go on from the newest of them, or the path of one: see ``train.run.run``.

    Raises:
        LoraloomError: as ``prepare`` and ``run``. What training reached is saved whenever it took a step.
    """
    console = console or Console()
    prepared = prepare(options, resume)
    console.print(overview(prepared), soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        with Meter(console, prepared.steps) as meter:
            result = run(prepared, meter, resume, say)
    except Interrupted as error:
        if error.record:
            _draw(error.record, options.output)
        raise
    plot = _draw(result.record, options.output)
    console.print(outcome(result, options.output, plot, Path(options.output) / RUN_NAME), soft_wrap=True)
    return result


def tune_run(options: TuneOptions, console: Console | None = None) -> SearchResult:
    """Search as ``options`` say, or go on with the search in their folder, and tell ``console`` about it.

    The output folder gets the best adapter, ``best.yaml``, ``result.json`` and two pictures.

    Raises:
        LoraloomError: as ``search``.
    """
    console = console or Console()
    with TuneMeter(console, options.metric) as meter:
        result = search(options, meter)
    found, folder, metric = result.verdict, result.folder, options.metric
    console.print(leaderboard(found, options.metric, width=console.width))
    console.print(conclusion(found))
    saved = f"the best adapter and {RESULT_NAME} are saved in {folder}"
    pictures = [
        _written(folder / SEARCH_NAME, saved, lambda to: plot_search(found.trials, metric, to, found.best.number)),
        _written(folder / PARETO_NAME, saved, lambda to: plot_pareto(found, found.trials, metric, to)),
    ]
    lines = {"adapter": folder / BEST_NAME, "in full": f"loraloom train {shlex.quote(str(folder / BEST_FILE))}"}
    lines |= {"record": folder / RESULT_NAME, "pictures": ", ".join(map(str, pictures))}
    console.print(
        "\n" + "\n".join(f"{what:9}{where}" for what, where in lines.items()), soft_wrap=True, highlight=False
    )
    return result


def _draw(record: Mapping[str, Any], folder: str) -> Path:
    saved = f"the adapter and {RUN_NAME} are saved in {folder}"
    return _written(Path(folder) / PLOT_NAME, saved, lambda path: plot_run(record, path))


def _written(path: Path, saved: str, draw: Callable[[Path], None]) -> Path:
    try:
        draw(path)
    except OSError as error:
        raise SaveError(f"{path}: cannot be written ({error.strerror or error}); {saved}") from None
    return path
