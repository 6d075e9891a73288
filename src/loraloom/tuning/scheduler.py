"""Which trial trains next: proposals, promotions at rungs, further seeds. Decides from measurements, trains nothing.

No decision depends on the clock, or on which trial came first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraloom.messages import Message, OnEvent
from loraloom.training.setup import Setup
from loraloom.tuning.asha import Standing, SuccessiveHalving
from loraloom.tuning.bar import Bar, learned
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.ranking import goodness
from loraloom.tuning.sampler import propose
from loraloom.tuning.state import State
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import TrialFactory, rung_step

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

#: Proposals that a sampler makes from the same knowledge, and the least number of first ones, which keeps the slots of
#: a small search busy.
PROPOSALS, FIRST = 16, 8


@dataclass
class Scheduler:
    """Decides for the search in ``state``, and changes it."""

    options: TuneConfig
    setup: Setup
    factory: TrialFactory
    state: State
    on_event: OnEvent
    sampler: BaseSampler | None = None
    #: the space has no further configuration
    exhausted: bool = False

    @property
    def trials(self) -> list[Trial]:
        return self.state.trials

    @property
    def originals(self) -> list[Trial]:
        """The configurations that compete: those of the last extension that began, else all."""
        return [trial for trial in self.configurations if trial.number >= self.state.first]

    @property
    def configurations(self) -> list[Trial]:
        """First seeds alone."""
        return [trial for trial in self.trials if trial.repeats is None]

    @property
    def bar(self) -> Bar:
        assert self.state.bar is not None
        return self.state.bar

    def next(self, held: Collection[int]) -> Trial | None:
        """A waiting trial that is to train or to be measured, preferably one that a worker holds already."""
        while self._decided():
            pass
        ready = [t for t in self.trials if t.state == "waiting" and (t.measure or t.step < (t.goal or t.steps))]
        return min(ready, key=lambda trial: (trial.number not in held, trial.number), default=None)

    def _decided(self) -> bool:
        """Take one decision, if what is known allows it."""
        return self._advanced() or self._begin_extension()

    def _advanced(self) -> bool:
        originals, halving = self.originals, self.state.halving
        if not self.exhausted and len(originals) < self._wanted:
            return all(self._stands(trial, 0) for trial in originals) and self._propose()
        if halving.open < halving.rungs:
            return self._decide_rung(halving.open)
        paused = halving.suspended([trial.number for trial in originals])
        if any(trial.state in ("running", "waiting") and trial.number not in paused for trial in self.trials):
            return False
        if any(trial.repeats is not None and trial.number >= self.state.first for trial in self.trials):
            return False
        finished = [trial for trial in self.configurations if self._learned(trial)]
        return self._add_repeats(finished) if finished else self._resume_paused()

    def _stands(self, trial: Trial, rung: int) -> bool:
        """True if it waits at ``rung`` or beyond, or has ended."""
        if trial.state in ("finished", "failed", "stopped"):
            return True
        return bool(self.options.rungs) and trial.state == "waiting" and trial.step >= self._rung_step(trial, rung)

    def _rung_step(self, trial: Trial, rung: int) -> int:
        return rung_step(self.options, trial, rung)

    # -- extensions -------------------------------------------------------------------------------------------------

    def _begin_extension(self) -> bool:
        """Begin the next extension, once nothing is left to train of what was there before."""
        event = next((event for event in self.state.of_kind("extend") if event["first"] is None), None)
        if event is None:
            return False
        paused = self.state.halving.suspended([trial.number for trial in self.originals])
        if any(trial.state in ("running", "waiting") and trial.number not in paused for trial in self.trials):
            return False
        self.give_up_waiting()
        event["first"], self.exhausted = len(self.trials), False
        self.state.halving = SuccessiveHalving(len(self.options.rungs), self.options.reduction, self.options.finalists)
        return True

    def give_up_waiting(self) -> None:
        """Nothing is left to train: those that wait at a rung are stopped there."""
        for trial in self.trials:
            if trial.state == "waiting":
                trial.state, trial.reason = "stopped", f"others were better at step {trial.step}"

    @property
    def _wanted(self) -> int:
        """How many configurations compete when all are proposed."""
        begun = self.state.begun
        return self.options.trials if begun is None else int(begun["trials"])

    # -- proposals --------------------------------------------------------------------------------------------------

    def _propose(self) -> bool:
        """The next proposals, all from the same knowledge: they do not depend on which trial came to a rung first."""
        before, trials, there = len(self.originals), self._wanted, len(self.trials)
        count = trials
        if self.sampler is not None or self.options.sampler == "tpe":
            count = max(PROPOSALS, trials // 4) if before else max((trials + 1) // 2, FIRST)
        known = self._in_space()
        for _ in range(min(count, trials - before)):
            values = propose(self.options, [*known, *self.trials[there:]], self.sampler, self._favoured)
            if values is None:
                self.exhausted = True
                break
            trial = self._add(values, self.options.train.seed)
            trial.goal = self._rung_step(trial, 0) if self.options.rungs else trial.steps
        return True

    def _in_space(self) -> list[Trial]:
        """The trials that lie in the space, which another one may have been before."""
        if all(event["before"]["space"] == self.state.extent["space"] for event in self.state.of_kind("extend")):
            return list(self.trials)
        seen = [(trial, self.factory.in_space(trial)) for trial in self.trials]
        return [replace(trial, values=values) for trial, values in seen if values is not None]

    @property
    def _favoured(self) -> int | None:
        """How many known good configurations are proposed first: an extension has measured better ones already."""
        begun = self.state.begun
        if begun is None:
            return None
        return (self._wanted + 1) // 2 if begun["before"]["space"] != self.state.extent["space"] else 0

    def _add(self, values: Mapping[str, Any], seed: int, repeats: int | None = None) -> Trial:
        if repeats is None:
            options = self.factory.trial_options(values, seed)
        else:  # which may be of an earlier space
            options = replace(self.trials[repeats].options, seed=seed)
        steps, _ = self.setup.steps_of(options)
        made = self.factory.plan(self.setup.config(options))
        trial = Trial(len(self.trials), dict(values), options, steps, repeats=repeats)
        trial.parameters, trial.bytes = made.parameters, made.bytes
        trial.unadapted = str(made.experts) if made.experts.weights else ""
        self.trials.append(trial)
        return trial

    def _add_repeats(self, finished: Sequence[Trial]) -> bool:
        """Train the best of those that learned again with other seeds, to know the noise."""

        def order(trial: Trial) -> tuple[float, int, int]:
            value = trial.latest(self.options.metric)
            return -goodness(self.options.metric, math.nan if value is None else value), trial.parameters, trial.number

        if not self.options.seeds:
            return False
        finalists = sorted(finished, key=order)[: self.options.finalists]
        there = {(trial.repeats, trial.options.seed) for trial in self.trials}
        seeds = [self.options.train.seed + further for further in range(1, self.options.seeds + 1)]
        missing = [(trial, seed) for seed in seeds for trial in finalists if (trial.number, seed) not in there]
        for trial, seed in missing:
            self._add(trial.values, seed, repeats=trial.number)
        if not missing:
            return False
        self.on_event(Message("finalists", trials=[t.number for t in finalists], seeds=self.options.seeds))
        return True

    # -- rungs ------------------------------------------------------------------------------------------------------

    def _decide_rung(self, rung: int) -> bool:
        halving, options = self.state.halving, self.options
        here = [self.trials[n] for n in halving.members(rung, [trial.number for trial in self.originals])]
        here = [trial for trial in here if trial.state not in ("failed", "stopped")]
        numbers = [trial.number for trial in here]
        warm = max((self._warmup(trial) for trial in here), default=0.0)
        if len(here) <= halving.quota(len(here)) or options.rungs[rung] < warm:
            return self._promote_all(numbers)
        if not all(self._stands(trial, rung) for trial in here):
            return False
        off = {trial.number: self._off(trial, rung) for trial in here}
        share, constant = options.rungs[rung], self.bar.base is not None
        if not any(off.values()):
            self.on_event(Message("none_taken_off", share=share, trials=len(here), constant=constant))
            return self._promote_all(numbers)
        if late := [trial for trial in here if not trial.measured and trial.state == "waiting"]:
            for trial in late:
                trial.measure = True
            return False
        promoted = halving.decide({trial.number: self._standing(trial, off[trial.number]) for trial in here})
        paused = [n for n in numbers if n not in promoted and self.trials[n].state == "waiting"]
        figures = {"trials": len(here), "reduction": options.reduction, "promoted": promoted, "paused": paused}
        self.on_event(Message("rung", share=share, taken_off=sum(off.values()), **figures))
        return self._promote(promoted)

    def _off(self, trial: Trial, rung: int) -> bool:
        return self.bar.has_taken_off(trial.curve.loss[: self._rung_step(trial, rung)], trial.steps)

    def _standing(self, trial: Trial, off: bool) -> Standing:
        last = trial.curve.evaluations[-1]
        return Standing(off, last["loss"], goodness(self.options.metric, last[self.options.metric]))

    def _warmup(self, trial: Trial) -> float:
        """The share of its steps in which the rate rises."""
        given = trial.options.warmup_steps
        return trial.options.warmup_ratio if given is None else given / trial.steps

    def _promote_all(self, numbers: Sequence[int]) -> bool:
        self.state.halving.pass_all(numbers)
        return self._promote(numbers)

    def _promote(self, numbers: Sequence[int]) -> bool:
        """Let these train to the next rung at which a trial may be paused, or to their end."""
        halving = self.state.halving
        rung = halving.open
        for number in numbers:
            trial = self.trials[number]
            trial.goal = trial.steps if rung == halving.rungs else self._rung_step(trial, rung)
        return True

    def _resume_paused(self) -> bool:
        """If no finished trial has learned anything, those paused last train to their end as well."""
        originals = [trial.number for trial in self.originals]
        chosen = [n for n in self.state.halving.resume(originals) if self.trials[n].state == "waiting"]
        if not chosen:
            return bool(self.state.halving.suspended(originals))
        for number in chosen:
            self.trials[number].goal = self.trials[number].steps
        self.on_event(Message("paused_resume", trials=chosen, **self.bar.figures(self.options.metric)))
        return True

    def _learned(self, trial: Trial) -> bool:
        return trial.state == "finished" and learned(self.bar, [trial], self.options.metric, len(self.configurations))

    # -- the time left ----------------------------------------------------------------------------------------------

    def seconds_left(self) -> float | None:
        """Seconds for the steps that successive halving leaves, at the speed so far; None before the first step."""
        done = sum(trial.step for trial in self.trials)
        if not done or not self.state.seconds:
            return None
        steps, options = statistics.median(trial.steps for trial in self.trials), self.options
        count, before = float(self._wanted), 0.0
        whole = float(sum(trial.step for trial in self.trials if trial.number < self.state.first))
        for rung, share in enumerate([*options.rungs, 1.0]):
            whole, before = whole + count * (share - before) * steps, share
            if rung < self.state.halving.rungs:
                promoted = self.state.halving.sent[rung]
                quota = self.state.halving.quota(math.ceil(count))
                count = quota if promoted is None else len(promoted)
        whole += options.seeds * options.finalists * steps
        return max(whole - done, 0) * self.state.seconds / done
