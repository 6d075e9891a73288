"""A rung is decided: trials are measured there as far as that is needed, and promoted or paused by the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from loraloom.messages import Message, OnEvent
from loraloom.tuning.asha import SuccessiveHalving, window
from loraloom.tuning.bar import Bar
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.race import LookBack, Race
from loraloom.tuning.ranking import goodness
from loraloom.tuning.rungs import Decision, Standing
from loraloom.tuning.selection import rows_trained
from loraloom.tuning.trial import Trial
from loraloom.tuning.worker import rung_step

#: A step's backward takes about as long as its forward, so a row measured costs this share of a row trained on.
FORWARD = 0.5


def new_rule(options: TuneConfig) -> Race:
    """Of a search, or an extension, that begins."""
    shares = options.rungs
    return Race(len(shares), options.reduction, options.finalists, shares=shares, budget=options.budget)


@dataclass
class Promotion:
    """The rungs of the ``originals``, all first trials of configurations that compete.

    ``earlier`` are those from before an extension. The new ones are compared with what they had at the same rungs.
    """

    options: TuneConfig
    rule: Race | SuccessiveHalving
    bar: Bar
    originals: Sequence[Trial]
    on_event: OnEvent
    earlier: Sequence[Trial] = ()

    def decide(self) -> bool:
        """Decide the open rung, or ask for measurements. False while trials are on their way to it."""
        rung = self.rule.open
        trials = {trial.number: trial for trial in self.originals}
        here = [trials[number] for number in self.rule.members(rung, trials)]
        here = [trial for trial in here if trial.state not in ("failed", "stopped")]
        share = self.options.rungs[rung]
        warm = max((warmup(trial) for trial in here), default=0.0)
        if len(here) <= self.rule.quota(len(here), len(here)) or share < warm:
            return self._promote_all(here)
        if any(trial.measure or not stands(self.options, trial, rung) for trial in here):
            return False
        off = {trial.number: self._off(trial, rung) for trial in here}
        if not any(off.values()):
            leader = self._leader(here, rung)
            if self._by_held_out and not leader.measured and leader.state == "waiting":
                return self._measure({leader.number: 0})
            constant = self.bar.base is not None
            self.on_event(Message("none_taken_off", share=share, trials=len(here), constant=constant))
            return self._promote_all(here)
        if len(here) <= self.rule.quota(len(here), sum(off.values())):
            return self._promote_all(here)
        if late := [trial for trial in here if not trial.measured and trial.state == "waiting"]:
            return self._measure({trial.number: 0 for trial in late})
        standings = {trial.number: self._standing(trial, rung, off[trial.number]) for trial in here}
        if isinstance(self.rule, Race) and (more := self.rule.ask(standings, self.bar.rows)):
            return self._measure(more)
        found = self.rule.decide(standings | self._earlier(rung, standings), self._left())
        found = Decision(*([n for n in part if n in standings] for part in (found.promoted, found.undecided)))
        self.rule.sent[rung] = found.promoted
        paused = [n for n in off if n not in found.promoted and trials[n].state == "waiting"]
        figures = {"trials": len(here), "promoted": found.promoted, "undecided": found.undecided, "paused": paused}
        self.on_event(Message("rung", share=share, taken_off=sum(off.values()), **figures))
        return self._promote(found.promoted)

    def look_back(self) -> bool:
        """At the end: let paused trials train to their end if what paused them did not hold. False if none does."""
        rule = self.rule
        if not isinstance(rule, Race) or rule.looked:
            return False
        trials = {trial.number: trial for trial in self.originals}
        past = []
        for rung in range(self.rule.rungs):
            there = [trials[number] for number in rule.members(rung, trials)]
            measured = [trial for trial in there if rung_step(self.options, trial, rung) in trial.rungs]
            past.append({trial.number: self._standing(trial, rung, self._off(trial, rung)) for trial in measured})
        ends = {trial.number: self._end(trial) for trial in self.originals if trial.state == "finished"}
        found = rule.look_back(past, ends, self._left())
        if found is None:
            return False
        resumed = [number for number in found.resumed if trials[number].state == "waiting"]
        for number in resumed:
            trials[number].goal = trials[number].steps
        self.on_event(overtaken(self.options, found))
        return bool(resumed)

    def resume_paused(self) -> bool:
        """If no finished trial has learned anything, those paused last train to their end as well."""
        trials = {trial.number: trial for trial in self.originals}
        chosen = [number for number in self.rule.resume(trials) if trials[number].state == "waiting"]
        if not chosen:
            return bool(self.rule.suspended(trials))
        for number in chosen:
            trials[number].goal = trials[number].steps
        self.on_event(Message("paused_resume", trials=chosen, **self.bar.figures(self.options.metric)))
        return True

    def _off(self, trial: Trial, rung: int) -> bool:
        """Whether its training loss is clearly below that of the bar; or its held-out loss, if known at this rung.

        Where a trial must leave its own first losses behind, those differ with the rows of each batch, and only the
        held-out loss shows early that it has.
        """
        step = rung_step(self.options, trial, rung)
        if self.bar.has_taken_off(trial.curve.loss[:step], trial.steps):
            return True
        if not self._by_held_out or step not in trial.rungs:
            return False
        return self.bar.is_beaten(trial.rungs[step]["loss"], self._rows(trial, step))

    @property
    def _by_held_out(self) -> bool:
        return self.bar.begins and isinstance(self.rule, Race)

    def _rows(self, trial: Trial, step: int) -> int:
        """Held-out rows that it was measured on at ``step``."""
        rows = next((e.get("rows") for e in trial.curve.evaluations[::-1] if e["step"] == step), None)
        return int(rows or self.bar.rows)

    def _leader(self, here: Sequence[Trial], rung: int) -> Trial:
        """The trial with the lowest training loss."""

        def recent(trial: Trial) -> float:
            step = rung_step(self.options, trial, rung)
            return fmean(trial.curve.loss[max(0, step - window(trial.steps)) : step])

        return min(here, key=lambda trial: (recent(trial), trial.number))

    def _standing(self, trial: Trial, rung: int, off: bool) -> Standing:
        step, metric = rung_step(self.options, trial, rung), self.options.metric
        if isinstance(self.rule, SuccessiveHalving):  # its searches kept no figures without each part
            last = trial.curve.evaluations[-1]
            return Standing(off, [last["loss"]], [goodness(metric, last[metric])])
        figures = trial.rungs.get(step) or trial.parts
        good = [goodness(metric, value) for value in figures[metric]]
        return Standing(off, figures["loss"], good, self._rows(trial, step), trial.parameters, fall(trial, step))

    def _earlier(self, rung: int, standings: Mapping[int, Standing]) -> dict[int, Standing]:
        """Earlier trials that were measured at ``rung`` on the rows of the others."""
        there = [trial for trial in self.earlier if rung_step(self.options, trial, rung) in trial.rungs]
        found = {trial.number: self._standing(trial, rung, self._off(trial, rung)) for trial in there}
        return {number: one for number, one in found.items() if one.rows == max(s.rows for s in standings.values())}

    def _end(self, trial: Trial) -> Standing:
        good = [goodness(self.options.metric, value) for value in trial.parts[self.options.metric]]
        return Standing(True, trial.parts["loss"], good, self.bar.rows, trial.parameters)

    def _left(self) -> float:
        """What is left of the budget, in trainings of one trial."""
        spent = 0.0
        for trial in self.originals:
            rows = sum(one.get("rows", self.bar.rows) for one in trial.curve.evaluations)
            spent += trial.step / trial.steps + FORWARD * rows / rows_trained(trial)
        return self.options.budget * len(self.originals) - spent

    def _measure(self, rows: Mapping[int, int]) -> bool:
        for trial in self.originals:
            if trial.number in rows:
                trial.measure, trial.rows = True, rows[trial.number]
        return False

    def _promote_all(self, here: Sequence[Trial]) -> bool:
        numbers = [trial.number for trial in here]
        self.rule.pass_all(numbers)
        return self._promote(numbers)

    def _promote(self, numbers: Sequence[int]) -> bool:
        """Let these train to the next rung at which a trial may be paused, or to their end."""
        rung = self.rule.open
        for trial in self.originals:
            if trial.number in numbers:
                trial.goal = trial.steps if rung == self.rule.rungs else rung_step(self.options, trial, rung)
        return True


def overtaken(options: TuneConfig, found: LookBack) -> Message:
    """What a search saw when it looked back."""
    figures = asdict(found)
    return Message("overtaken", share=options.rungs[figures.pop("rung")], **figures)


def stands(options: TuneConfig, trial: Trial, rung: int) -> bool:
    """True if it waits at ``rung`` or beyond, or has ended."""
    if trial.state in ("finished", "failed", "stopped"):
        return True
    return bool(options.rungs) and trial.state == "waiting" and trial.step >= rung_step(options, trial, rung)


def warmup(trial: Trial) -> float:
    """The share of its steps in which the rate rises."""
    given = trial.options.warmup_steps
    return trial.options.warmup_ratio if given is None else given / trial.steps


def fall(trial: Trial, step: int) -> float:
    """How far the training loss would fall in a whole training at the slope of the last two windows before ``step``."""
    count = min(window(trial.steps), step // 2)
    losses = trial.curve.loss[:step]
    return (fmean(losses[-2 * count : -count]) - fmean(losses[-count:])) * trial.steps / count if count else 0.0
