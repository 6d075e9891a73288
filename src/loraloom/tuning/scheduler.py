"""Which trial trains next: proposals, promotions at rungs, further seeds. Decides from measurements, trains nothing.

No decision depends on the clock, or on which trial came first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraloom.messages import Message, OnEvent
from loraloom.training.setup import Setup
from loraloom.tuning.bar import Bar, learned
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.promotion import Promotion, new_rule, stands
from loraloom.tuning.race import Race
from loraloom.tuning.repeats import Repeats
from loraloom.tuning.sampler import propose
from loraloom.tuning.state import State
from loraloom.tuning.steering import kept
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
        """A waiting trial that is to train or to be measured.

        Repeats get the slots that are left, for they may turn out to be of no use. Longer trainings start first, so
        that the last is not left alone; of equal ones those that a worker holds already.
        """
        self.decide()

        def order(trial: Trial) -> tuple[bool, bool, int, bool, int]:
            left = (trial.goal or trial.steps) - trial.step
            return not trial.measure, trial.repeats is not None, -left, trial.number not in held, trial.number

        ready = [t for t in self.trials if t.state == "waiting" and (t.measure or t.step < (t.goal or t.steps))]
        return min(ready, key=order, default=None)

    def decide(self) -> None:
        """Take every decision that what is known allows."""
        while self._begin_extension() if self.state.over else self._decided():
            pass

    def _decided(self) -> bool:
        """Take one decision, if what is known allows it."""
        return self._keep() or self._advanced() or self._begin_extension()

    def _advanced(self) -> bool:
        originals, halving = self.originals, self.state.halving
        if not self.exhausted and len(originals) < self._wanted:
            return all(stands(self.options, trial, 0) for trial in originals) and self._propose()
        if halving.open < halving.rungs:
            return self._promotion().decide()
        paused = self._paused()
        competing = [t for t in originals if t.state not in ("failed", "stopped") and t.number not in paused]
        repeats = Repeats(self.options, self.state, self._add, self.on_event)
        if self.state.leaders is None:
            return repeats.begin(competing)
        if any(trial.state != "finished" for trial in competing):
            return False
        finished = [trial for trial in self.configurations if self._learned(trial)]
        if finished and self._promotion().look_back():
            return True
        return repeats.settle(finished) or (not finished and self._promotion().resume_paused())

    # -- extensions, and what the user decides ------------------------------------------------------------------------

    def _begin_extension(self) -> bool:
        """Begin the next extension, once nothing is left to train of what was there before."""
        event = next((event for event in self.state.of_kind("extend") if event["first"] is None), None)
        if event is None or self.live():
            return False
        self.give_up_waiting()
        event["first"], event["seconds"], self.exhausted = len(self.trials), self.state.seconds, False
        self.state.leaders = None
        self.state.halving = new_rule(self.options)
        return True

    def _keep(self) -> bool:
        """Let trials that the user keeps train to their end where they are paused."""
        paused = self._paused()
        chosen = [self.trials[n] for n in sorted(kept(self.state)) if n in paused and self.trials[n].state == "waiting"]
        for trial in chosen:
            trial.goal = trial.steps
            self.state.halving.resumed.append(trial.number)
            self.on_event(Message("kept", trial=trial.number, step=trial.step))
        return bool(chosen)

    def _paused(self) -> dict[int, int]:
        """Trial → the rung at which it is paused."""
        return self.state.halving.suspended([trial.number for trial in self.originals])

    def live(self) -> list[Trial]:
        """Trials that train or are going to, without those that are paused."""
        paused = self._paused()
        live = [trial for trial in self.trials if trial.state in ("running", "waiting")]
        return [trial for trial in live if trial.number not in paused or trial.step < trial.goal]

    def obey_clock(self) -> None:
        """Once the time is over: let those train to their end that can finish, and stop the others."""
        if not self.state.over:
            return
        finish = self.state.of_kind("clock")[-1]["finish"]
        for trial in self.live():
            if trial.number in finish:
                trial.goal = trial.steps
            else:
                trial.state, trial.reason = "stopped", f"the time was over at step {trial.step}"

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
            by_rank = isinstance(self.state.halving, Race)
            values = propose(self.options, [*known, *self.trials[there:]], self.sampler, self._favoured, by_rank)
            if values is None:
                self.exhausted = True
                break
            trial = self._add(values, self.options.train.seed)
            trial.goal = rung_step(self.options, trial, 0) if self.options.rungs else trial.steps
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

    # -- rungs ------------------------------------------------------------------------------------------------------

    def _promotion(self) -> Promotion:
        earlier = [trial for trial in self.configurations if trial.number < self.state.first]
        return Promotion(self.options, self.state.halving, self.bar, self.originals, self.on_event, earlier)

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
