"""``result.json``: what a search came to, as one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraloom.files.jsonio import plain
from loraloom.inference.jackknife import error
from loraloom.messages import Describe, Message
from loraloom.tuning.bar import Gain
from loraloom.tuning.final_test import FinalTest
from loraloom.tuning.selection import rows_trained
from loraloom.tuning.smaller import Cuts
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import Verdict

#: Files without a format are of loraloom 0.1.
FORMAT = 1


@dataclass(frozen=True)
class SearchRecord:
    """A whole search. ``best`` and ``to_beat`` are None if no configuration is recommended, or no bar was measured."""

    learned: bool
    #: it is better than the baselines, a new head on the frozen model included
    recommended: bool
    best: Mapping[str, Any] | None
    to_beat: Gain | None
    #: the best on the rows that chose it: ``rows``, ``figure``, ``against``
    held_out: Mapping[str, Any]
    #: the best on rows that chose nothing; None if there are no such rows
    test: FinalTest | None
    #: the best at lower ranks and other scales; None without a best one
    cuts: Cuts | None
    trials: Sequence[Mapping[str, Any]]
    pareto: list[int]
    #: of quality, rows that training reads, and size: the configurations that no other beats in all
    front: Sequence[Mapping[str, Any]]
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
            best |= {"decision": best["why"], "why": describe(self.best["why"])}
            best |= {"remarks": best["notes"], "notes": [describe(note) for note in self.best["notes"]]}
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
        recommended=found.recommended,
        best=_best(found, str(adapter)) if found.learned else None,
        to_beat=found.gain,
        held_out={
            "rows": found.rows,
            "figure": found.figure and asdict(found.figure),
            "against": [asdict(one) for one in found.against],
        },
        test=found.test,
        cuts=found.cuts,
        trials=[_trial(trial, found) for trial in sorted(trials, key=lambda trial: trial.number)],
        pareto=found.pareto,
        front=[_on_front(found, number) for number in found.front],
        importance=found.importance,
        advice=found.advice,
        seconds=seconds,
        machine=machine,
        usage=usage or {},
    )


def _on_front(found: Verdict, number: int) -> dict[str, Any]:
    trial, score = found.trial(number), found.scores[number]
    figures = {"metric": score.mean, "error": score.error, "rows": rows_trained(trial)}
    return {"trial": number, **figures, "parameters": trial.parameters, "bytes": trial.bytes}


def _best(found: Verdict, adapter: str) -> dict[str, Any]:
    """The recommended configuration, with all options of its training."""
    best, score = found.best, found.scores[found.best.number]
    return {
        "config": best.values,
        "metric": score.mean,
        "adapter": adapter,
        "metric_name": found.metric,
        "number": best.number,
        "noise": score.noise,
        "seeds": score.values,
        "tie": found.tie,
        "why": found.why,
        "runner_up": found.runner_up.number if found.runner_up else None,
        "notes": found.notes,
        "unadapted_experts": best.unadapted or None,
        "options": best.options.to_dict(),
    }


def _trial(trial: Trial, found: Verdict) -> dict[str, Any]:
    score = found.scores.get(trial.number)  # of a further seed: that of its first trial holds it
    same = ("number", "state", "curve", "seconds", "repeats", "parameters", "bytes", "reason")
    return {name: getattr(trial, name) for name in same} | {
        "config": trial.values,
        "metric": trial.latest(found.metric),
        "noise": score.noise if score else None,
        "uncertainty": score.error if score else None,
        "steps": trial.step,
        "of_steps": trial.steps,
        "seed": trial.options.seed,
        "used": dict(sorted(trial.used.items())),
        "error": {name: error(values) for name, values in trial.parts.items()},
    }
