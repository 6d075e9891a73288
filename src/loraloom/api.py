"""``loraloom.train`` and ``loraloom.tune``: the commands as Python functions.

Keywords are the commands' options, which are the last parts of a run file's keys. The model, rows and functions may be
given as objects. Progress is shown in a terminal or a notebook; ``quiet=True`` shows nothing.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraloom import tasks
from loraloom.config import keys, objects, runfile
from loraloom.data.example import Settings
from loraloom.data.read.given import is_rows, write_rows
from loraloom.engine.loop import OnStep
from loraloom.errors import ConfigError, InputError, nearest
from loraloom.inference.answers import answers
from loraloom.lora.model import PeftModel
from loraloom.models.given import hold_model
from loraloom.training.setup import ADAPTER, TrainJob
from loraloom.tuning import extension
from loraloom.tuning.conclusion import BEST_NAME, SearchResult

#: The folder below the output for rows that were given as objects.
ROWS = "rows"


@dataclass(frozen=True)
class Run:
    """A finished run."""

    #: the adapter's folder: PEFT's format, ``run.json``, ``run.yaml``
    adapter: Path
    #: the model with the adapter, as it was trained, its tokenizer, task and classes
    job: TrainJob = field(repr=False)
    #: what ``run.json`` holds
    record: dict[str, Any] = field(repr=False)

    @property
    def model(self) -> PeftModel:
        return self.job.model

    def predict(
        self, rows: Sequence[str | Mapping[str, Any]], *, batch_size: int = 64, max_new_tokens: int | None = None
    ) -> list[Any]:
        """The adapter's answers: a class, a number, tags, an answer, a text or an embedding for each row, in order.

        Args:
            rows: texts, or dicts with the columns of the training rows without the answer.
            max_new_tokens: of generated texts; by default as in training.

        Raises:
            DataError: a row lacks a column, or holds something else.
        """
        options, data = self.job.options, self.job.data
        settings = Settings(
            options.max_length or 0,
            labels=tuple(data.names),
            problem_type=data.problem,
            chat_template=options.chat_template,
            stride=options.stride,
            date=options.date,
        )
        limit = options.max_new_tokens if max_new_tokens is None else max_new_tokens
        more: dict[str, Any] = {"columns": options.columns, "batch_size": batch_size, "max_new_tokens": limit}
        return answers(self.job, ADAPTER, rows, settings, **more)

    @property
    def metrics(self) -> dict[str, float]:
        """The adapter's metrics on the held-out rows, with the loss."""
        found: dict[str, float] = self.record["result"]
        return found

    @property
    def curve(self) -> dict[str, list[Any]]:
        """``loss`` and ``learning_rate`` of each step, and ``evaluations``, each with its ``step``."""
        found: dict[str, list[Any]] = self.record["curve"]
        return found


@dataclass(frozen=True)
class Search:
    """A finished search."""

    #: its folder: ``best/``, ``best.yaml``, ``result.json``, two pictures
    folder: Path
    #: what ``result.json`` holds
    record: dict[str, Any] = field(repr=False)
    #: what to use and why, and what to try next, in words
    recommendation: str = field(repr=False)
    #: one entry for each configuration, best first: its values by the keys of a run file, the ``metric`` (a mean over
    #: seeds) with its ``noise``, ``steps``, ``parameters``, ``seconds``, ``state`` and the trial's ``number``
    table: list[dict[str, Any]] = field(repr=False)

    @property
    def best(self) -> dict[str, Any] | None:
        """The best configuration by the keys of a run file; None where nothing was learned."""
        return None if self.record["best"] is None else dict(self.record["best"]["config"])

    @property
    def recommended(self) -> bool:
        """False if nothing was learned, or no more than a new head on the frozen model learns."""
        return bool(self.record["recommended"])

    @property
    def adapter(self) -> Path | None:
        """The best configuration's adapter; None where nothing was learned."""
        return None if self.record["best"] is None else self.folder / BEST_NAME


def train(
    model: Any = None,
    data: Any = None,
    *,
    config: str | Path | None = None,
    tokenizer: Any = None,
    resume: bool | str | Path | None = None,
    quiet: bool = False,
    on_step: OnStep | None = None,
    **options: Any,
) -> Run:
    """Train one adapter, as ``loraloom train`` does.

    Args:
        model: a folder, a hub name, or a loaded model. A loaded one keeps its dtype, and gets the adapter.
        data: a file, a folder, a hub name, a list of these; or rows: a list of dicts, a pandas ``DataFrame``, a
            ``datasets.Dataset``. Rows are kept below the output folder, so that ``run.yaml`` gives the same run again.
        config: a run file, over which the other arguments win.
        tokenizer: of a loaded ``model``.
        resume: True for the newest checkpoint of the output folder, or the path of one. Options that are not given are
            then those of the resumed run.
        on_step: called with a ``StepEvent`` after each step.
        options: any option of ``loraloom train``: ``task``, ``output``, ``r``, ``epochs``, ``learning_rate`` ... The
            held-out rows (``eval_split``, or ``validation``) may be rows too, and ``metrics`` may hold functions.

    Raises:
        InputError: an argument is wrong; nothing was trained.
        TrainingError: the training failed; what it reached is saved.
    """
    from loraloom.report.session import train_run

    with _given(config, model, data, tokenizer, options) as given:
        found = runfile.read(config, (), given, tasks.check, resume=resume)
        result = train_run(found.options, _console(quiet), resume=found.resume, on_step=on_step, notes=found.notes)
    assert result is not None  # only a dry run has none
    return Run(Path(found.options.output), result.job, result.record)


def tune(
    model: Any = None,
    data: Any = None,
    *,
    config: str | Path | None = None,
    tokenizer: Any = None,
    quiet: bool = False,
    add_trials: int | None = None,
    **options: Any,
) -> Search:
    """Search for the configuration to use, as ``loraloom tune`` does; the same call resumes a search that was stopped.

    Args:
        model, data, config, tokenizer: as of ``train``. ``config`` may also be the folder of a search.
        add_trials: extend the search in the folder by that many trials.
        options: any option of ``loraloom tune`` or ``loraloom train``: ``task``, ``output``, ``trials``, ``preset``,
            ``space`` (keys of a run file and what they may be) ...

    Raises:
        InputError: an argument is wrong; nothing was trained.
        TrainingError: no trial could be measured.
    """
    from loraloom.report.session import tune_run

    with _given(config, model, data, tokenizer, options, searching=True) as given:
        result = tune_run(extension.read(config, (), given), _console(quiet), add_trials=add_trials)
    return Search(result.folder, result.record, _recommendation(result), _table(result))


def _table(result: SearchResult) -> list[dict[str, Any]]:
    found, rows = result.verdict, []
    for number in found.ranking:
        trial, score = found.trial(number), found.scores[number]
        kept: dict[str, Any] = {
            "metric": score.mean,
            "noise": score.noise,
            "steps": trial.step,
            "of_steps": trial.steps,
        }
        kept |= {"parameters": trial.parameters, "seconds": trial.seconds, "state": trial.state, "number": number}
        rows.append({**trial.values, **kept})
    return rows


def _recommendation(result: SearchResult) -> str:
    from rich.console import Console

    from loraloom.report.tune import conclusion

    console = Console(file=io.StringIO(), width=100)
    console.print(conclusion(result.verdict))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip().splitlines())


def _console(quiet: bool) -> Any:
    from rich.console import Console

    return Console(quiet=True) if quiet else None


# -- what was given, by the keys of a run file ------------------------------------------------------------------------


@contextlib.contextmanager
def _given(
    config: str | Path | None,
    model: Any,
    data: Any,
    tokenizer: Any,
    options: Mapping[str, Any],
    *,
    searching: bool = False,
) -> Iterator[dict[str, Any]]:
    """Context with the arguments as keys and values of a run file; objects are registered under names."""
    given = {_key(name, searching): value for name, value in options.items()}
    given |= {key: value for key, value in (("model.name", model), ("data.train", data)) if value is not None}
    with contextlib.ExitStack() as stack:
        _name_model(given, tokenizer, stack)
        _name_functions(given, stack)
        written = _write_rows(given, config)
        try:
            yield given
        except InputError:
            _remove(written)  # no run refers to them
            raise


def _key(name: str, searching: bool) -> str:
    """The key of a run file that a keyword sets.

    Raises:
        ConfigError: there is no such keyword; names the nearest one.
    """
    known = {**keys.FIELD_KEYS, "validation": "data.validation", "test": "data.test"}
    if searching:
        known |= keys.TUNE_KEYS
    if name not in known:
        home = keys.HABITS.get(name, "").rpartition(".")[2]
        close = f"; did you mean {home!r}?" if home else nearest(name, known)
        command = "tune" if searching else "train"
        raise ConfigError(f"{name}: there is no such option{close or f'; see loraloom {command} --help'}")
    return known[name]


def _name_model(given: dict[str, Any], tokenizer: Any, stack: contextlib.ExitStack) -> None:
    model = given.get("model.name")
    if model is None or isinstance(model, str | Path):
        if tokenizer is not None:
            raise ConfigError("tokenizer: belongs to a loaded model; with a model's name its own tokenizer is used")
        return
    given["model.name"] = stack.enter_context(hold_model(model, tokenizer))
    given.setdefault("model.dtype", str(next(model.parameters()).dtype).removeprefix("torch."))


def _name_functions(given: dict[str, Any], stack: contextlib.ExitStack) -> None:
    metrics = given.get("eval.metrics")
    if callable(metrics) or (isinstance(metrics, Sequence) and not isinstance(metrics, str)):
        listed = [metrics] if callable(metrics) else metrics
        names = [objects.name_of(one) if callable(one) else one for one in listed]
        stack.enter_context(objects.held(dict(zip(names, listed, strict=True))))
        given["eval.metrics"] = names
    if callable(loss := given.get("train.loss")):
        given["train.loss"] = objects.name_of(loss)
        stack.enter_context(objects.held({given["train.loss"]: loss}))


def _write_rows(given: dict[str, Any], config: str | Path | None) -> list[Path]:
    """Write rows that were given as objects into files, whose paths the keys then hold. Returns the new files."""
    output = given.get("output")
    written = []
    for key, name in (("data.train", "data"), ("data.validation", "validation"), ("data.test", "test")):
        if not is_rows(given.get(key)):
            continue
        output = output or (runfile.read(config, (), {**given, key: "rows.jsonl"}).options.output if config else None)
        if not isinstance(output, str | Path):
            raise ConfigError(
                f"output: must be a path, found {output!r}; rows that are given as objects are kept there"
            )
        path, new = write_rows(name, given[key], Path(output) / ROWS)
        given[key] = str(path)
        written += [path] if new else []
    return written


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
            path.parent.rmdir()
            path.parent.parent.rmdir()
