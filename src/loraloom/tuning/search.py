"""The search: trials train side by side over one frozen model, poor ones stop early, waiting ones take their slots.

This file gives trials to workers (``tuning.worker``) and writes the state of the search; ``tuning.scheduler`` decides
who trains. Decisions follow from measurements alone, never from the clock, so a search that is killed at any moment and
resumed comes to the same verdict.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraloom.engine.slot import Curve
from loraloom.engine.slot_state import SlotState
from loraloom.errors import ConfigError, SaveError
from loraloom.files import lock
from loraloom.files.atomic import replace_links
from loraloom.messages import Describe, Message, OnEvent, ignore, logged
from loraloom.training.failures import Interrupted
from loraloom.training.output import check_output
from loraloom.training.preflight.doctor import amount
from loraloom.training.setup import Setup, load
from loraloom.training.signals import asked_to_stop
from loraloom.tuning import extension, held_out, steering
from loraloom.tuning.clock import Clock, check_time
from loraloom.tuning.conclusion import BEST_FILE, BEST_NAME, RESULT_NAME, SearchResult, conclude
from loraloom.tuning.config import RUN_FILE_TITLE, TuneConfig
from loraloom.tuning.executor import Executor, LocalExecutor, SearchStatus
from loraloom.tuning.journal import Journal
from loraloom.tuning.promotion import new_rule
from loraloom.tuning.sampler import JOURNAL_NAME
from loraloom.tuning.scheduler import Scheduler
from loraloom.tuning.smaller import SCALED_NAME, SMALLER_NAME
from loraloom.tuning.state import (
    RUN_FILE,
    STATE_NAME,
    TRIALS,
    State,
    clear,
    date_of,
    hashes_of,
    load_slot,
    load_state,
    save_state,
)
from loraloom.tuning.steering import REQUESTS
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import Report, TrialFactory, Worker, name_of

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

#: What ``report`` draws into the folder.
PICTURES = ("search.png", "tradeoff.png", "importance.png")
OnStatus = Callable[[SearchStatus], object]


def search(
    options: TuneConfig,
    on_event: OnEvent = ignore,
    on_status: OnStatus = ignore,
    sampler: BaseSampler | None = None,
    describe: Describe = str,
    add_trials: int | None = None,
) -> SearchResult:
    """Search, or resume the search in the folder.

    Args:
        on_event: called with what happens: a trial starts, is paused, finishes.
        on_status: called after each step of the trials.
        sampler: one of Optuna's in place of ``options.sampler``.
        describe: writes the sentences of ``result.json``: ``report.sentences.sentence``. By default they are kinds and
            figures.
        add_trials: extend the search in the folder by that many trials; its space, seeds and finalists may change too.

    Raises:
        InputError: anything wrong with what the user gave, before any training.
        Interrupted: Ctrl-C; the same call resumes.
        TrainingError: no trial came to a figure.
        SaveError: the folder cannot be written.
    """
    with lock.held(options.train.output):
        options, setup = _prepare(options)
        found = Search(options, setup, logged(on_event, describe), on_status, sampler, add_trials)
        found.run()
        return conclude(found.options, setup, found.state, describe)


def _prepare(options: TuneConfig) -> tuple[TuneConfig, Setup]:
    """Read and check everything. Returns the options completed by what the rows showed."""
    check_output(options.train, files=(RESULT_NAME, BEST_FILE, STATE_NAME, JOURNAL_NAME, *PICTURES))
    folder = Path(options.train.output)
    links = (BEST_NAME, SMALLER_NAME, SCALED_NAME, TRIALS, JOURNAL_NAME)
    replace_links(*(folder / name for name in links), *(folder / TRIALS).glob("trial-*"))
    if options.over_ray:
        from loraloom.tuning.ray_executor import need_ray

        need_ray()
    setup = load(options.train, date=None if options.train.overwrite else date_of(folder))
    begun = (folder / STATE_NAME).exists() and not options.train.overwrite
    held_out.check(setup, allow_shared=options.allow_shared_rows or begun)
    metric, own = options.metric, setup.metrics
    if metric == setup.task.kind().unasked[0] and metric not in own.names and not own.own:
        metric = own.first  # labels turned out to be numbers or several classes, or tags to mark no entities
    if metric != "loss" and metric not in own.names and not own.own:
        raise ConfigError(f"metric: {metric!r} is not measured of this data; there are {', '.join(own.names)}, loss")
    problem = setup.data.problem if "problem_type" in setup.task.options else None
    options = replace(options, train=replace(setup.options, problem_type=problem), metric=metric)
    options.space.check(setup.base, options.train)
    return options, setup


class Search:
    """One search from its first step to its last: which worker has which trial, and the state on disk."""

    def __init__(
        self,
        options: TuneConfig,
        setup: Setup,
        on_event: OnEvent,
        on_status: OnStatus,
        sampler: BaseSampler | None = None,
        add_trials: int | None = None,
    ) -> None:
        self.setup, self.on_event, self.on_status = setup, on_event, on_status
        self.folder, self.sampler, self.add_trials = Path(options.train.output), sampler, add_trials
        self.options, self.identity = extension.known(options, setup, self.folder, add_trials is not None)
        self.factory = TrialFactory(self.options, setup)
        #: worker → the trials that it holds
        self.members: dict[int, list[int]] = {}
        #: files that are written with the next state
        self.beside: dict[str, bytes] = {}
        self.clock: Clock | None = None
        #: files of the user's requests that became events which are not written yet
        self.requests: list[Path] = []
        self.journal = Journal(self.options, self.folder)
        self.pressed = threading.Event()

    def run(self) -> None:
        """Train until everything is decided."""
        self._describe()
        if self.options.train.overwrite:
            if self.add_trials is not None:
                raise ConfigError("add_trials: extends a search, and overwrite deletes it; give one of the two")
            clear(self.folder, RESULT_NAME, BEST_FILE, BEST_NAME, SMALLER_NAME, SCALED_NAME, REQUESTS)
        found = load_state(self.folder, self.identity.fingerprint, self.factory.trial_options)
        if found is None and self.add_trials is not None:
            raise ConfigError(f"add_trials: {self.folder} holds no search to extend")
        self.state = found or State(self.identity.fingerprint, 0, new_rule(self.options), date=self.options.train.date)
        if found is not None:
            ended = sum(trial.state not in ("running", "waiting") for trial in found.trials)
            self.on_event(Message("resumed", folder=str(self.folder), ended=ended, trials=len(found.trials)))
        self._keep_options()
        if self.state.finished:
            if self.beside:
                self._save({})
            return
        self.scheduler = Scheduler(self.options, self.setup, self.factory, self.state, self.on_event, self.sampler)
        with contextlib.closing(self._executor()) as executor:
            self._plan(executor, fresh=found is None)
            self._set_clock(executor)
            self.state.bar = executor.set_bar(self.state.bar)
            self.on_event(Message("to_beat", **self.state.bar.figures(self.options.metric, hardest=True)))
            self._train(executor)

    def _keep_options(self) -> None:
        """Note by which options the search is resumed, and that it is extended; written with the next state."""
        state, before = self.state, (self.state.fixed, self.state.extent)
        state.fixed, state.extent = self.identity.fixed, state.extent or extension.extent(self.options)
        if self.add_trials is not None:
            seen = [self.factory.in_space(trial) for trial in self.trials if trial.repeats is None]
            tried = [values for values in seen if values is not None]
            self.on_event(extension.extend(state, self.options, self.add_trials, tried))
        path = self.folder / RUN_FILE
        own = not path.exists() or path.read_text(errors="replace").startswith(RUN_FILE_TITLE)
        if own and ((state.fixed, state.extent) != before or self.add_trials is not None):
            self.beside = {RUN_FILE: self.options.run_file().encode()}

    def _set_clock(self, executor: Executor) -> None:
        """
        Raises:
            ConfigError: the time is too short for one trial.
        """
        limit, train = self.options.max_time, self.options.train
        if limit is None:
            return
        step = executor.seconds_of_step()
        if len(self.trials) <= self.state.first or self.add_trials:  # nothing has begun
            rows = len(self.setup.data.validation.examples) / train.batch_size
            check_time(limit, self.setup.steps_of(train)[0], step, rows)
        self.clock = Clock(limit, step, self.state, self.options.finalists, self.options.metric)

    def _describe(self) -> None:
        """Report what was recognised, what was done to the rows, and what may well be a mistake."""
        data, options = self.setup.data, self.options.train
        batch = options.batch_size * options.gradient_accumulation_steps
        few = amount(len(data.train.examples), batch, self.setup.steps_of(options)[0])
        for message in [*data.messages(), *held_out.messages(self.setup), *few]:
            self.on_event(message)
        if later := self.options.left_for_later:
            self.on_event(Message("left_for_full", keys=later, file=BEST_FILE))

    def _executor(self) -> Executor:
        def stop() -> bool:
            due = self.clock is not None and self.clock.due()
            return due or self.pressed.is_set() or steering.pending(self.folder)

        if self.options.over_ray:
            from loraloom.tuning.ray_executor import RayExecutor

            return RayExecutor(self.options, list(self.setup.data.hashes.values()), self._tell, stop)
        return LocalExecutor(Worker(self.options, self.setup, self.factory), self._tell, stop)

    def _plan(self, executor: Executor, fresh: bool) -> None:
        """How many trials train together; planned again if the user gives other limits than before."""
        at_the_end = self.options.finalists * (1 + self.options.seeds)
        most = math.ceil(max(extension.wanted(self.state), at_the_end) / executor.count)
        asked = self.options.slots, self.options.memory
        if fresh or self.state.asked != asked:
            planned = executor.plan(most)
            self.state.slots, self.state.asked = planned.count, asked
            self.on_event(Message("slots", slots=planned.count, workers=executor.count, **planned.figures))
        self.state.slots = min(self.state.slots, most)  # there may have been fewer workers before

    def _train(self, executor: Executor) -> None:
        with asked_to_stop() as self.pressed:
            self.members = {worker: [] for worker in range(executor.count)}
            self._take_up_requests()
            busy = self._assign(executor, list(self.members), {})
            while busy:
                worker, report = executor.wait()
                busy.discard(worker)
                numbers = self._receive(worker, report)
                if self.pressed.is_set():
                    self._save(numbers)
                    if busy:  # they hand over as well
                        continue
                    raise Interrupted(f"stopped; {self._resume_hint} resumes the search in {self.folder}")
                self._take_up_requests()
                self._look_at_clock()
                idle = [other for other in self.members if other not in busy]
                busy |= self._assign(executor, idle, numbers)
        self.scheduler.give_up_waiting()
        self._take_up_requests()  # too late
        self.state.finished = True
        self._save({})
        steering.close(self.folder)

    @property
    def _resume_hint(self) -> str:
        """What to say that resumes; the command that extended the search would extend it again."""
        return "the same command" if self.add_trials is None else f"loraloom tune {shlex.quote(str(self.folder))}"

    def _look_at_clock(self) -> None:
        event = None if self.clock is None else self.clock.look(self.scheduler.live())
        if event is not None:
            live = len(self.scheduler.live())
            self.state.events.append(event)
            figures = {key: event[key] for key in ("seconds", "steps", "finish")}
            self.on_event(Message("time_over", stopped=live - len(event["finish"]), **figures))
        self.scheduler.obey_clock()

    def _take_up_requests(self) -> None:
        if steering.pending(self.folder):
            self.requests, messages = steering.take_up(self.folder, self.state)
            for message in messages:
                self.on_event(message)

    @property
    def trials(self) -> list[Trial]:
        return self.state.trials

    def _tell(self, running: Sequence[Trial], tokens_per_second: float) -> None:
        slots, left = self.state.slots * len(self.members), self.scheduler.seconds_left()
        if self.clock is not None and left is not None:
            left = min(left, self.clock.left)
        self.on_status(SearchStatus(running, self.trials, self.options.metric, slots, tokens_per_second, left))

    # -- what workers report ----------------------------------------------------------------------------------------

    def _receive(self, worker: int, report: Report | None) -> dict[int, SlotState]:
        """Take over what a worker reports. Returns the tensors of its trials."""
        if report is None or report.out_of_memory:
            if report is None:
                self.on_event(Message("worker_died", worker=worker))
            elif self.state.slots == 1:
                raise MemoryError("out of memory with a single trial")
            else:
                self.state.slots //= 2
                self.on_event(Message("out_of_memory", slots=self.state.slots))
            self.members[worker] = []
            self._back_to_disk()
            return {}
        for trial in report.trials:
            if self.trials[trial.number].state != "stopped":  # since it was sent
                self.trials[trial.number] = trial
        self.state.seconds += report.seconds / len(self.members)
        self.state.tokens, self.state.places = self.state.tokens + report.tokens, self.state.places + report.places
        for number in report.events:
            if self.trials[number].state != "stopped":
                self._take_note(self.trials[number])
        steering.obey(self.state)
        return report.states

    def _back_to_disk(self) -> None:
        """Reset trials that no worker holds to their last saved state."""
        there = load_state(self.folder, self.identity.fingerprint, self.factory.trial_options)
        held = self._held(self.members)
        for trial in there.trials if there else []:
            if trial.number not in held:
                self.trials[trial.number] = trial

    def _held(self, workers: Mapping[int, object]) -> set[int]:
        return {number for worker in workers for number in self.members[worker]}

    def _take_note(self, trial: Trial) -> None:
        if trial.state == "failed":
            self.on_event(Message("failed", trial=trial.number, reason=trial.reason))
        elif trial.state == "finished":
            metric = self.options.metric
            trial.files = hashes_of(self.folder / TRIALS / name_of(trial.number))
            self.on_event(Message("finished", trial=trial.number, metric=metric, value=trial.latest(metric)))
        else:
            trial.state = "waiting"

    # -- who trains -------------------------------------------------------------------------------------------------

    def _assign(self, executor: Executor, idle: Sequence[int], numbers: dict[int, SlotState]) -> set[int]:
        """Decide who trains next, save, and let the idle workers start. Returns those that have work.

        ``numbers`` are the tensors of the trials that were just reported.
        """
        free = len(idle) * self.state.slots
        self.scheduler.decide()
        elsewhere = self._held({worker: None for worker in self.members if worker not in idle})
        mine = [trial for trial in self.trials if trial.state == "running" and trial.number not in elsewhere]
        while len(mine) < free and (chosen := self.scheduler.next(self._held(self.members))) is not None:
            chosen.state = "running"
            mine.append(chosen)
        self._save(numbers)
        working = set()
        for worker, trials in self._places(idle, sorted(mine, key=lambda trial: trial.number)).items():
            if not trials:  # it keeps the trials that it holds
                continue
            there, self.members[worker] = self.members[worker], sorted(trial.number for trial in trials)
            leave = [n for n in there if n not in self.members[worker]]
            # Trials that it holds are sent too, without tensors: how far they train has changed.
            enter = [(trial, None if trial.number in there else self._begin(trial)) for trial in trials]
            executor.start(worker, enter, leave)
            working.add(worker)
        return working

    def _places(self, idle: Sequence[int], mine: Sequence[Trial]) -> dict[int, list[Trial]]:
        """Idle worker → its trials: first those that it holds, then others while slots are free."""
        slots = self.state.slots  # fewer than before, once memory was not enough
        places = {worker: [t for t in mine if t.number in self.members[worker]][:slots] for worker in idle}
        rest = [trial for trial in mine if not any(trial in place for place in places.values())]
        for worker in idle:
            room = slots - len(places[worker])
            places[worker], rest = places[worker] + rest[:room], rest[room:]
        return places

    def _begin(self, trial: Trial) -> SlotState | None:
        try:
            numbers = load_slot(self.folder, self.state, trial.number)
        except SaveError as error:
            self.on_event(Message("restarted", trial=trial.number, error=str(error)))
            self.state.files.pop(trial.number)
            trial.step, trial.measure, trial.rows, numbers = 0, False, 0, None
            trial.curve, trial.rungs = Curve(), {}
        if numbers is None:
            self.on_event(Message("started", trial=trial.number, params=trial.values))
        return numbers

    def _save(self, numbers: Mapping[int, SlotState]) -> None:
        save_state(self.folder, self.state, numbers, self.beside)
        self.beside = {}
        steering.forget(self.requests)
        self.requests = []
        self.journal.keep(self.trials)
