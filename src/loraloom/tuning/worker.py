"""A worker trains and evaluates trials in one pack. It decides nothing, and writes nothing but adapters.

A search has one worker in its own process, or several in others.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loraloom.config.keys import OPTIONS
from loraloom.config.lora import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.engine.loop import advance
from loraloom.engine.pack import Pack
from loraloom.engine.slot import Slot
from loraloom.engine.slot_state import SlotState
from loraloom.errors import AdapterError, SaveError
from loraloom.files.atomic import write_files
from loraloom.inference.evaluation import Evaluator
from loraloom.lora.inspection import singular_values, used_rank
from loraloom.lora.model import PeftModel
from loraloom.lora.parameters import LoraParameter
from loraloom.lora.targets import Plan, plan
from loraloom.models import activation_checkpointing
from loraloom.training.failures import explain
from loraloom.training.setup import Setup
from loraloom.training.usage import usage_files
from loraloom.tuning.bar import Bar
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.params import Range, label
from loraloom.tuning.space import RANK, TARGETS, Space
from loraloom.tuning.state import TRIALS
from loraloom.tuning.trial import Trial

BATCH = "train.batch_size"
#: An adapter in every layer that any trial may adapt. No batch uses it: it keeps the layers wrapped while trials come
#: and go, so that what is computed together does not depend on the trials present.
SPAN = "span"
#: Rows are padded to a multiple of this many tokens, so that a trial's bits do not depend on the others in the pack.
WIDTH = 16
#: A report comes at least this often.
SECONDS = 60.0
#: A trial diverges if its mean loss over ``WINDOW`` steps is ``BLOWN_UP`` times its starting loss. At a very high rate
#: the first losses are high already, so the starting loss is at most that of the best constant answer, or ``EASY``
#: times the loss of the first step, which is measured before any update. (One batch may be easy.)
WINDOW, BLOWN_UP, EASY = 10, 2.0, 3.0
#: At a rung a trial is evaluated on as many rows as it has seen in training, but at least on this many, if there are as
#: many: evaluating many trials on all rows early would take longer than training them.
RUNG_ROWS = 256
#: The share of the steps at which there is an evaluation between the last rung and the end, for the curve.
BETWEEN = 2 / 3


@dataclass
class Report:
    """A worker's trials as they are now, with the states of their slots."""

    trials: list[Trial]
    #: trials that reached the step where they are held, were evaluated there, or failed
    events: list[int]
    states: dict[int, SlotState] = field(default_factory=dict)
    tokens: int = 0
    #: positions that were computed for them, padding included
    places: int = 0
    seconds: float = 0.0
    #: out of memory: the worker removed all its trials
    out_of_memory: bool = False


class TrialFactory:
    """Options and sizes of trials, computed on the model without its weights."""

    def __init__(self, options: TuneConfig, setup: Setup) -> None:
        self.options, self.setup = options, setup
        self._blueprint = setup.empty()

    def trial_options(
        self, values: Mapping[str, Any], seed: int, space: Mapping[str, Any] | None = None
    ) -> TrainConfig:
        """The options of ``values`` in the space of the search, or in an earlier ``space`` as it was given."""
        found = self.options.space if space is None else Space.parse(space, self.options.train)
        return replace(found.to_options(values, self.options.train, self._blueprint), seed=seed)

    def in_space(self, trial: Trial) -> dict[str, Any] | None:
        """The values with which ``trial`` lies in the space of the search, which may be another than its own."""
        values = {}
        for key, param in self.options.space.params.items():
            section = trial.options.lora if key.startswith("lora.") else trial.options
            value = trial.values[key] if key in trial.values else label(getattr(section, OPTIONS[key].name))
            if not param.holds(value):
                return None
            values[key] = value
        return values if self.trial_options(values, trial.options.seed) == trial.options else None

    def plan(self, config: LoraConfig) -> Plan:
        return plan(self._blueprint, config)

    def largest(self) -> list[LoraConfig]:
        """For each set of targets in the space, the adapter of the largest rank."""
        params, values = self.options.space.params, self.options.space.prior(1)[0]
        if RANK in params:
            ranks = params[RANK]
            values |= {RANK: ranks.high if isinstance(ranks, Range) else max(ranks.grid(RANK))}
        sets: list[Any] = params[TARGETS].grid(TARGETS) if TARGETS in params else [None]
        chosen = [values if one is None else values | {TARGETS: one} for one in sets]
        return [self.setup.config(self.trial_options(one, self.options.train.seed)) for one in chosen]

    def widest(self) -> Setup:
        """The setup with the largest batch size of the space."""
        param = self.options.space.params.get(BATCH)
        fixed = self.options.space.fixed.get(BATCH, self.options.train.batch_size)
        most = fixed if param is None else param.high if isinstance(param, Range) else max(param.grid(BATCH))
        return replace(self.setup, options=replace(self.setup.options, batch_size=int(most)))


class Worker:
    """A pack on the frozen model of ``setup``."""

    def __init__(self, options: TuneConfig, setup: Setup, factory: TrialFactory) -> None:
        self.options, self.setup, self.factory = options, setup, factory
        self.model = setup.model
        span = {(target.name, target.kind) for one in factory.largest() for target in factory.plan(one).targets}
        modules = sorted(name for name, kind in span if kind != LoraParameter.kind)
        parameters = sorted(name for name, kind in span if kind == LoraParameter.kind)
        config = LoraConfig(r=1, target_modules=modules, target_parameters=parameters, task_type=setup.task.task_type)
        self.model.add_adapter(SPAN, config)
        if options.train.gradient_checkpointing:
            activation_checkpointing.enable(self.model)
        self.pack = Pack(self.model, task=setup.task, pad_id=setup.tokenizer.pad_token_id, pad_to_multiple_of=WIDTH)
        self.slots: dict[int, Slot] = {}
        self.trials: dict[int, Trial] = {}
        self._evaluators: dict[int | None, Evaluator] = {}
        #: what trials have to beat; set by the executor
        self.bar = Bar(len(setup.data.validation_rows))

    def run(
        self,
        enter: Sequence[tuple[Trial, SlotState | None]],
        leave: Sequence[int],
        on_trials: Callable[[list[Trial], float], None] = lambda trials, tokens_per_second: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Report:
        """Remove and add trials, then train until there is something to decide or to save.

        Args:
            enter: trials with the states of their slots. None for a trial that begins, or that is in the pack already
                and only gets another goal.
            leave: numbers of trials to remove.
            on_trials: called after each step with the trials in the pack and the tokens per second.
            stop: called after each step; True ends the run.
        """
        started = last = time.monotonic()
        tokens, places, events = 0, self.pack.places, list[int]()
        try:
            for number in leave:
                self._leave(number)
            for trial, saved in enter:
                if (known := self.trials.get(trial.number)) is None:
                    self._enter(trial, saved)
                else:
                    known.state, known.goal = trial.state, trial.goal
                    known.measure, known.rows = trial.measure, trial.rows
            last = time.monotonic()
            for number in (events := [number for number, trial in self.trials.items() if trial.measure]):
                self._measure(self.trials[number])
            while not events and self.slots:
                seen = advance(self.pack, [self.slots[number] for number in sorted(self.slots)])
                now = time.monotonic()
                passed, last, tokens = now - last, now, tokens + seen
                events = [number for number in self.slots if self._follow(number, passed / len(self.slots))]
                on_trials(list(self.trials.values()), seen / max(passed, 1e-9))
                if stop() or now - started > SECONDS:
                    break
        except (RuntimeError, MemoryError) as error:
            if not explain(error).startswith("out of memory"):
                raise
            for name in set(self.pack.adapters) - {SPAN}:
                self.pack.remove(name)
            self.slots, self.trials = {}, {}
            return Report([], [], seconds=time.monotonic() - started, out_of_memory=True)
        states = {number: slot.state_dict() for number, slot in self.slots.items()}
        places = self.pack.places - places
        return Report(list(self.trials.values()), events, states, tokens, places, time.monotonic() - started)

    def _follow(self, number: int, seconds: float) -> bool:
        """Update a trial after its slot's forward. True if something is to be decided about it."""
        trial, slot = self.trials[number], self.slots[number]
        moved, trial.step = slot.step > trial.step, slot.step
        trial.seconds += seconds
        failure = slot.failure or (blown_up(trial, self.bar.base) if moved else "")
        if failure:
            trial.state, trial.reason = "failed", failure
            return True
        held = trial.step == (trial.goal or trial.steps)
        # A trial that has taken off will be compared at this rung: evaluate it while it is in the pack.
        off = held and self.bar.has_taken_off(trial.curve.loss, trial.steps)
        if moved and (off or trial.step in (between(trial), trial.steps)):
            self._measure(trial)
        return trial.state != "running" or (moved and held)

    def _measure(self, trial: Trial) -> None:
        name, metric = name_of(trial.number), self.options.metric
        ends, rows = trial.step >= trial.steps, self._rows(trial)
        evaluator = self._evaluator(rows)
        (figures,) = evaluator.figures([name], evaluator.parts)
        if ends:
            trial.parts = figures
        else:
            trial.rungs[trial.step] = {key: figures[key] for key in dict.fromkeys(("loss", metric))}
        if trial.measured:  # on fewer rows
            trial.curve.evaluations.pop()
        trial.measure, trial.rows = False, 0
        found = {key: values[0] for key, values in figures.items()}
        trial.curve.evaluations.append({"step": trial.step, **found} | ({} if rows is None else {"rows": rows}))
        # An argmax over NaN still gives a class, so accuracy alone does not reveal them.
        if broken := [name for name in (metric, "loss") if not math.isfinite(found[name])]:
            trial.state, trial.reason = "failed", f"step {trial.step}: the held-out {broken[0]} is {found[broken[0]]}"
        elif ends:
            trial.state, trial.used = "finished", _used(self.model, name)
            folder = Path(self.options.train.output) / TRIALS
            self.model.save_pretrained(folder, selected_adapters=[name], peft=False)
            write_files(folder / name, usage_files(self.setup))

    def _rows(self, trial: Trial) -> int | None:
        """How many held-out rows ``trial`` is measured on at its step; None for all."""
        if trial.step >= trial.steps:
            return None
        count = trial.rows or self._usual_rows(trial)
        return count if count < len(self._order) else None

    def _usual_rows(self, trial: Trial) -> int:
        """The same for all trials at a rung."""
        rungs = [rung for rung in range(len(self.options.rungs)) if rung_step(self.options, trial, rung) == trial.step]
        if trial.repeats is not None or trial.step == between(trial) or not rungs:
            return len(self._order)
        options = self.setup.options
        steps, _ = self.setup.steps_of(options)
        seen = steps * options.batch_size * options.gradient_accumulation_steps
        return max(RUNG_ROWS, *(math.ceil(self.options.rungs[rung] * seen) for rung in rungs))

    def _evaluator(self, rows: int | None) -> Evaluator:
        """Of the first ``rows`` held-out rows in random order, or of all; made once, for it inspects the model."""
        if rows not in self._evaluators:
            self._evaluators[rows] = self.setup.evaluator(None if rows is None else self._examples(rows))
        return self._evaluators[rows]

    def _examples(self, rows: int) -> list[int]:
        """Numbers of the examples of the first ``rows`` held-out rows in random order."""
        return sorted(number for row in self._order[:rows] for number in row)

    @cached_property
    def _order(self) -> list[list[int]]:
        """Numbers of the examples of each held-out row, the rows in random but fixed order: few are a part of more."""
        by_row = defaultdict[int, list[int]](list)
        for number, row in enumerate(self.setup.data.validation_rows.of.tolist()):
            by_row[row].append(number)
        return random.Random("rung").sample(list(by_row.values()), len(by_row))

    def _enter(self, trial: Trial, saved: SlotState | None) -> None:
        name = name_of(trial.number)
        self.pack.add(name, self.setup.config(trial.options), seed=trial.options.seed)
        slot = self.setup.slot(name, trial.options, trial.steps)
        if saved is not None:
            try:
                slot.load_state_dict(saved)
            except AdapterError as error:
                raise SaveError(f"trial {trial.number}: {error}; give --overwrite to start the search over") from None
        trial.curve = slot.curve
        self.slots[trial.number], self.trials[trial.number] = slot, trial

    def _leave(self, number: int) -> None:
        self.pack.remove(name_of(number))
        del self.slots[number], self.trials[number]


def name_of(number: int) -> str:
    return f"trial-{number}"


def rung_step(options: TuneConfig, trial: Trial, rung: int) -> int:
    """The step at which ``trial`` reaches ``rung``."""
    return min(max(1, math.ceil(options.rungs[rung] * trial.steps - 1e-9)), trial.steps)


def between(trial: Trial) -> int:
    return max(1, math.ceil(BETWEEN * trial.steps - 1e-9))


def blown_up(trial: Trial, base: float | None = None) -> str:
    """Why the trial counts as diverged, or an empty string. ``base`` is the loss of the best constant answer."""
    losses = trial.curve.loss
    if len(losses) < 2 * WINDOW:
        return ""
    limit = EASY * losses[0] if base is None else max(losses[0], base)
    first, last = min(statistics.fmean(losses[:WINDOW]), limit), statistics.fmean(losses[-WINDOW:])
    return f"step {trial.step}: the loss went up from {first:.3g} to {last:.3g}" if last > BLOWN_UP * first else ""


def _used(model: PeftModel, name: str) -> dict[str, tuple[int, int, float]]:
    """Module → its rank, the rank its update uses, and the norm of the update over that of the frozen weight."""
    found = {}
    for module, layer in model.base_model.lora_layers.items():
        if name not in layer.slots:
            continue
        a, b = layer.factors(name)
        experts = layer.experts if isinstance(layer, LoraParameter) else 1
        values = singular_values(a.detach(), b.detach(), experts) * layer.scaling[name]
        weight = float(layer.rows().float().norm())
        found[module] = (layer.r[name], used_rank(values), float(values.square().sum().sqrt()) / (weight or 1.0))
    return found
