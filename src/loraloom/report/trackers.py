"""Figures and options of a run for TensorBoard, W&B, MLflow and the like, through accelerate. Opt-in."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.errors import ConfigError, brief, nearest
from loraloom.files.atomic import replace_links
from loraloom.files.log import Log, info
from loraloom.files.quiet import quiet

if TYPE_CHECKING:
    from loraloom.engine.loop import OnStep, StepEvent

#: The packages of those whose package has another name.
_PACKAGES = {"comet_ml": "comet-ml", "tensorboard": "tensorboardX"}
#: The argument of a tracker that names the run. Others name it themselves.
_NAMED = {"wandb": "name", "trackio": "name", "mlflow": "run_name"}
#: What is missing most often.
_HINTS = {
    "wandb": "log in with wandb login, or set WANDB_MODE=offline",
    "mlflow": "look at MLFLOW_TRACKING_URI",
}
_TENSORBOARD = "tensorboard"
PROJECT = "loraloom"
#: The folder of TensorBoard's files, in that of the run.
FOLDER = "tensorboard"


def check(names: Sequence[str]) -> None:
    """That every tracker is known and there.

    Raises:
        ConfigError: begins with ``report_to``.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            hint = nearest(name, LOGGER_TYPE_TO_CLASS) or f"; there are {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            raise ConfigError(f"report_to: no tracker is called {name!r}{hint}")
        if name not in [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]:
            raise ConfigError(
                f"report_to: {name} is not installed; pip install {_PACKAGES.get(name, name)}, or leave it out"
            )


@contextlib.contextmanager
def tracking(
    names: Sequence[str], folder: str | Path, options: Mapping[str, Any] | None = None, log: Log = info
) -> Iterator[OnStep]:
    """The callback ``on_step`` of trackers ``names``, by accelerate's names, which end with the context.

    TensorBoard starts with the first step, because it has to know after which step a run resumes.

    Args:
        folder: the run's; TensorBoard's files lie in it, and the run is named after it.
        options: stored with the run.
        log: called when a tracker fails.

    Raises:
        ConfigError: one does not start. Begins with ``report_to``.
    """
    with running(names, folder, options, log) as trackers:

        def on_step(event: StepEvent) -> None:
            trackers.start_waiting(event.step - 1)
            values = {"train/loss": event.loss, "train/learning_rate": event.learning_rate}
            values["train/tokens_per_second"] = event.tokens / max(event.seconds, 1e-9)
            trackers.write(
                values | {f"eval/{key}": value for key, value in (event.evaluation or {}).items()}, event.step
            )

        yield on_step


@contextlib.contextmanager
def running(
    names: Sequence[str], folder: str | Path, options: Mapping[str, Any] | None = None, log: Log = info
) -> Iterator[Trackers]:
    """Trackers, which end with the context. Arguments and errors as of ``tracking``."""
    check(names)
    trackers = Trackers(Path(folder), log, _TENSORBOARD in names)
    failed = True
    try:
        for name in names:
            if name != _TENSORBOARD:
                trackers.there.append(_started(name, trackers.folder))
        for tracker in trackers.there:
            with trackers.guarded(tracker, "did not take the options"):
                tracker.store_init_configuration(_flat(options or {}))
        yield trackers
        failed = False
    finally:
        for tracker in trackers.there:
            with trackers.guarded(tracker, "did not end well"):
                _finish(tracker, failed)


@dataclass
class Trackers:
    """Those that started. One that fails later is logged, and training continues without it."""

    folder: Path
    log: Log
    #: TensorBoard is wanted and has not started
    waiting: bool = False
    there: list[Any] = field(default_factory=list)

    def start_waiting(self, step: int = 0) -> None:
        """Start TensorBoard, which drops what a killed run logged after ``step``."""
        if self.waiting:
            self.waiting = False
            try:
                self.there.append(_start(_TENSORBOARD, self.folder, step))
            except Exception as error:
                self.log(f"report_to: {_TENSORBOARD} does not start ({brief(error)}); training continues without it")

    def write(self, values: Mapping[str, float], step: int) -> None:
        for tracker in list(self.there):
            with self.guarded(tracker, f"failed at step {step}", drop=True):
                tracker.log(named_for(tracker.name, values), step=step)

    @contextlib.contextmanager
    def guarded(self, tracker: Any, what: str, *, drop: bool = False) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: trackers raise their own
            if drop:
                self.there.remove(tracker)
            self.log(f"report_to: {tracker.name} {what} ({brief(error)}){'; training continues without it' * drop}")


def _started(name: str, folder: Path) -> Any:
    try:
        return _start(name, folder)
    except Exception as error:  # of any kind: trackers raise their own
        hint = _HINTS.get(name, "set it up")
        raise ConfigError(f"report_to: {name} does not start ({brief(error)}); {hint}, or leave it out") from None


def _start(name: str, folder: Path, step: int = 0) -> Any:
    """``step``: after which the run starts; TensorBoard drops what a killed run logged of later steps."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # which process this is: the first alone talks
    kind = LOGGER_TYPE_TO_CLASS[name]
    with quiet():
        if name == _TENSORBOARD:
            replace_links(folder / FOLDER)
            tracker = kind(FOLDER, folder, **({"purge_step": step + 1} if step else {}))
        elif getattr(kind, "requires_logging_directory", False):
            tracker = kind(folder.name, folder)
        else:
            tracker = kind(PROJECT, **({_NAMED[name]: folder.name} if name in _NAMED else {}))
        if hasattr(tracker, "start"):
            tracker.start()
    return tracker


def _finish(tracker: Any, failed: bool) -> None:
    """accelerate reports every run as a success; these two trackers can report a failure."""
    if failed and tracker.name == "wandb":
        tracker.tracker.finish(exit_code=1)
    elif failed and tracker.name == "mlflow":
        importlib.import_module("mlflow").end_run("FAILED")
    else:
        tracker.finish()


def named_for(tracker: str, values: Mapping[str, float]) -> dict[str, float]:
    """MLflow refuses other characters in names, and a user's metric may be called anything."""
    return {re.sub(r"[^\w./: -]", "_", key) if tracker == "mlflow" else key: value for key, value in values.items()}


def _flat(options: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Options as trackers take them: dotted names; text, numbers, truth values and None.

    Lists, and what stands below a section and has keys of the user's own (patterns of modules), are JSON.
    """
    out: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping) and not above:
            out |= _flat(value, f"{key}.")
        elif value is None or isinstance(value, int | float | str | bool):
            out[above + key] = value
        else:
            out[above + key] = json.dumps(value, default=str)
    return out
