"""``loraloom train`` and ``loraloom tune`` as functions: prepare, train with progress, draw, and print the outcome."""

from __future__ import annotations

import contextlib
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from loraloom.config.train import TrainConfig
from loraloom.data.dataset import BAD_ROWS
from loraloom.distributed.launch import rank
from loraloom.engine.loop import OnStep, StepEvent
from loraloom.errors import ConfigError, SaveError
from loraloom.files import lock
from loraloom.files.log import Log
from loraloom.messages import Message, ignore
from loraloom.report import trackers
from loraloom.report.data import picture
from loraloom.report.importance_plot import IMPORTANCE_NAME, plot_importance
from loraloom.report.plot import PLOT_NAME, plot_run
from loraloom.report.screen import Text
from loraloom.report.search_trackers import SearchTracks, tracking
from loraloom.report.sentences import line, sentence
from loraloom.report.terminal import Meter, expectations, outcome, overview, reading
from loraloom.report.tradeoff_plot import TRADEOFF_NAME, plot_tradeoff
from loraloom.report.tune import TuneMeter, conclusion, leaderboard
from loraloom.report.tune_plot import SEARCH_NAME, plot_search
from loraloom.training.checkpointing.resume import Resume, find
from loraloom.training.failures import Interrupted
from loraloom.training.preflight.estimate import outlook
from loraloom.training.run import examine, prepare
from loraloom.training.run_record import RUN_NAME
from loraloom.training.setup import TrainJob
from loraloom.training.trainer import RunResult, Trainer
from loraloom.tuning.conclusion import BEST_FILE, BEST_NAME, RESULT_NAME, SearchResult
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.executor import SearchStatus
from loraloom.tuning.search import search
from loraloom.tuning.steering import ask
from loraloom.tuning.verdict import Verdict

#: What tradeoff.png was called up to 0.2.
PICTURE_OF_0_2 = "pareto.png"


def train_run(
    options: TrainConfig,
    console: Console | None = None,
    *,
    resume: Resume = None,
    dry_run: bool = False,
    on_step: OnStep | None = None,
    notes: Sequence[str] = (),
) -> RunResult | None:
    """Train by ``options``, with progress on ``console`` (by default the terminal).

    The output folder gets the adapter, ``run.yaml``, ``run.json`` and ``curves.png``, and checkpoints.
    Of several processes, rank 0 prints.

    Args:
        resume: True for the newest checkpoint, or the path of one: see ``Trainer.fit``.
        dry_run: do everything but train, and return None. Nothing is written but the file of skipped bad rows.
        on_step: called after each step.
        notes: lines about the options, which are printed first.

    Raises:
        LoraloomError: as ``prepare`` and ``run``. What training reached is saved whenever it took a step.
    """
    trackers.check(options.report_to)
    console = console or Console(quiet=rank() > 0)
    _print(notes, console)
    with reading(console) as progress:
        job = prepare(options, resume, progress)
    first = job.world.is_main_process
    console.print(overview(job), soft_wrap=True)
    console.print(expectations(examine(job), outlook(job)), soft_wrap=True)
    if dry_run:
        console.print("nothing was trained (--dry-run)", highlight=False)
        return None

    def log(text: str) -> None:
        _print([text], console)

    def show(message: Message) -> None:
        console.print(line(message), soft_wrap=True)

    try:
        with _tracked(job, resume, log) as track, Meter(console, job.steps) as meter:

            def step(event: StepEvent) -> None:
                for callback in (meter, track, on_step):
                    if callback is not None:
                        callback(event)

            result = Trainer(job, step, show).fit(resume)
    except Interrupted as error:
        if error.record and first:
            _draw(error.record, options.output)
        raise
    if first:
        plot = _draw(result.record, options.output)
        console.print(outcome(result, options.output, plot, Path(options.output) / RUN_NAME), soft_wrap=True)
    return result


@contextlib.contextmanager
def _tracked(job: TrainJob, resume: Resume, log: Log) -> Iterator[OnStep]:
    """Trackers, of which the first process has the figures of each step; a run that has ended needs none."""
    options, world = job.options, job.world
    names = [] if find(options, resume).finished else options.report_to
    found = trackers.tracking(names, options.output, options.to_dict(), log)
    with contextlib.ExitStack() as stack:
        tracks: list[OnStep] = []
        world.main_process_first(lambda: tracks.append(stack.enter_context(found)))
        yield tracks[0] if tracks else ignore


def data_run(options: TrainConfig, console: Console | None = None, *, rows: int = 3) -> None:
    """Show ``console`` what the model of ``options`` will see of the data, and what training on it will take.

    Raises:
        InputError: as ``prepare``. Nothing is written, the output of ``options`` is not used.
    """
    if rows < 0:
        raise ConfigError(f"rows: must be a whole number of at least 0, found {rows}")
    console = console or Console()
    with tempfile.TemporaryDirectory() as folder:
        nowhere = replace(options, output=str(Path(folder) / "nothing"), overwrite=True)
        with reading(console) as progress:
            job = prepare(nowhere, reading=progress)
        bad = Path(nowhere.output) / BAD_ROWS
        job.data.warnings = [text.replace(str(bad), "below") for text in job.data.warnings]
        length, marks = job.options.max_length, console.color_system is None
        console.print(picture(job.data, job.tokenizer, job.task, rows, length, marks))
        if bad.exists():
            console.print(Text(f"\nbad rows:\n{bad.read_text()[:4000].rstrip()}"), soft_wrap=True)
        console.print()
        console.print(expectations([], outlook(job)), soft_wrap=True)


def tune_run(options: TuneConfig, console: Console | None = None, *, add_trials: int | None = None) -> SearchResult:
    """Search by ``options``, or resume the search in their folder, with progress on ``console``.

    The output folder gets the best adapter, ``best.yaml``, ``result.json`` and the pictures.

    Args:
        add_trials: extend the search in the folder by that many trials.

    Raises:
        LoraloomError: as ``search``.
    """
    console = console or Console()
    _print(options.notes, console)
    trackers.check(options.train.report_to)
    tracks: list[SearchTracks] = []
    with contextlib.ExitStack() as stack, TuneMeter(console) as meter:

        def event(message: Message) -> None:
            if message.kind == "to_beat":  # all is checked, and training begins
                tracks.append(stack.enter_context(tracking(options, lambda text: _print([text], console))))
            meter.event(message)

        def update(status: SearchStatus) -> None:
            meter.update(status)
            for one in tracks:
                one.update(status)

        result = search(options, event, update, describe=sentence, add_trials=add_trials)
        for one in tracks:
            one.end(result.verdict)
    found, folder, metric = result.verdict, result.folder, result.verdict.metric
    console.print(leaderboard(found, metric, width=console.width))
    console.print(conclusion(found))
    saved = f"{f'the best adapter and {RESULT_NAME} are' if found.learned else f'{RESULT_NAME} is'} saved in {folder}"
    lines: dict[str, Any] = {}
    if found.learned:
        lines = {"adapter": folder / BEST_NAME, "in full": f"loraloom train {shlex.quote(str(folder / BEST_FILE))}"}
    lines |= {"record": folder / RESULT_NAME, "pictures": ", ".join(map(str, pictures(found, folder, saved)))}
    if (padding := result.record["machine"].get("padding")) is not None:
        lines["padding"] = f"{padding:.0%} of the positions that the model computed in training"
    console.print(Text("\n" + "\n".join(f"{what:9}{where}" for what, where in lines.items())), soft_wrap=True)
    return result


def steer_run(folder: str | Path, stop: Sequence[int], keep: Sequence[int], console: Console | None = None) -> None:
    """Ask the search in ``folder``, which another process runs or will resume, to stop trials or to keep them.

    Raises:
        InputError: there is no search there, it has ended, or a trial does not train.
    """
    wishes = [*(("stop", number) for number in stop), *(("keep", number) for number in keep)]
    ask(Path(folder), wishes)
    running = lock.is_held(folder)
    (console or Console()).print(line(Message("request_left", requests=wishes, running=running)), soft_wrap=True)


def pictures(found: Verdict, folder: Path, saved: str) -> list[Path]:
    """Draw the pictures of a search, and remove those of before that this one does not have. Returns their paths."""
    drawn = {SEARCH_NAME: plot_search, TRADEOFF_NAME: plot_tradeoff}
    if found.mattered:
        drawn[IMPORTANCE_NAME] = plot_importance
    for old in {IMPORTANCE_NAME, PICTURE_OF_0_2} - drawn.keys():
        with contextlib.suppress(OSError):
            (folder / old).unlink()
    return [_written(folder / name, saved, partial(plot, found)) for name, plot in drawn.items()]


def _print(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        console.print(Text(note), soft_wrap=True)


def _draw(record: Mapping[str, Any], folder: str) -> Path:
    saved = f"the adapter and {RUN_NAME} are saved in {folder}"
    return _written(Path(folder) / PLOT_NAME, saved, lambda path: plot_run(record, path))


def _written(path: Path, saved: str, draw: Callable[[Path], None]) -> Path:
    try:
        draw(path)
    except SaveError as error:
        raise SaveError(f"{error}; {saved}") from None
    return path
