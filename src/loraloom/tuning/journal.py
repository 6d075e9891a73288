"""Optuna's journal in the folder of a search: the trials that ended, for its dashboard. Nothing of the search reads it.

Its file is replaced as a whole: Optuna's own way of writing leaves a lock and half a line where it is killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.errors import SaveError
from loraloom.files.atomic import write_files
from loraloom.files.quiet import quiet
from loraloom.messages import Message, OnEvent, ignore
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.ranking import goodness
from loraloom.tuning.sampler import JOURNAL_NAME, frozen
from loraloom.tuning.trial import Trial

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

#: A journal that is damaged is set aside under this name.
ASIDE = f"{JOURNAL_NAME}.damaged"


class Journal:
    """The journal in ``folder``."""

    def __init__(self, options: TuneConfig, folder: Path, on_event: OnEvent = ignore) -> None:
        self._options, self._path, self._on_event = options, folder / JOURNAL_NAME, on_event
        self._logs: list[dict[str, Any]] = []
        self._study: Study | None = None
        self._there: set[int] = set()

    def keep(self, trials: Sequence[Trial]) -> None:
        """Add the trials that ended, those that are not in it yet.

        Raises:
            SaveError: the folder cannot be written.
        """
        ended = [t for t in trials if t.repeats is None and t.state in ("finished", "stopped", "failed")]
        with quiet("optuna"):
            study = self._study or self._open(ended)
            missing = [trial for trial in ended if trial.number not in self._there]
            for trial in missing:
                study.add_trial(frozen(self._options, trial))
        if missing:
            text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in self._logs)
            write_files(self._path.parent, {JOURNAL_NAME: text.encode()})
            self._there |= {trial.number for trial in missing}

    def _open(self, ended: Sequence[Trial]) -> Study:
        """The study in the file, as far as it holds just what these trials are; else a new one."""
        wanted = {trial.number: trial for trial in ended}
        try:
            logs = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
            study = self._built(logs)
            for found in study.get_trials(deepcopy=False):
                number = found.user_attrs["trial"]
                if number in self._there or not _same(found, frozen(self._options, wanted[number])):
                    raise ValueError(f"trial {number} is another one")
                self._there.add(number)
        except FileNotFoundError:
            study = self._built([])
        except Exception as error:  # Optuna has many for a line that it did not write
            self._set_aside(error)
            study = self._built([])
        return study

    def _built(self, logs: list[dict[str, Any]]) -> Study:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import BaseJournalBackend

        class Lines(BaseJournalBackend):
            def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
                return logs[log_number_from:]

            def append_logs(self, new: list[dict[str, Any]]) -> None:
                logs.extend(json.loads(json.dumps(new)))

        self._logs, self._there = logs, set()
        self._study = study = optuna.create_study(
            study_name="loraloom", storage=JournalStorage(Lines()), direction="maximize", load_if_exists=True
        )
        if study.metric_names is None:  # what the dashboard writes beside the values
            metric = self._options.metric
            study.set_metric_names([f"minus {metric}" if goodness(metric, 1.0) < 0 else metric])
        return study

    def _set_aside(self, error: Exception) -> None:
        aside = self._path.with_name(ASIDE)
        try:
            os.replace(self._path, aside)
        except OSError as failed:
            raise SaveError(f"{self._path}: is damaged, and cannot be set aside ({failed.strerror})") from None
        why = f"{type(error).__name__}: {error}"
        self._on_event(Message("journal_damaged", path=str(self._path), error=why, kept_as=aside.name))


def _same(one: FrozenTrial, other: FrozenTrial) -> bool:
    """The same trial: what a journal does not keep as it was, such as times, has no part in it."""

    def what(trial: FrozenTrial) -> str:
        attributes = dict(sorted(trial.user_attrs.items()))
        return repr((trial.state, trial.values, trial.params, sorted(trial.intermediate_values.items()), attributes))

    return what(one) == what(other)
