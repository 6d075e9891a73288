"""The end of a search: the verdict, the best adapter in its folder, ``result.json``, ``best.yaml``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loraloom.config import runfile
from loraloom.errors import SaveError
from loraloom.files.atomic import write_files
from loraloom.messages import Describe, Message
from loraloom.training.run_record import machine, versions
from loraloom.training.setup import Setup
from loraloom.training.usage import usage
from loraloom.tuning import steering
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.final_test import final_test
from loraloom.tuning.judge import Judge
from loraloom.tuning.measured_once import measured_once
from loraloom.tuning.promotion import overtaken
from loraloom.tuning.race import LookBack, Race
from loraloom.tuning.ranking import originals
from loraloom.tuning.record import record
from loraloom.tuning.selection import Balance
from loraloom.tuning.smaller import cut
from loraloom.tuning.state import TRIALS, State, damaged
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import Verdict, verdict
from loraloom.tuning.worker import name_of

RESULT_NAME, BEST_NAME, BEST_FILE = "result.json", "best", "best.yaml"


@dataclass
class SearchResult:
    """The result of a search. ``record`` is the content of ``result.json``."""

    verdict: Verdict
    record: dict[str, Any]
    folder: Path


def conclude(options: TuneConfig, setup: Setup, state: State, describe: Describe) -> SearchResult:
    """Judge the trials of ``state`` and write the results.

    Raises:
        TrainingError: no trial was measured.
        SaveError: the folder cannot be written, or no adapter that may be recommended is whole.
    """
    folder = Path(options.train.output)
    best = folder / BEST_NAME
    found, source = _judge(options, setup, state)
    if source is not None:
        adapter, untested = source, found

        def measure() -> Verdict:
            return _tested(setup, replace(untested, cuts=cut(setup, found.metric, adapter, folder)), state, folder)

        found = measured_once(found, setup, state, source, folder, measure)
        if setup.data.test is None:
            found = replace(found, notes=[*found.notes, Message("no_test", rows=len(setup.data.validation_rows))])
    found = replace(found, notes=[*found.notes, *steering.notes(state)])
    made = record(
        found,
        state.trials,
        adapter=best if source is not None else "",
        usage=usage(setup),
        seconds=state.seconds,
        machine={
            **machine(),
            **versions(),
            "slots": state.slots,
            "workers": options.workers,
            "padding": state.padding,
        },
    ).to_json(describe)
    if source is not None and source != best:
        write_files(best, {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()})
    write_files(folder, {RESULT_NAME: json.dumps(made, indent=2, sort_keys=True).encode()})
    if found.learned:
        full = replace(found.best.options, output=str(folder / "full"), overwrite=False)
        score = found.scores[found.best.number].mean
        title = f"The best of {len(originals(state.trials))} trials: {options.metric} {score:.4g}"
        runfile.write(full, folder / BEST_FILE, title)
    return SearchResult(found, made, folder)


def _judge(options: TuneConfig, setup: Setup, state: State) -> tuple[Verdict, Path | None]:
    """The verdict, and the folder of the best adapter: None if none is recommended, or none came to its end.

    If all adapters of a configuration are missing or damaged, the next one is taken, with a note.
    """
    space, groups = options.space, originals(state.trials)
    notes, lost = list[Message](), list[int]()
    judge = Judge.of(setup, setup.evaluator(), options.metric)
    balance = Balance(options.prefer, options.within, options.max_size)
    while True:
        found = verdict(
            state.trials,
            options.metric,
            edges=space.edges,
            distributions=space.distributions(),
            order=space.order(),
            bar=state.bar,
            lost=lost,
            judge=judge,
            balance=balance,
        )
        number = found.best.number
        source = None
        if found.learned and found.scores[number].finished:
            if number in lost:
                raise SaveError(
                    f"{notes[0].figures['damage']}, and no other adapter is whole; give --overwrite to start the "
                    "search afresh"
                )
            source, more = _adapter(Path(options.train.output), groups[number])
            notes += more
            if source is None:
                lost.append(number)
                continue
        return replace(found, notes=[*found.notes, *_look_back(options, state), *notes]), source


def _tested(setup: Setup, found: Verdict, state: State, folder: Path) -> Verdict:
    """The verdict with the test, if there are rows for one."""
    if setup.data.test is None:
        return found
    groups = originals(state.trials)
    wanted = [groups[one.number] for one in (found.best, found.runner_up) if one is not None]
    head = state.bar is not None and bool(state.bar.head)
    return replace(found, test=final_test(setup, found.metric, wanted, found.noise, folder, head=head))


def _look_back(options: TuneConfig, state: State) -> list[Message]:
    """A note if early figures paused trials, and the winner then came from behind."""
    rule = state.halving
    return [overtaken(options, LookBack(**rule.misled))] if isinstance(rule, Race) and rule.misled else []


def _adapter(folder: Path, group: Sequence[Trial]) -> tuple[Path | None, list[Message]]:
    """The folder of a whole adapter of this configuration, and notes on damaged ones."""
    notes: list[Message] = []
    for trial in group:
        own = folder / TRIALS / name_of(trial.number)
        for path in (own, folder / BEST_NAME):
            if trial.state == "finished" and not damaged(path, trial.files):
                return path, notes
        if trial.state == "finished":
            notes.append(Message("adapter_damaged", trial=trial.number, damage=damaged(own, trial.files)))
    return None, notes
