"""Figures and options of a run for TensorBoard, W&B, MLflow and the like, through accelerate. Opt-in."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loraloom.errors import ConfigError, brief, nearest
from loraloom.files.atomic import replace_links
from loraloom.files.log import Log, info
from loraloom.files.quiet import quiet

if TYPE_CHECKING:
    from loraloom.engine.loop import StepEvent

#: The packages of those whose package has another name.
_PACKAGES = {"comet_ml": "comet-ml", "tensorboard": "tensorboardX"}
#: What an argument of a tracker is called that names the run. Others name it themselves.
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


class Trackers:
    """The callback ``on_step`` of trackers ``names``, by accelerate's names.

    Entered before the first step: a tracker that does not start is an error then. One that fails later is logged, and
    training continues without it.

    Args:
        folder: the run's; TensorBoard's files lie in it, and the run is named after it.
        options: stored with the run.
        log: called when a tracker fails.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: str | Path,
        options: Mapping[str, Any] | None = None,
        log: Log = info,
    ) -> None:
        self._names, self._folder, self._options, self._log = list(names), Path(folder), _flat(options or {}), log
        self._trackers: list[Any] = []
        self._began = False
        check(names)

    def __enter__(self) -> Trackers:
        """Start all but TensorBoard, which waits for the first step.

        Raises:
            ConfigError: one does not start. Begins with ``report_to``.
        """
        for name in self._names:
            if name == _TENSORBOARD:
                continue
            try:
                self._trackers.append(_start(name, self._folder))
            except Exception as error:  # a tracker's own, of whatever kind
                self._end(failed=True)
                hint = _HINTS.get(name, "set it up")
                raise ConfigError(
                    f"report_to: {name} does not start ({brief(error)}); {hint}, or leave it out"
                ) from None
        for tracker in list(self._trackers):
            with self._guarded(tracker, "did not take the options", drop=False):
                tracker.store_init_configuration(self._options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(failed=kind is not None)

    def __call__(self, event: StepEvent) -> None:
        if not self._began:
            self._began = True
            self._start_tensorboard(event.step - 1)
        values = {"train/loss": event.loss, "train/learning_rate": event.learning_rate}
        values["train/tokens_per_second"] = event.tokens / max(event.seconds, 1e-9)
        values |= {f"eval/{key}": value for key, value in (event.evaluation or {}).items()}
        for tracker in list(self._trackers):
            with self._guarded(tracker, f"failed at step {event.step}"):
                tracker.log(_named_for(tracker.name, values), step=event.step)

    def _start_tensorboard(self, step: int) -> None:
        """TensorBoard has to know after which step a run starts."""
        if _TENSORBOARD in self._names:
            try:
                self._trackers.append(_start(_TENSORBOARD, self._folder, step))
            except Exception as error:
                self._log(f"report_to: {_TENSORBOARD} does not start ({brief(error)}); training continues without it")

    def _end(self, failed: bool) -> None:
        for tracker in list(self._trackers):
            with self._guarded(tracker, "did not end well", drop=False):
                _finish(tracker, failed)
        self._trackers.clear()

    @contextlib.contextmanager
    def _guarded(self, tracker: Any, what: str, *, drop: bool = True) -> Iterator[None]:
        """Log what a tracker raises and drop it: training goes before tracking."""
        try:
            yield
        except Exception as error:
            without = ""
            if drop:
                self._trackers.remove(tracker)
                without = "; training continues without it"
            self._log(f"report_to: {tracker.name} {what} ({brief(error)}){without}")


def _start(name: str, folder: Path, step: int = 0) -> Any:
    """``step``: after which the run starts; TensorBoard drops what a killed run noted of later steps."""
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
    """accelerate calls every run a success; these two can be told otherwise."""
    if failed and tracker.name == "wandb":
        tracker.tracker.finish(exit_code=1)
    elif failed and tracker.name == "mlflow":
        importlib.import_module("mlflow").end_run("FAILED")
    else:
        tracker.finish()


def _named_for(tracker: str, values: Mapping[str, float]) -> dict[str, float]:
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
