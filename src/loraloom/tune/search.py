"""The search: trials train side by side over one frozen model, poor ones stop early, waiting ones take their place.

Decisions follow from what was measured alone, never from the clock, and where the search stands is on disk: killed at
any moment and run again, it comes to the same verdict.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

import loraloom
from loraloom.config import LoraConfig, TaskType
from loraloom.errors import DataError
from loraloom.lora.atomic import write_files
from loraloom.lora.inspection import ENERGY, singular_values
from loraloom.lora.model import PeftModel
from loraloom.lora.targets import plan
from loraloom.train import runfile
from loraloom.train.load import build_empty
from loraloom.train.loop import advance, evaluate
from loraloom.train.options import TrainOptions
from loraloom.train.pack import Pack
from loraloom.train.run import Interrupted, Loaded, check_output, ctrl_c, explain, load
from loraloom.train.slot import Slot
from loraloom.tune import proposals, words
from loraloom.tune.halving import Halving
from loraloom.tune.knobs import Range
from loraloom.tune.options import TuneOptions
from loraloom.tune.planner import plan_slots
from loraloom.tune.score import goodness
from loraloom.tune.space import RANK, TARGETS
from loraloom.tune.state import State, clear, load_numbers, load_state, save_state
from loraloom.tune.trial import Trial
from loraloom.tune.verdict import Verdict, record, verdict

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

RESULT_NAME, BEST_NAME, BEST_FILE = "result.json", "best", "best.yaml"
TRIALS = "trials"
#: An adapter in every layer that some trial may adapt. It is never used: it keeps the layers as they are while trials
#: come and go, so that what is computed together does not depend on which ones there are.
SPAN = "span"
#: Rows are filled up to a multiple of so many tokens, so that a trial's bits do not depend on who trains beside it.
WIDTH = 16
#: Where the search stands is written at least so often.
SAVE_SECONDS = 60.0
#: A trial blows up whose mean loss over so many steps is so many times that of its first ones.
WINDOW, BLOWN_UP = 10, 2.0
#: Between the last rung and the end there is one more evaluation: curves of two points say nothing.
BETWEEN = 2 / 3


class Watcher(Protocol):
    """Who is told how it goes."""

    def event(self, text: str) -> None: ...

    def update(
        self,
        running: Sequence[Trial],
        trials: Sequence[Trial],
        slots: int,
        tokens_per_second: float,
        seconds_left: float | None,
    ) -> None: ...


class Silent:
    def event(self, text: str) -> None:
        pass

    def update(self, *args: Any) -> None:
        pass


@dataclass
class SearchResult:
    """What came out. ``record`` is what ``result.json`` holds."""

    verdict: Verdict
    record: dict[str, Any]
    folder: Path


def search(options: TuneOptions, watch: Watcher | None = None, sampler: BaseSampler | None = None) -> SearchResult:
    """Search, or go on with the search in the folder. ``sampler`` is one of Optuna's in place of ``options.sampler``.

    Raises:
        InputError: anything wrong with what the user gave, before any training.
        Interrupted: Ctrl-C; the same call goes on.
        TrainingError: no trial came to a figure.
        SaveError: the folder cannot be written.
    """
    folder = Path(options.train.output)
    _check_folder(folder, options)
    loaded = load(options.train)
    _check_validation(loaded)
    options = replace(options, train=loaded.options)
    options.space.check(loaded.base, options.train)
    return Search(options, loaded, watch or Silent(), sampler).run()


class Search:
    """One search under way: the pack, the trials in it, and where it stands."""

    def __init__(
        self, options: TuneOptions, loaded: Loaded, watch: Watcher, sampler: BaseSampler | None = None
    ) -> None:
        self.options, self.loaded, self.watch, self.sampler = options, loaded, watch, sampler
        self.folder, self.exhausted = Path(options.train.output), False
        #: the model without numbers, to plan on
        self.blueprint = build_empty(options.train.model, loaded.task, max(len(loaded.data.names), 1))
        self.model = PeftModel(loaded.base)
        span = {target.name for one in self._combinations() for target in plan(self.blueprint, one).targets}
        self.model.add_adapter(SPAN, LoraConfig(r=1, target_modules=sorted(span), task_type=loaded.task))
        self.pack = Pack(self.model, task=loaded.task, pad_id=loaded.tokenizer.pad_token_id, pad_to_multiple_of=WIDTH)
        self.slots: dict[int, Slot] = {}
        self.fingerprint = _fingerprint(options, loaded)
        self.state = State(self.fingerprint, 0, Halving(len(options.rungs), options.reduction, options.finalists))
        self.tokens, self.clock, self.saved = 0, 0.0, 0.0

    # -- from the first step to the verdict ---------------------------------------------------------------------

    def run(self) -> SearchResult:
        found = load_state(self.folder, self.fingerprint, self.trial_options)
        if found is None:
            largest = max(self._combinations(), key=lambda one: plan(self.blueprint, one).parameters)
            most, memory, wanted = self.options.trials, self.options.memory, self.options.slots
            planned = plan_slots(self.pack, self.loaded, largest, most, memory, wanted)
            self.state.slots = planned.count
            self.watch.event(f"slots: {planned.count} trials train together ({planned.why})")
        else:
            self.state = found
            done = sum(trial.state not in ("running", "waiting") for trial in found.trials)
            self.watch.event(
                f"going on with the search in {self.folder}: {done} of {len(found.trials)} trials have ended"
            )
        if not self.state.finished:
            self._train()
        return self._conclude()

    def _train(self) -> None:
        self.clock = self.saved = time.monotonic()
        with ctrl_c() as pressed:
            self._turn([])
            while self.slots:
                if pressed.is_set():
                    self._save()
                    raise Interrupted(f"stopped; the same command goes on with the search in {self.folder}")
                try:
                    events = self._step()
                except (RuntimeError, MemoryError) as error:
                    if self.state.slots == 1 or not explain(error).startswith("out of memory"):
                        raise
                    self._shrink()
                    continue
                if events:
                    self._turn(events)
                elif time.monotonic() - self.saved > SAVE_SECONDS:
                    self._save()
        for trial in self.trials:
            if trial.state == "waiting":
                trial.state, trial.reason = "stopped", f"others were better at step {trial.step}"
        self.state.finished = True
        self._save()

    @property
    def trials(self) -> list[Trial]:
        return self.state.trials

    @property
    def running(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.number in self.slots]

    # -- a step, and what follows from it -----------------------------------------------------------------------

    def _step(self) -> list[Trial]:
        """One step of all running trials. Returns those of which something is to be decided."""
        running = self.running
        tokens = advance(self.pack, [self.slots[trial.number] for trial in running])
        now = time.monotonic()
        passed, self.clock = now - self.clock, now
        self.state.seconds += passed
        self.tokens += tokens
        events = []
        for trial in running:
            slot = self.slots[trial.number]
            trial.step = slot.step
            trial.seconds += passed / len(running)
            failure = slot.failure or _blown_up(trial)
            if failure:
                trial.state, trial.reason = "failed", failure
                events.append(trial)
            elif trial.step in self._milestones(trial) and not _measured(trial):
                events.append(trial)
        left = self._seconds_left()
        self.watch.update(running, self.trials, self.state.slots, tokens / max(passed, 1e-9), left)
        return events

    def _turn(self, events: Sequence[Trial]) -> None:
        """Measure those that reached a milestone, decide who trains next, write it down, and let them in."""
        for trial in events:
            if trial.state == "failed":
                self.watch.event(f"trial {trial.number} failed: {trial.reason}")
            else:
                self._measure(trial)
        while sum(t.state == "running" for t in self.trials) < self.state.slots and (chosen := self._next()):
            chosen.state = "running"
        for trial in events:
            if trial.state == "waiting":
                self.watch.event(f"trial {trial.number} waits at step {trial.step}: others are better so far")
        self._save()
        for number in [n for n in self.slots if self._trial(n).state != "running"]:
            self.pack.remove(_name(number))
            del self.slots[number]
        for trial in self.trials:
            if trial.state == "running" and trial.number not in self.slots and len(self.slots) < self.state.slots:
                self._enter(trial)
        self.clock = time.monotonic()

    def _measure(self, trial: Trial) -> None:
        name, data = _name(trial.number), self.loaded.data.evaluation.examples
        pad_id, rows = self.loaded.tokenizer.pad_token_id, self.options.train.eval_batch_size
        found = evaluate(self.model, name, self.loaded.task, data, pad_id, rows)
        trial.curve.evaluations.append({"step": trial.step, **found})
        value = found[self.options.metric]
        if not math.isfinite(value):
            trial.state, trial.reason = "failed", f"step {trial.step}: the held-out {self.options.metric} is {value}"
            self.watch.event(f"trial {trial.number} failed: {trial.reason}")
        elif trial.step >= trial.steps:
            trial.state, trial.used = "finished", _used(self.model, name)
            self.model.save_pretrained(self.folder / TRIALS, selected_adapters=[name])
            self.watch.event(f"trial {trial.number} finished: {self.options.metric} {value:.4g}")
        elif rungs := self._milestones(trial)[trial.step]:
            trial.state = "waiting"
            for rung in rungs:
                self.state.halving.reach(trial.number, rung, goodness(self.options.metric, value), -found["loss"])

    def _milestones(self, trial: Trial) -> dict[int, list[int]]:
        """Steps at which a trial is measured → the rungs that it reaches there. At the end the verdict compares."""
        places: dict[int, list[int]] = {}
        for number, share in enumerate([] if trial.repeats is not None else self.options.rungs):
            places.setdefault(max(1, math.ceil(share * trial.steps)), []).append(number)
        places.setdefault(max(1, math.ceil(BETWEEN * trial.steps)), [])
        return places | {trial.steps: []}

    # -- who trains next ----------------------------------------------------------------------------------------

    def _next(self) -> Trial | None:
        originals = [trial for trial in self.trials if trial.repeats is None]
        running = [trial for trial in originals if trial.state == "running"]
        new = len(originals) < self.options.trials and not self.exhausted
        promoted = self.state.halving.next(new, [self._heading(trial) for trial in running])
        if promoted is not None:
            return self._trial(promoted)
        if new:
            values = proposals.propose(self.options, self.trials, self.sampler)
            if values is not None:
                return self._add(values, self.options.train.seed)
            self.exhausted = True
            return self._next()
        if running:
            return None
        if not any(trial.repeats is not None for trial in self.trials):
            self._add_repeats(originals)
        return next((trial for trial in self.trials if trial.repeats is not None and trial.state == "waiting"), None)

    def _heading(self, trial: Trial) -> int:
        """The rung that it reaches next."""
        seen = self.state.halving.seen
        return next((rung for rung in range(len(seen)) if trial.number not in seen[rung]), len(seen))

    def _add(self, values: Mapping[str, Any], seed: int, repeats: int | None = None) -> Trial:
        options = self.trial_options(values, seed)
        steps, _ = self.loaded.steps(options)
        made = plan(self.blueprint, self.loaded.config(options))
        trial = Trial(
            len(self.trials),
            dict(values),
            options,
            steps,
            parameters=made.parameters,
            bytes=made.bytes,
            repeats=repeats,
        )
        self.trials.append(trial)
        return trial

    def _add_repeats(self, originals: Sequence[Trial]) -> None:
        """The finalists again, with other seeds: so that the noise is known."""
        finished = [trial for trial in originals if trial.state == "finished"]

        def order(trial: Trial) -> tuple[float, int, int]:
            value = trial.latest(self.options.metric)
            return -goodness(self.options.metric, math.nan if value is None else value), trial.parameters, trial.number

        finalists = sorted(finished, key=order)[: self.options.finalists]
        for further in range(1, self.options.seeds + 1):
            for trial in finalists:
                self._add(trial.values, self.options.train.seed + further, repeats=trial.number)
        if finalists and self.options.seeds:
            numbers = ", ".join(str(trial.number) for trial in finalists)
            self.watch.event(f"finalists {numbers}: again with {self.options.seeds} more seeds each")

    def trial_options(self, values: Mapping[str, Any], seed: int) -> TrainOptions:
        return replace(self.options.space.to_options(values, self.options.train, self.blueprint), seed=seed)

    def _trial(self, number: int) -> Trial:
        return self.trials[number]

    # -- in and out of the pack, and the disk -------------------------------------------------------------------

    def _enter(self, trial: Trial) -> None:
        """Put a trial into the pack, as it was when it left or at its beginning."""
        name = _name(trial.number)
        self.pack.add(name, self.loaded.config(trial.options), seed=trial.options.seed)
        numbers = load_numbers(self.folder, self.state, trial.number)
        with torch.no_grad():
            for key, parameter in self.pack.parameters_of(name).items():
                if numbers:
                    parameter.copy_(numbers[f"adapter/{key}"])
        slot = self.loaded.slot(name, self.model, trial.options, trial.steps)
        slot.optimizer.load_state({k.removeprefix("optimizer/"): v for k, v in numbers.items() if k[0] == "o"})
        slot.step, slot.curve = trial.step, trial.curve
        self.slots[trial.number] = slot
        if not numbers:
            self.watch.event(
                f"trial {trial.number} begins: {words.knobs(trial.values, list(trial.values), between=', ')}"
            )

    def _save(self) -> None:
        numbers = {}
        for number, slot in self.slots.items():
            parameters = self.pack.parameters_of(slot.name)
            numbers[number] = {f"adapter/{key}": p.detach() for key, p in parameters.items()}
            numbers[number] |= {f"optimizer/{key}": value for key, value in slot.optimizer.state().items()}
        save_state(self.folder, self.state, numbers)
        proposals.keep(self.options, self.trials, self.folder)
        self.saved = time.monotonic()

    def _shrink(self) -> None:
        """After running out of memory: half the slots, and every trial as it was when last written down."""
        for number in list(self.slots):
            self.pack.remove(_name(number))
            del self.slots[number]
        found = load_state(self.folder, self.fingerprint, self.trial_options)
        assert found is not None
        found.slots, found.seconds = self.state.slots // 2, self.state.seconds
        self.state = found
        self.watch.event(f"out of memory: going on with {found.slots} slots")
        self._turn([])

    def _seconds_left(self) -> float | None:
        """By the steps that successive halving leaves, at the speed so far."""
        done = sum(trial.step for trial in self.trials)
        if not done or not self.state.seconds:
            return None
        steps, options = statistics.median(trial.steps for trial in self.trials), self.options
        count, before, whole = float(options.trials), 0.0, 0.0
        for share in [*options.rungs, 1.0]:
            whole, before = whole + count * (share - before) * steps, share
            count = math.ceil(count / options.reduction)
        whole += options.seeds * options.finalists * steps
        return max(whole - done, 0) * self.state.seconds / done

    # -- what came out ------------------------------------------------------------------------------------------

    def _conclude(self) -> SearchResult:
        space, best = self.options.space, self.folder / BEST_NAME
        found = verdict(
            self.trials,
            self.options.metric,
            edges=space.edges,
            distributions=space.distributions(),
            order=space.order(),
        )
        source = self.folder / TRIALS / _name(found.best.number)
        made = record(
            found,
            self.trials,
            adapter=best if source.is_dir() else "",
            seconds=self.state.seconds,
            machine={
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "slots": self.state.slots,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "loraloom": loraloom.__version__,
            },
        )
        if source.is_dir():
            write_files(best, {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()})
        write_files(self.folder, {RESULT_NAME: json.dumps(made, indent=2, sort_keys=True).encode()})
        options = replace(found.best.options, output=str(self.folder / "full"))
        score = found.scores[found.best.number].mean
        title = f"The best of {self.options.trials} trials: {self.options.metric} {score:.4g}"
        runfile.write(options, self.folder / BEST_FILE, title)
        return SearchResult(found, made, self.folder)

    # -- what the space spans -----------------------------------------------------------------------------------

    def _combinations(self) -> list[LoraConfig]:
        """The adapters of every set of targets in the space, of the greatest rank."""
        knobs, values = self.options.space.knobs, self.options.space.prior(1)[0]
        if RANK in knobs:
            ranks = knobs[RANK]
            values |= {RANK: ranks.high if isinstance(ranks, Range) else max(ranks.grid(RANK))}
        sets: list[Any] = knobs[TARGETS].grid(TARGETS) if TARGETS in knobs else [None]
        chosen = [values if one is None else values | {TARGETS: one} for one in sets]
        return [self.loaded.config(self.trial_options(one, self.options.train.seed)) for one in chosen]


def _name(number: int) -> str:
    return f"trial-{number}"


def _blown_up(trial: Trial) -> str:
    """What there is to say of a loss that grew, or nothing."""
    losses = trial.curve.loss
    if len(losses) < 2 * WINDOW:
        return ""
    first, last = statistics.fmean(losses[:WINDOW]), statistics.fmean(losses[-WINDOW:])
    return f"step {trial.step}: the loss went up from {first:.3g} to {last:.3g}" if last > BLOWN_UP * first else ""


def _measured(trial: Trial) -> bool:
    return bool(trial.curve.evaluations) and trial.curve.evaluations[-1]["step"] == trial.step


def _used(model: PeftModel, name: str) -> dict[str, tuple[int, int, float]]:
    """Module → its rank, how many directions its update uses, and how large that is beside the frozen weight."""
    found = {}
    for module, layer in model.base_model.layers.items():
        if name not in layer.slots:
            continue
        a, b = layer.factors(name)
        values = singular_values(a.detach(), b.detach()) * abs(layer.scaling[name])
        energy = values.square()
        used = int((energy.cumsum(0) < ENERGY * energy.sum()).sum()) + 1 if float(energy.sum()) else 0
        weight = float(layer.frozen_weight.detach().float().norm())
        found[module] = (layer.r[name], used, float(energy.sum().sqrt()) / (weight or 1.0))
    return found


def _check_folder(folder: Path, options: TuneOptions) -> None:
    check_output(options.train)
    if options.train.overwrite:
        clear(folder)


def _check_validation(loaded: Loaded) -> None:
    """Rows that all have one answer cannot tell a good configuration from a poor one."""
    labels = {example.labels for example in loaded.data.evaluation.examples if isinstance(example.labels, int)}
    if loaded.task is TaskType.SEQ_CLS and len(labels) < 2:
        raise DataError(
            f"{loaded.options.eval_split if isinstance(loaded.options.eval_split, str) else loaded.options.data}: all "
            f"{len(loaded.data.evaluation.examples)} held-out rows are labelled "
            f"{loaded.data.names[labels.pop()]!r}, so no configuration can be told from another; hold out more rows"
        )


def _fingerprint(options: TuneOptions, loaded: Loaded) -> str:
    hashes = sorted(loaded.data.hashes.values())
    return hashlib.sha256(json.dumps([options.fingerprint(), hashes]).encode()).hexdigest()
