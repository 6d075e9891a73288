"""What to try next: first what is known to do well, then what Optuna proposes from what was measured.

A proposal follows from the space, the seed and the trials so far alone, so a search that was killed goes on as if it
had not been. Optuna's journal in the folder of the search is for its dashboard; nothing here reads it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.lora.atomic import write_files
from loraloom.lora.initialize import seed_of
from loraloom.tune.options import TuneOptions
from loraloom.tune.score import goodness
from loraloom.tune.trial import Trial

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

JOURNAL_NAME = "study.log"
#: Proposals that repeat a configuration are asked again so many times; then the first that is left is taken.
_ASK_AGAIN = 50


def propose(options: TuneOptions, trials: Sequence[Trial], sampler: BaseSampler | None = None) -> dict[str, Any] | None:
    """The values of the next trial; None when the space has no other. ``sampler`` is the user's own."""
    tried = [trial.values for trial in trials if trial.repeats is None]
    number = len(tried)
    if options.sampler == "grid" and sampler is None:
        grid = options.space.grid()
        points = (dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values()))
        return next(itertools.islice(points, number, None), None)
    known = (options.trials + 1) // 2 if options.sampler == "tpe" and sampler is None else 0
    for values in options.space.prior(known):
        if values not in tried:
            return values
    for attempt in range(_ASK_AGAIN):
        values = _ask(options, trials, sampler, seed_of("proposal", options.train.seed, number, attempt) % 2**32)
        if values not in tried:
            return values
    if options.space.size is None:
        return None
    corners = itertools.product(*options.space.grid().values())
    rest = (dict(zip(options.space.knobs, corner, strict=True)) for corner in corners)
    return next((values for values in rest if values not in tried), None)


def _ask(options: TuneOptions, trials: Sequence[Trial], sampler: BaseSampler | None, seed: int) -> dict[str, Any]:
    import optuna

    if sampler is None and options.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=max(4, options.trials // 4)
        )
    with _quiet():
        study = optuna.create_study(direction="maximize", sampler=sampler or optuna.samplers.RandomSampler(seed=seed))
        for trial in trials:
            if trial.repeats is None:
                study.add_trial(frozen(options, trial))
        return options.space.suggest(study.ask())


def frozen(options: TuneOptions, trial: Trial) -> FrozenTrial:
    """A trial as Optuna knows it; its values are how good they are, greater being better."""
    import optuna

    measured = {
        int(e["step"]): goodness(options.metric, e[options.metric])
        for e in trial.curve.evaluations
        if e.get(options.metric) is not None
    }
    states = optuna.trial.TrialState
    state = {"running": states.RUNNING, "finished": states.COMPLETE, "failed": states.FAIL}.get(
        trial.state, states.PRUNED
    )
    if trial.state == "waiting" and not measured:  # held where nobody was compared yet: nothing is known of it
        state = states.RUNNING
    if state is states.COMPLETE and not measured:
        state = states.FAIL
    return optuna.trial.create_trial(
        state=state,
        value=list(measured.values())[-1] if state is states.COMPLETE else None,
        params=dict(trial.values),
        distributions=options.space.distributions(),
        intermediate_values=measured,
        user_attrs={"trial": trial.number, "parameters": trial.parameters, "reason": trial.reason},
    )


def keep(options: TuneOptions, trials: Sequence[Trial], folder: Path) -> None:
    """Add the trials that ended to Optuna's journal in ``folder``, those that are not in it yet.

    Its file is replaced as a whole: Optuna's own way of writing leaves a lock and half a line where it is killed.

    Raises:
        SaveError: the folder cannot be written.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend

    class Lines(BaseJournalBackend):
        def __init__(self, logs: list[dict[str, Any]]) -> None:
            self.logs = logs

        def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
            return self.logs[log_number_from:]

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            self.logs += json.loads(json.dumps(logs))

    path = folder / JOURNAL_NAME
    ended = [t for t in trials if t.repeats is None and t.state in ("finished", "stopped", "failed")]
    with _quiet():
        try:
            logs = [json.loads(line) for line in path.read_text().splitlines()]
        except (OSError, ValueError):  # there is none, or not a whole one: it is written for others, and can be again
            logs = []
        lines = Lines(logs)
        study = optuna.create_study(
            study_name="loraloom", storage=JournalStorage(lines), direction="maximize", load_if_exists=True
        )
        if study.metric_names is None:  # what the dashboard writes beside the values
            study.set_metric_names([f"minus {options.metric}" if goodness(options.metric, 1.0) < 0 else options.metric])
        there: set[Any] = {trial.user_attrs.get("trial") for trial in study.get_trials(deepcopy=False)}
        missing = [trial for trial in ended if trial.number not in there]
        for trial in missing:
            study.add_trial(frozen(options, trial))
    if missing:
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines.logs)
        write_files(folder, {JOURNAL_NAME: text.encode()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of every study on stderr, and warns of what is experimental in it."""
    import warnings

    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            optuna.logging.set_verbosity(before)
