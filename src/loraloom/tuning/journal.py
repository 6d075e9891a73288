"""Optuna's journal in the folder of a search: the trials that ended, for its dashboard. Nothing of the search reads it.

The file follows from the trials and is replaced as a whole: Optuna's own way of writing leaves a lock and half a line
where it is killed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.files.atomic import write_files
from loraloom.files.quiet import quiet
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.ranking import goodness
from loraloom.tuning.sampler import JOURNAL_NAME, frozen
from loraloom.tuning.trial import Trial

if TYPE_CHECKING:
    from optuna.study import Study


class Journal:
    """The journal in ``folder``."""

    def __init__(self, options: TuneConfig, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._logs: list[dict[str, Any]] = []
        self._kept: set[int] = set()

    def keep(self, trials: Sequence[Trial]) -> None:
        """Write the journal if trials ended that are not in it yet.

        Raises:
            SaveError: the folder cannot be written.
        """
        ended = [t for t in trials if t.repeats is None and t.state in ("finished", "stopped", "failed")]
        missing = [trial for trial in ended if trial.number not in self._kept]
        if not missing:
            return
        study = self._study  # whose import of optuna sets what it logs
        with quiet("optuna"):
            for trial in missing:
                study.add_trial(frozen(self._options, trial))
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in self._logs)
        write_files(self._folder, {JOURNAL_NAME: text.encode()})
        self._kept |= {trial.number for trial in missing}

    @cached_property
    def _study(self) -> Study:
        """A study whose storage writes to ``_logs``."""
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import BaseJournalBackend

        logs = self._logs

        class Lines(BaseJournalBackend):
            def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
                return logs[log_number_from:]

            def append_logs(self, new: list[dict[str, Any]]) -> None:
                logs.extend(json.loads(json.dumps(new)))

        metric = self._options.metric
        with quiet("optuna"):
            storage = JournalStorage(Lines())
            study = optuna.create_study(study_name="loraloom", storage=storage, direction="maximize")
            # What the dashboard writes beside the values, of which more is better.
            study.set_metric_names([f"minus {metric}" if goodness(metric, 1.0) < 0 else metric])
        return study
