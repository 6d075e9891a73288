"""Figures of a run for TensorBoard, W&B, MLflow and the like, through accelerate. Nothing is sent unasked.

A tracker watches the loop as the terminal does; what it is told are figures and the run's options.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from loraloom.errors import ConfigError, nearest

if TYPE_CHECKING:
    from loraloom.train.loop import Progress

#: The packages of those whose package has another name.
_PACKAGES = {"comet_ml": "comet-ml", "tensorboard": "tensorboardX"}
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
    """A watcher of the loop that tells ``names`` of it, by accelerate's names.

    Args:
        folder: the run's, in which TensorBoard's files lie and after which the run is named.
        options: what is noted of the run at its beginning.
        step: where the run goes on; what was noted of later steps before it was killed is dropped (TensorBoard).
    """

    def __init__(
        self, names: Sequence[str], folder: str | Path, options: Mapping[str, Any] | None = None, step: int = 0
    ) -> None:
        self._trackers: list[Any] = []
        self._evaluations = 0
        self._options = _flat(options or {})
        check(names)
        for name in names:
            self._trackers.append(_start(name, Path(folder), step))

    def __enter__(self) -> Trackers:
        # TensorBoard would make a run of its own of the options; run.json has them.
        for tracker in self._trackers:
            if tracker.name != "tensorboard":
                tracker.store_init_configuration(self._options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def __call__(self, progress: Progress) -> None:
        if not self._trackers:
            return
        curve = progress.slot.curve
        values = {"train/loss": curve.loss[-1], "train/learning_rate": curve.learning_rate[-1]}
        values["train/tokens_per_second"] = progress.tokens / max(progress.seconds, 1e-9)
        if len(curve.evaluations) > self._evaluations:
            self._evaluations = len(curve.evaluations)
            found = curve.evaluations[-1]
            values |= {f"eval/{key}": value for key, value in found.items() if key != "step"}
        for tracker in self._trackers:
            tracker.log(values, step=progress.slot.step)


def _start(name: str, folder: Path, step: int) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # which process this is: the first alone talks
    kind = LOGGER_TYPE_TO_CLASS[name]
    with _quiet():
        if name == "tensorboard":
            tracker = kind(FOLDER, folder, **({"purge_step": step + 1} if step else {}))
        elif getattr(kind, "requires_logging_directory", False):
            tracker = kind(folder.name, folder)
        else:
            tracker = kind(PROJECT, **({"name": folder.name} if name == "wandb" else {}))
        if hasattr(tracker, "start"):
            tracker.start()
    return tracker


def _flat(options: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Options as trackers take them: dotted names; text, numbers and truth values."""
    out: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{above}{key}.")
        else:
            out[above + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return out


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
