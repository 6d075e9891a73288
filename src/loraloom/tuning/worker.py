"""One pack and the trials in it: lets them in and out, trains, measures. Decides nothing, and writes adapters alone.

A search has one in its own process, or several in others.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraloom.config.lora import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.engine.loop import advance
from loraloom.engine.pack import Pack
from loraloom.engine.slot import Slot
from loraloom.engine.slot_state import SlotState
from loraloom.errors import AdapterError, SaveError
from loraloom.files.atomic import write_files
from loraloom.lora.inspection import ENERGY, singular_values
from loraloom.lora.model import PeftModel
from loraloom.lora.parameters import LoraParameter
from loraloom.lora.targets import Plan, plan
from loraloom.models import activation_checkpointing
from loraloom.training.failures import explain
from loraloom.training.setup import Setup
from loraloom.training.usage import usage_files
from loraloom.tuning.bar import Bar
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.params import Range
from loraloom.tuning.space import RANK, TARGETS
from loraloom.tuning.state import TRIALS
from loraloom.tuning.trial import Trial

BATCH = "train.batch_size"
#: An adapter in every layer that some trial may adapt. It is never used: it keeps the layers as they are while trials
#: come and go, so that what is computed together does not depend on which ones there are.
SPAN = "span"
#: Rows are filled up to a multiple of so many tokens, so that a trial's bits do not depend on who trains beside it.
WIDTH = 16
#: Numbers are handed over at least so often.
SECONDS = 60.0
#: A trial diverges if its mean loss over ``WINDOW`` steps is ``BLOWN_UP`` times its starting loss. At a very high rate
#: the first losses are high already, so the starting loss is at most that of the best constant answer, or ``EASY``
#: times the loss of the first step, which is measured before any update. (One batch may be easy.)
WINDOW, BLOWN_UP, EASY = 10, 2.0, 3.0
#: At a rung a trial is measured on as many rows as a training comes to see by then, on these at least, and on all where
#: there are no more: measuring many that have hardly begun would take longer than training them.
RUNG_ROWS = 256
#: Between the last rung and the end there is one more evaluation: curves of two points say nothing.
BETWEEN = 2 / 3


@dataclass
class Report:
    """What a worker hands over: its trials as they are now, and the states of their slots."""

    trials: list[Trial]
    #: of these something is to be decided: they came to where they are held, were measured there, or failed
    events: list[int]
    states: dict[int, SlotState] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    #: memory was not enough: the worker let go of all its trials
    out_of_memory: bool = False


class TrialFactory:
    """What trials are on one model, without its weights: their options, sizes and steps."""

    def __init__(self, options: TuneConfig, setup: Setup) -> None:
        self.options, self.setup = options, setup
        self._blueprint = setup.empty()

    def trial_options(self, values: Mapping[str, Any], seed: int) -> TrainConfig:
        return replace(self.options.space.to_options(values, self.options.train, self._blueprint), seed=seed)

    def plan(self, config: LoraConfig) -> Plan:
        return plan(self._blueprint, config)

    def largest(self) -> list[LoraConfig]:
        """The adapters of every set of targets in the space, of the greatest rank."""
        params, values = self.options.space.params, self.options.space.prior(1)[0]
        if RANK in params:
            ranks = params[RANK]
            values |= {RANK: ranks.high if isinstance(ranks, Range) else max(ranks.grid(RANK))}
        sets: list[Any] = params[TARGETS].grid(TARGETS) if TARGETS in params else [None]
        chosen = [values if one is None else values | {TARGETS: one} for one in sets]
        return [self.setup.config(self.trial_options(one, self.options.train.seed)) for one in chosen]

    def widest(self) -> Setup:
        """Rows and model, with as many rows in a forward as any trial may have."""
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
        #: what trials have to beat; its owner sets it
        self.bar = Bar(len(setup.data.validation_rows))

    def run(
        self,
        enter: Sequence[tuple[Trial, SlotState | None]],
        leave: Sequence[int],
        tell: Callable[[list[Trial], float], None] = lambda trials, tokens_per_second: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Report:
        """Let trials out and in, and train until there is something to decide, or to write down.

        Args:
            enter: trials with the states of their slots; None for one that begins, or is in the pack already: that one
                only learns how far it trains.
            tell: called after each step with the running trials and the tokens of a second.
            stop: asked after each step.
        """
        started = last = time.monotonic()
        tokens, events = 0, list[int]()
        try:
            for number in leave:
                self._leave(number)
            for trial, saved in enter:
                if (known := self.trials.get(trial.number)) is None:
                    self._enter(trial, saved)
                else:
                    known.state, known.goal, known.measure = trial.state, trial.goal, trial.measure
            last = time.monotonic()
            for number in (events := [number for number, trial in self.trials.items() if trial.measure]):
                self._measure(self.trials[number])
            while not events and self.slots:
                seen = advance(self.pack, [self.slots[number] for number in sorted(self.slots)])
                now = time.monotonic()
                passed, last, tokens = now - last, now, tokens + seen
                events = [number for number in self.slots if self._follow(number, passed / len(self.slots))]
                tell(list(self.trials.values()), seen / max(passed, 1e-9))
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
        return Report(list(self.trials.values()), events, states, tokens, time.monotonic() - started)

    def _follow(self, number: int, seconds: float) -> bool:
        """Bring a trial up to its slot. Whether something is to be decided of it."""
        trial, slot = self.trials[number], self.slots[number]
        moved, trial.step = slot.step > trial.step, slot.step
        trial.seconds += seconds
        failure = slot.failure or (blown_up(trial, self.bar.base) if moved else "")
        if failure:
            trial.state, trial.reason = "failed", failure
            return True
        held = trial.step == (trial.goal or trial.steps)
        # One that has taken off will be compared where it is held: it is measured while it is here.
        off = held and self.bar.has_taken_off(trial.curve.loss, trial.steps)
        if moved and (off or trial.step in (between(trial), trial.steps)):
            self._measure(trial)
        return trial.state != "running" or (moved and held)

    def _measure(self, trial: Trial) -> None:
        name, metric = name_of(trial.number), self.options.metric
        trial.measure = False
        if trial.step >= trial.steps:
            (trial.parts,) = self.setup.evaluator().figures([name], self.setup.parts)
            rows, found = None, {key: values[0] for key, values in trial.parts.items()}
        else:
            rows = self._rows(trial)
            (found,) = self.setup.evaluator(rows).metrics([name])
        trial.curve.evaluations.append({"step": trial.step, **found} | ({} if rows is None else {"rows": len(rows)}))
        # Of logits that are NaN some class is still the likeliest: the accuracy alone does not tell.
        if broken := [name for name in (metric, "loss") if not math.isfinite(found[name])]:
            trial.state, trial.reason = "failed", f"step {trial.step}: the held-out {broken[0]} is {found[broken[0]]}"
        elif trial.step >= trial.steps:
            trial.state, trial.used = "finished", _used(self.model, name)
            folder = Path(self.options.train.output) / TRIALS
            self.model.save_pretrained(folder, selected_adapters=[name], peft=False)
            write_files(folder / name, usage_files(self.setup))

    def _rows(self, trial: Trial) -> list[int] | None:
        """The held-out rows to measure ``trial`` on, the same for all at a rung; None for all there are."""
        if trial.repeats is not None or trial.step == between(trial):
            return None
        rungs = [rung for rung in range(len(self.options.rungs)) if rung_step(self.options, trial, rung) == trial.step]
        there = len(self.setup.data.validation.examples)
        options = self.setup.options
        steps, _ = self.setup.steps_of(options)
        seen = steps * options.batch_size * options.gradient_accumulation_steps
        count = max(RUNG_ROWS, *(math.ceil(self.options.rungs[rung] * seen) for rung in rungs)) if rungs else there
        return sorted(random.Random("rung").sample(range(there), count)) if count < there else None

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
    """The step at which ``trial`` comes to ``rung``."""
    return min(max(1, math.ceil(options.rungs[rung] * trial.steps - 1e-9)), trial.steps)


def between(trial: Trial) -> int:
    return max(1, math.ceil(BETWEEN * trial.steps - 1e-9))


def blown_up(trial: Trial, base: float | None = None) -> str:
    """What there is to say of a loss that grew, or nothing. ``base`` is the loss of the best constant answer."""
    losses = trial.curve.loss
    if len(losses) < 2 * WINDOW:
        return ""
    limit = EASY * losses[0] if base is None else max(losses[0], base)
    first, last = min(statistics.fmean(losses[:WINDOW]), limit), statistics.fmean(losses[-WINDOW:])
    return f"step {trial.step}: the loss went up from {first:.3g} to {last:.3g}" if last > BLOWN_UP * first else ""


def _used(model: PeftModel, name: str) -> dict[str, tuple[int, int, float]]:
    """Module → its rank, how many directions its update uses, and how large that is beside the frozen weight."""
    found = {}
    for module, layer in model.base_model.lora_layers.items():
        if name not in layer.slots:
            continue
        a, b = layer.factors(name)
        experts = layer.experts if isinstance(layer, LoraParameter) else 1
        energy = (singular_values(a.detach(), b.detach(), experts) * layer.scaling[name]).square()
        used = int((energy.cumsum(0) < ENERGY * energy.sum()).sum()) + 1 if float(energy.sum()) else 0
        weight = float(layer.rows().float().norm())
        found[module] = (layer.r[name], used, float(energy.sum().sqrt()) / (weight or 1.0))
    return found
