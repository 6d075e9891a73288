"""The search: trials train side by side over one frozen model, poor ones stop early, waiting ones take their place.

Decisions follow from what was measured alone, never from the clock, and where the search stands is on disk: killed at
any moment and run again, it comes to the same verdict. Workers train (``tune.worker``); here it is decided who does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import loraloom
from loraloom.config import runfile
from loraloom.config.lora import TaskType
from loraloom.engine.slot import Curve
from loraloom.errors import ConfigError, DataError, SaveError
from loraloom.files import lock
from loraloom.files.atomic import replace_links, write_files
from loraloom.files.log import logged
from loraloom.tasks.metrics.registry import metric_name
from loraloom.train.failures import Interrupted
from loraloom.train.output import check_output
from loraloom.train.preflight.doctor import amount
from loraloom.train.setup import Setup, load
from loraloom.train.signals import asked_to_stop
from loraloom.train.usage import usage
from loraloom.tune import format
from loraloom.tune.asha import Standing, SuccessiveHalving
from loraloom.tune.bar import Bar, learned
from loraloom.tune.config import TuneConfig
from loraloom.tune.executor import Executor, LocalExecutor, Silent, Watcher
from loraloom.tune.journal import Journal
from loraloom.tune.ranking import goodness, originals
from loraloom.tune.sampler import JOURNAL_NAME, propose
from loraloom.tune.state import (
    STATE_NAME,
    TRIALS,
    State,
    clear,
    damaged,
    date_of,
    hashes_of,
    load_numbers,
    load_state,
    save_state,
)
from loraloom.tune.trial import Trial
from loraloom.tune.verdict import Verdict, record, verdict
from loraloom.tune.worker import Report, TensorState, TrialFactory, Worker, name_of, rung_step

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

#: Proposals that a sampler makes from the same knowledge, and the least number of first ones, which keeps the slots of
#: a small search busy.
PROPOSALS, FIRST = 16, 8
RESULT_NAME, BEST_NAME, BEST_FILE = "result.json", "best", "best.yaml"


@dataclass
class SearchResult:
    """What came out. ``record`` is what ``result.json`` holds."""

    verdict: Verdict
    record: dict[str, Any]
    folder: Path


def search(options: TuneConfig, watch: Watcher | None = None, sampler: BaseSampler | None = None) -> SearchResult:
    """Search, or go on with the search in the folder. ``sampler`` is one of Optuna's in place of ``options.sampler``.

    Raises:
        InputError: anything wrong with what the user gave, before any training.
        Interrupted: Ctrl-C; the same call goes on.
        TrainingError: no trial came to a figure.
        SaveError: the folder cannot be written.
    """
    with lock.held(options.train.output):
        return _search(options, watch or Silent(), sampler)


def _search(options: TuneConfig, watch: Watcher, sampler: BaseSampler | None) -> SearchResult:
    check_output(options.train, files=(RESULT_NAME, BEST_FILE, STATE_NAME, JOURNAL_NAME, "search.png", "pareto.png"))
    folder = Path(options.train.output)
    links = (BEST_NAME, TRIALS, JOURNAL_NAME)
    replace_links(*(folder / name for name in links), *(folder / TRIALS).glob("trial-*"))
    if options.over_ray:
        from loraloom.tune.ray_executor import need_ray

        need_ray()
    setup = load(options.train, date=None if options.train.overwrite else date_of(folder))
    _check_validation(setup)
    metric, own = options.metric, setup.metrics
    if metric == metric_name(setup.task) and metric not in own.names and not own.own:
        metric = own.first  # where it turned out that labels are numbers or several classes, or tags no entities
    if metric != "loss" and metric not in own.names and not own.own:
        raise ConfigError(f"metric: {metric!r} is not measured of this data; there are {', '.join(own.names)}, loss")
    assert metric is not None
    watch.metric = metric
    options = replace(options, train=replace(setup.options, problem_type=setup.data.problem), metric=metric)
    options.space.check(setup.base, options.train)
    return Search(options, setup, watch, sampler).run()


class Search:
    """One search: where it stands, and who trains next."""

    def __init__(self, options: TuneConfig, setup: Setup, watch: Watcher, sampler: BaseSampler | None = None) -> None:
        self.options, self.setup, self.watch, self.sampler = options, setup, watch, sampler
        self._event = logged(watch.event)
        self.folder, self.exhausted = Path(options.train.output), False
        self.factory = TrialFactory(options, setup)
        self.fingerprint = _fingerprint(options, setup)
        halving = SuccessiveHalving(len(options.rungs), options.reduction, options.finalists)
        self.state = State(self.fingerprint, 0, halving, date=options.train.date)
        #: worker → the trials that it has
        self.members: dict[int, list[int]] = {}
        self.journal = Journal(options, self.folder, watch.event)
        self.pressed = threading.Event()

    # -- from the first step to the verdict ---------------------------------------------------------------------

    def run(self) -> SearchResult:
        self._describe()
        if later := self.options.left_for_later:
            self._event(f"not for the search, but for the training in full ({BEST_FILE}): {', '.join(later)}")
        if self.options.train.overwrite:
            clear(self.folder, RESULT_NAME, BEST_FILE, BEST_NAME)
        found = load_state(self.folder, self.fingerprint, self.factory.trial_options)
        if found is not None:
            self.state = found
            done = sum(trial.state not in ("running", "waiting") for trial in found.trials)
            self._event(f"going on in {self.folder}: {done} of {len(found.trials)} trials have ended")
        if not self.state.finished:
            with contextlib.closing(self._crew()) as crew:
                most = math.ceil(self.options.trials / crew.count)
                asked = self.options.slots, self.options.memory
                if found is None or found.asked != asked:
                    planned = crew.plan(most)
                    self.state.slots, self.state.asked = planned.count, asked
                    together = f"{planned.count} trials train together" if planned.count > 1 else "one trial at a time"
                    on_each = f" on each of {crew.count} workers" if crew.count > 1 else ""
                    self._event(f"slots: {together}{on_each} ({planned.why})")
                self.state.slots = min(self.state.slots, most)  # there may have been fewer workers before
                self.state.bar = crew.set_bar(self.state.bar)
                self._event(f"to beat: {self.bar_words()} in {self.options.metric}")
                self._train(crew)
        return self._conclude()

    def _describe(self) -> None:
        """What was recognised and done to the rows, and what may well be a mistake: as ``loraloom train`` says it."""
        data = self.setup.data
        for note in data.notes:
            self._event(note)
        self._event(
            f"{len(data.train.examples):,} rows to train on, {len(data.evaluation.examples):,} held out; "
            f"{data.train.tokens:,} tokens an epoch, padding {data.padding:.1%}"
        )
        options = self.options.train
        findings = amount(
            len(data.train.examples),
            options.batch_size * options.gradient_accumulation_steps,
            self.setup.steps(options)[0],
        )
        for text in [*data.warnings, *(finding.text for finding in findings)]:
            self._event(f"warning: {text}")

    def _crew(self) -> Executor:
        def stop() -> bool:
            return self.pressed.is_set()

        if self.options.over_ray:
            from loraloom.tune.ray_executor import RayExecutor

            return RayExecutor(self.options, list(self.setup.data.hashes.values()), self._tell, stop)
        return LocalExecutor(Worker(self.options, self.setup, self.factory), self._tell, stop)

    def _train(self, crew: Executor) -> None:
        with asked_to_stop() as self.pressed:
            self.members = {worker: [] for worker in range(crew.count)}
            busy = self._assign(crew, list(self.members), {})
            while busy:
                worker, report = crew.wait()
                busy.discard(worker)
                numbers = self._receive(worker, report)
                if self.pressed.is_set():
                    self._save(numbers)
                    if busy:  # they hand over as well
                        continue
                    raise Interrupted(f"stopped; the same command goes on with the search in {self.folder}")
                idle = [other for other in self.members if other not in busy]
                busy |= self._assign(crew, idle, numbers)
        for trial in self.trials:
            if trial.state == "waiting":
                trial.state, trial.reason = "stopped", f"others were better at step {trial.step}"
        self.state.finished = True
        self._save({})

    @property
    def trials(self) -> list[Trial]:
        return self.state.trials

    def _tell(self, running: Sequence[Trial], tokens_per_second: float) -> None:
        self.watch.update(
            running, self.trials, self.state.slots * len(self.members), tokens_per_second, self._seconds_left()
        )

    def _receive(self, worker: int, report: Report | None) -> dict[int, TensorState]:
        """Take up what a worker reports. Returns the numbers of its trials."""
        if report is None or report.out_of_memory:
            if report is not None:
                if self.state.slots == 1:
                    raise MemoryError("out of memory with a single trial")
                self.state.slots //= 2
                slots = "1 slot" if self.state.slots == 1 else f"{self.state.slots} slots"
                self._event(f"out of memory: going on with {slots}")
            else:
                self._event(f"worker {worker} died: its trials go on from what was last written down")
            self.members[worker] = []
            self._back_to_disk()
            return {}
        for trial in report.trials:
            self.state.trials[trial.number] = trial
        self.state.seconds += report.seconds / len(self.members)
        for number in report.events:
            self._take_note(self.trials[number])
        return report.numbers

    def _back_to_disk(self) -> None:
        """Trials that no worker has are as they were when last written down."""
        there = load_state(self.folder, self.fingerprint, self.factory.trial_options)
        held = {number for members in self.members.values() for number in members}
        for trial in there.trials if there else []:
            if trial.number not in held:
                self.state.trials[trial.number] = trial

    def _take_note(self, trial: Trial) -> None:
        if trial.state == "failed":
            self._event(f"trial {trial.number} failed: {trial.reason}")
        elif trial.state == "finished":
            value = trial.latest(self.options.metric)
            trial.files = hashes_of(self.folder / TRIALS / name_of(trial.number))
            self._event(f"trial {trial.number} finished: {self.options.metric} {value:.4g}")
        else:
            trial.state = "waiting"

    def _assign(self, crew: Executor, idle: Sequence[int], numbers: dict[int, TensorState]) -> set[int]:
        """Decide who trains next, write it down, and let the idle workers begin. Returns those that have work.

        ``numbers`` are those of the trials that just came back.
        """
        free = len(idle) * self.state.slots
        held = {number for worker, members in self.members.items() if worker not in idle for number in members}
        mine = [trial for trial in self.trials if trial.state == "running" and trial.number not in held]
        while len(mine) < free and (chosen := self._next()) is not None:
            chosen.state = "running"
            mine.append(chosen)
        self._save(numbers)
        mine.sort(key=lambda trial: trial.number)
        working = set()
        slots = self.state.slots  # fewer than before, once memory was not enough
        places = {worker: [t for t in mine if t.number in self.members[worker]][:slots] for worker in idle}
        rest = [trial for trial in mine if not any(trial in place for place in places.values())]
        for worker in idle:
            room = slots - len(places[worker])
            places[worker], rest = places[worker] + rest[:room], rest[room:]
            if not places[worker]:  # what it has it keeps until it is told otherwise
                continue
            numbers_now = sorted(trial.number for trial in places[worker])
            leave = [n for n in self.members[worker] if n not in numbers_now]
            there, self.members[worker] = self.members[worker], numbers_now
            # Those that it has are handed over as well, for how far they train now, without their numbers.
            enter = [(trial, {} if trial.number in there else self._begin(trial)) for trial in places[worker]]
            crew.start(worker, enter, leave)
            working.add(worker)
        return working

    def _begin(self, trial: Trial) -> TensorState:
        try:
            numbers = load_numbers(self.folder, self.state, trial.number)
        except SaveError as error:
            self._event(f"{error}; trial {trial.number} begins again from its first step")
            self.state.files.pop(trial.number)
            trial.step, trial.measure, trial.curve, numbers = 0, False, Curve(), {}
        if not numbers:
            names = list(trial.values)
            self._event(f"trial {trial.number} begins: {format.params(trial.values, names, between=', ')}")
        return numbers

    def _save(self, numbers: Mapping[int, TensorState]) -> None:
        save_state(self.folder, self.state, numbers)
        self.journal.keep(self.trials)

    # -- who trains next ----------------------------------------------------------------------------------------

    def _next(self) -> Trial | None:
        """A trial that is to train or to be measured, and has no slot; one that a worker has already is preferred."""
        while self._decided():
            pass
        held = {number for members in self.members.values() for number in members}
        ready = [t for t in self.trials if t.state == "waiting" and (t.measure or t.step < (t.goal or t.steps))]
        return min(ready, key=lambda trial: (trial.number not in held, trial.number), default=None)

    @property
    def originals(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.repeats is None]

    def _decided(self) -> bool:
        """Take one decision, if what is known allows it. None depends on which trial came first."""
        originals, halving = self.originals, self.state.halving
        if not self.exhausted and len(originals) < self.options.trials:
            return all(self._stands(trial, 0) for trial in originals) and self._propose()
        if halving.open < halving.rungs:
            return self._decide_rung(halving.open)
        suspended = halving.suspended([trial.number for trial in originals])
        if any(trial.state in ("running", "waiting") and trial.number not in suspended for trial in self.trials):
            return False
        if any(trial.repeats is not None for trial in self.trials):
            return False
        if not any(self._learned(trial) for trial in originals):
            return self._resume()
        return self._add_repeats(originals)

    def _stands(self, trial: Trial, rung: int) -> bool:
        """Whether it has come to ``rung`` and does not train, or never will."""
        if trial.state in ("finished", "failed"):
            return True
        return bool(self.options.rungs) and trial.state == "waiting" and trial.step >= self._rung_step(trial, rung)

    def _rung_step(self, trial: Trial, rung: int) -> int:
        return rung_step(self.options, trial, rung)

    def _propose(self) -> bool:
        """The next proposals, all from the same knowledge: they do not hang on who came to a rung first."""
        originals, trials = self.originals, self.options.trials
        count = trials
        if self.sampler is not None or self.options.sampler == "tpe":
            count = max((trials + 1) // 2, FIRST) if not originals else max(PROPOSALS, trials // 4)
        before = len(originals)
        for _ in range(min(count, trials - before)):
            values = propose(self.options, self.trials, self.sampler)
            if values is None:
                self.exhausted = True
                break
            trial = self._add(values, self.options.train.seed)
            trial.goal = self._rung_step(trial, 0) if self.options.rungs else trial.steps
        return True

    def _decide_rung(self, rung: int) -> bool:
        halving, options = self.state.halving, self.options
        here = [self.trials[n] for n in halving.members(rung, [trial.number for trial in self.originals])]
        here = [trial for trial in here if trial.state != "failed"]
        numbers = [trial.number for trial in here]
        warm = max((self._warmup(trial) for trial in here), default=0.0)
        if len(here) <= halving.quota(len(here)) or options.rungs[rung] < warm:
            halving.pass_all(numbers)
            return self._send_on(numbers)
        if not all(self._stands(trial, rung) for trial in here):
            return False
        off = {trial.number: self._off(trial, rung) for trial in here}
        share = f"at {options.rungs[rung]:.0%} of the steps"
        if not any(off.values()):
            self._event(f"{share} no trial has taken off yet (training loss below that of {self._constant()}): "
                             f"all {len(here)} train on")  # fmt: skip
            halving.pass_all(numbers)
            return self._send_on(numbers)
        if late := [trial for trial in here if not trial.measured and trial.state == "waiting"]:
            for trial in late:
                trial.measure = True
            return False
        sent = halving.decide({trial.number: self._standing(trial, off[trial.number]) for trial in here})
        rest = [str(number) for number in numbers if number not in sent and self.trials[number].state == "waiting"]
        self._event(
            f"{share} {sum(off.values())} of {len(here)} trials have taken off: {', '.join(map(str, sent))} train on"
            + (f", {', '.join(rest)} are suspended" if rest else "")
        )
        return self._send_on(sent)

    def _constant(self) -> str:
        return "the best constant answer" if self.bar.base is not None else "its first steps"

    def _off(self, trial: Trial, rung: int) -> bool:
        return self.bar.has_taken_off(trial.curve.loss[: self._rung_step(trial, rung)], trial.steps)

    def _standing(self, trial: Trial, off: bool) -> Standing:
        last = trial.curve.evaluations[-1]
        return Standing(off, last["loss"], goodness(self.options.metric, last[self.options.metric]))

    def _warmup(self, trial: Trial) -> float:
        """The share of its steps in which the rate rises."""
        given = trial.options.warmup_steps
        return trial.options.warmup_ratio if given is None else given / trial.steps

    def _send_on(self, numbers: Sequence[int]) -> bool:
        """Those train to the next rung at which somebody may be suspended, or to their end."""
        halving = self.state.halving
        rung = halving.open
        for number in numbers:
            trial = self.trials[number]
            trial.goal = trial.steps if rung == halving.rungs else self._rung_step(trial, rung)
        return True

    def _resume(self) -> bool:
        """Nobody who came to the end has learned anything: those suspended last come to theirs as well."""
        chosen = self.state.halving.resume([trial.number for trial in self.originals])
        chosen = [number for number in chosen if self.trials[number].state == "waiting"]
        if not chosen:
            return bool(self.state.halving.suspended([trial.number for trial in self.originals]))
        for number in chosen:
            self.trials[number].goal = self.trials[number].steps
        self._event(f"no trial that came to its end is above {self.bar_words()}: {', '.join(map(str, chosen))} "
                         "train on to theirs")  # fmt: skip
        return True

    def _learned(self, trial: Trial) -> bool:
        return trial.state == "finished" and learned(self.bar, [trial], self.options.metric, self.tried)

    @property
    def bar(self) -> Bar:
        assert self.state.bar is not None
        return self.state.bar

    def bar_words(self) -> str:
        best = self.bar.best(self.options.metric)
        return "what says nothing of the rows" if best is None else f"{best[0]} ({best[1][0]:.3g})"

    @property
    def tried(self) -> int:
        return len(self.originals)

    def _add(self, values: Mapping[str, Any], seed: int, repeats: int | None = None) -> Trial:
        options = self.factory.trial_options(values, seed)
        steps, _ = self.setup.steps(options)
        made = self.factory.plan(self.setup.config(options))
        trial = Trial(
            len(self.trials),
            dict(values),
            options,
            steps,
            parameters=made.parameters,
            bytes=made.bytes,
            unadapted=str(made.experts) if made.experts.weights else "",
            repeats=repeats,
        )
        self.trials.append(trial)
        return trial

    def _add_repeats(self, originals: Sequence[Trial]) -> bool:
        """The finalists again, with other seeds: so that the noise is known. Those that learned nothing are none."""
        finished = [trial for trial in originals if self._learned(trial)]

        def order(trial: Trial) -> tuple[float, int, int]:
            value = trial.latest(self.options.metric)
            return -goodness(self.options.metric, math.nan if value is None else value), trial.parameters, trial.number

        finalists = sorted(finished, key=order)[: self.options.finalists]
        for further in range(1, self.options.seeds + 1):
            for trial in finalists:
                self._add(trial.values, self.options.train.seed + further, repeats=trial.number)
        if finalists and self.options.seeds:
            numbers, more = ", ".join(str(trial.number) for trial in finalists), self.options.seeds
            self._event(f"finalists {numbers}: again with {more} more {'seed' if more == 1 else 'seeds'} each")
        return bool(finalists and self.options.seeds)

    def _seconds_left(self) -> float | None:
        """By the steps that successive halving leaves, at the speed so far."""
        done = sum(trial.step for trial in self.trials)
        if not done or not self.state.seconds:
            return None
        steps, options = statistics.median(trial.steps for trial in self.trials), self.options
        count, before, whole = float(options.trials), 0.0, 0.0
        for rung, share in enumerate([*options.rungs, 1.0]):
            whole, before = whole + count * (share - before) * steps, share
            if rung < self.state.halving.rungs:
                sent = self.state.halving.sent[rung]
                count = len(sent) if sent is not None else self.state.halving.quota(math.ceil(count))
        whole += options.seeds * options.finalists * steps
        return max(whole - done, 0) * self.state.seconds / done

    # -- what came out ------------------------------------------------------------------------------------------

    def _conclude(self) -> SearchResult:
        best = self.folder / BEST_NAME
        found, source = self._judge()
        made = record(
            found,
            self.trials,
            adapter=best if source is not None else "",
            usage=usage(self.setup),
            seconds=self.state.seconds,
            machine={
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "slots": self.state.slots,
                "workers": self.options.workers,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "loraloom": loraloom.__version__,
            },
        )
        if source is not None and source != best:
            write_files(best, {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()})
        write_files(self.folder, {RESULT_NAME: json.dumps(made, indent=2, sort_keys=True).encode()})
        if found.learned:
            options = replace(found.best.options, output=str(self.folder / "full"), overwrite=False)
            score = found.scores[found.best.number].mean
            title = f"The best of {self.options.trials} trials: {self.options.metric} {score:.4g}"
            runfile.write(options, self.folder / BEST_FILE, title)
        return SearchResult(found, made, self.folder)

    def _judge(self) -> tuple[Verdict, Path | None]:
        """The verdict, and the folder of the best adapter: None where none is recommended, or none came to its end.

        A configuration whose adapters are all missing or damaged gives way to the next, and that is noted.

        Raises:
            SaveError: no adapter is whole of those that may be recommended.
        """
        space, notes, lost = self.options.space, list[str](), list[int]()
        groups = originals(self.trials)
        while True:
            found = verdict(
                self.trials,
                self.options.metric,
                edges=space.edges,
                distributions=space.distributions(),
                order=space.order(),
                bar=self.state.bar,
                lost=lost,
            )
            number = found.best.number
            if not found.learned or not found.scores[number].finished:
                return replace(found, notes=[*found.notes, *notes]), None
            if number in lost:
                raise SaveError(f"{notes[0]}, and no other adapter is whole; give --overwrite to begin the search anew")
            source, said = self._adapter(groups[number])
            notes += said
            if source is not None:
                return replace(found, notes=[*found.notes, *notes]), source
            lost.append(number)

    def _adapter(self, group: Sequence[Trial]) -> tuple[Path | None, list[str]]:
        """The folder of an adapter of this configuration that is whole, and what is to be said of others."""
        said: list[str] = []
        for trial in group:
            folder = self.folder / TRIALS / name_of(trial.number)
            for path in (folder, self.folder / BEST_NAME):
                if trial.state == "finished" and not damaged(path, trial.files):
                    return path, said
            if trial.state == "finished":
                said.append(f"the adapter of trial {trial.number} is not used: {damaged(folder, trial.files)}")
        return None, said


def _check_validation(setup: Setup) -> None:
    """Rows that all are of one class cannot tell a good configuration from a poor one."""
    labels = {example.labels for example in setup.data.evaluation.examples if isinstance(example.labels, int)}
    if setup.task is TaskType.SEQ_CLS and len(labels) == 1:
        raise DataError(
            f"{setup.options.eval_split if isinstance(setup.options.eval_split, str) else setup.options.data}: all "
            f"{len(setup.data.evaluation.examples)} held-out rows are labelled "
            f"{setup.data.names[labels.pop()]!r}, so no configuration can be told from another; hold out more rows"
        )


def _fingerprint(options: TuneConfig, setup: Setup) -> str:
    hashes = sorted(setup.data.hashes.values())
    return hashlib.sha256(json.dumps([options.fingerprint(), hashes, setup.weights]).encode()).hexdigest()
