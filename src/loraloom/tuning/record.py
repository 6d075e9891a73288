"""``result.json``: what a search came to, as one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraloom.engine.slot import Curve
from loraloom.files.jsonio import plain
from loraloom.inference.jackknife import error
from loraloom.messages import Describe, Message
from loraloom.tuning.bar import Gain
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import Verdict

#: Files without a format are of loraloom 0.1.
FORMAT = 1


@dataclass(frozen=True)
class BestRecord:
    """The recommended configuration."""

    config: dict[str, Any]
    metric: float
    adapter: str
    metric_name: str
    number: int
    noise: float | None
    #: seed → metric
    seeds: dict[int, float]
    tie: bool
    why: Message
    runner_up: int | None
    notes: list[Message]
    unadapted_experts: str | None
    #: all options of its training
    options: dict[str, Any]


@dataclass(frozen=True)
class TrialRecord:
    """One trial."""

    number: int
    config: dict[str, Any]
    state: str
    curve: Curve
    metric: float | None
    noise: float | None
    seconds: float
    steps: int
    of_steps: int
    seed: int
    repeats: int | None
    parameters: int
    bytes: int
    reason: str
    #: module → (rank, directions used, norm of the update over that of the weight)
    used: dict[str, tuple[int, int, float]]
    #: metric → its standard error by the held-out rows
    error: dict[str, float]


@dataclass(frozen=True)
class SearchRecord:
    """A whole search. ``best`` and ``to_beat`` are None if no configuration is recommended, or no bar was measured."""

    learned: bool
    best: BestRecord | None
    to_beat: Gain | None
    trials: list[TrialRecord]
    pareto: list[int]
    importance: dict[str, float]
    advice: list[Message]
    seconds: float
    machine: Mapping[str, Any]
    usage: Mapping[str, Any]
    format: int = FORMAT

    def to_json(self, describe: Describe = str) -> dict[str, Any]:
        """What ``result.json`` holds; ``describe`` writes its sentences. Numbers that are not finite become null."""
        found: dict[str, Any] = asdict(self)
        for message, entry in zip(self.advice, found["advice"], strict=True):
            entry["text"] = describe(message)
        if self.best is not None:
            best = found["best"]
            best |= {"decision": best["why"], "why": describe(self.best.why)}
            best |= {"remarks": best["notes"], "notes": [describe(note) for note in self.best.notes]}
        out: dict[str, Any] = plain(found)
        return out


def record(
    found: Verdict,
    trials: Sequence[Trial],
    *,
    adapter: str | Path,
    seconds: float,
    machine: Mapping[str, Any],
    usage: Mapping[str, Any] | None = None,
) -> SearchRecord:
    """The same for the same trials, apart from the seconds and the machine."""
    return SearchRecord(
        learned=found.learned,
        best=_best(found, str(adapter)) if found.learned else None,
        to_beat=found.gain,
        trials=[_trial(trial, found) for trial in sorted(trials, key=lambda trial: trial.number)],
        pareto=found.pareto,
        importance=found.importance,
        advice=found.advice,
        seconds=seconds,
        machine=machine,
        usage=usage or {},
    )


def _best(found: Verdict, adapter: str) -> BestRecord:
    best, score = found.best, found.scores[found.best.number]
    return BestRecord(
        config=best.values,
        metric=score.mean,
        adapter=adapter,
        metric_name=found.metric,
        number=best.number,
        noise=score.noise,
        seeds=score.values,
        tie=found.tie,
        why=found.why,
        runner_up=found.runner_up.number if found.runner_up else None,
        notes=found.notes,
        unadapted_experts=best.unadapted or None,
        options=best.options.to_dict(),
    )


def _trial(trial: Trial, found: Verdict) -> TrialRecord:
    score = found.scores.get(trial.number)  # of a further seed: that of its first trial holds it
    return TrialRecord(
        number=trial.number,
        config=trial.values,
        state=trial.state,
        curve=trial.curve,
        metric=trial.curve.evaluations[-1].get(found.metric) if trial.curve.evaluations else None,
        noise=score.noise if score else None,
        seconds=trial.seconds,
        steps=trial.step,
        of_steps=trial.steps,
        seed=trial.options.seed,
        repeats=trial.repeats,
        parameters=trial.parameters,
        bytes=trial.bytes,
        reason=trial.reason,
        used=dict(sorted(trial.used.items())),
        error={name: error(values) for name, values in trial.parts.items()},
    )
