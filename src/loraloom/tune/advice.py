"""What a user should try next, in the user's own terms: each advice has the figures behind it, or is not given.

Every function below looks at one symptom of a search and answers None when its figures do not support a word.
The remedies are those of the literature: see the docs page on tuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median, median_low
from typing import Any

from loraloom.tune.score import Comparison, goodness, measured, same, varying
from loraloom.tune.trial import Trial
from loraloom.tune.words import label, shown

#: A trend: a trial nearer the edge beats one farther away in this share of all pairs. Chance alone gives 0.5, and
#: 0.75 with eight trials on each side about once in twenty.
TREND = 0.75
#: A trend needs so many trials on each side.
TREND_TRIALS = 3
#: Apart: the held-out loss is this far above the training loss, and above its own lowest. Both are means over many
#: rows; smaller gaps also arise from training rows being seen with dropout, and from the rows themselves.
APART = 1.2
RISE = 1.03
#: Training loss that still falls by this share over the last third of the steps is not done, where the fall is at least
#: so many standard errors of its own slope and the steps scatter by less than this share about the line.
FALL = 0.05
FALL_ERRORS = 4.0
EVEN = 0.25
#: A jump: a loss above this many times the mean of the steps before it, and by this share of where training began, so
#: that the wobble of losses near 0 is none.
JUMP = 1.5
JUMP_SHARE = 0.15
JUMP_WINDOW = 8
#: So many jumps, and so large a share of the steps, are a pattern.
JUMPS = 3
JUMPS_SHARE = 0.03
#: Curves shorter than this say nothing about their shape.
CURVE_STEPS = 20
#: Directions to keep for each one that is used, since the directions used are those after training found them.
HEADROOM = 1.25
#: A module hardly moved where its relative norm is below this share of the median.
MOVED = 0.1
#: A rate is too high when at least this share of the trials at or above it failed.
FAILED = 2 / 3
#: A knob did not matter below this share of the importance, where chance gives as much, and no value's trials beat
#: another's in more than this share of pairs.
IDLE = 0.1
IDLE_PAIRS = 0.7
#: and so many trials were compared.
IDLE_TRIALS = 12


@dataclass(frozen=True)
class Advice:
    """``kind`` names the symptom, ``text`` is for people, ``figures`` are the numbers in it."""

    kind: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evidence:
    """All that advice is drawn from. ``trials`` are first seeds; see ``verdict`` for ``edges`` and ``order``."""

    best: Trial
    trials: Sequence[Trial]
    comparison: Comparison
    importance: Mapping[str, float]
    mattered: Sequence[str]
    edges: Mapping[str, str]
    order: Mapping[str, Sequence[Any]]

    def place(self, trial: Trial, knob: str) -> float | None:
        """Where a trial's value lies among the others, low to high; None where the knob has no order."""
        value = trial.values.get(knob)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        labels = [same(item) for item in self.order.get(knob, ())]
        return float(labels.index(same(value))) if same(value) in labels else None

    @property
    def when(self) -> str:
        """When the comparison was made, where that was not at the end."""
        share = self.comparison.share
        return "" if share > 0.995 else f" after {share:.0%} of the steps"


def advise(evidence: Evidence) -> list[Advice]:
    found = [
        failures(evidence),
        *edge(evidence),
        spiky(evidence),
        apart(evidence),
        slow(evidence),
        rank(evidence),
        still(evidence),
        *idle(evidence),
    ]
    return [advice for advice in found if advice is not None]


# The space ------------------------------------------------------------------------------------------------


def failures(evidence: Evidence) -> Advice | None:
    """Rates from which on most trials failed, where lower ones held."""
    rates = {trial.number: trial.options.learning_rate for trial in evidence.trials}
    failed = {trial.number for trial in evidence.trials if trial.state == "failed"}
    for bound in sorted({rates[number] for number in failed}):
        above = [number for number, rate in rates.items() if rate >= bound]
        held = [rate for number, rate in rates.items() if rate < bound and number not in failed]
        count = len(failed.intersection(above))
        if held and count >= FAILED * len(above):
            what = f"{count} of {len(above)} trials from rate {shown(bound)} on"
            if len(above) == 1:
                what = f"the trial with rate {shown(bound)}"
            return Advice(
                "failures",
                f"{what} diverged; {shown(max(held))} held: make it the upper bound of the rate",
                {"failed": count, "trials": len(above), "rate": bound, "held": max(held)},
            )
    return None


def edge(evidence: Evidence) -> Iterator[Advice]:
    """The best lies at an edge of the space, and trials nearer that edge did better."""
    for knob, side in evidence.edges.items():
        at = evidence.place(evidence.best, knob)
        # A trend of a knob that hardly counts is borrowed from others that happened to vary with it.
        borrowed = evidence.importance.get(knob, 1.0) < IDLE and knob not in evidence.mattered
        if at is None or borrowed:
            continue
        lower, upper = _halves(evidence, knob)
        if min(len(lower), len(upper)) < TREND_TRIALS:
            continue
        near, far = (upper, lower) if side == "high" else (lower, upper)
        share = _beats([evidence.comparison.good(n) for n in near], [evidence.comparison.good(n) for n in far])
        if share < TREND or _failed_beyond(evidence, knob, at, side):
            continue
        values = evidence.comparison.values
        means = {"near": median(values[n] for n in near), "far": median(values[n] for n in far)}
        words = ("upper", "lower") if side == "high" else ("lower", "upper")
        yield Advice(
            "edge",
            f"the best {label(knob)}, {shown(evidence.best.values[knob])}, is at the {words[0]} edge of the space: "
            f"widen it there. The {words[0]} half of the trials has a median {evidence.comparison.metric} of "
            f"{means['near']:.3g}{evidence.when}, the {words[1]} half {means['far']:.3g}",
            {"knob": knob, "side": side, "value": evidence.best.values[knob], **means, "pairs": share},
        )


def _failed_beyond(evidence: Evidence, knob: str, at: float, side: str) -> bool:
    places = [evidence.place(trial, knob) for trial in evidence.trials if trial.state == "failed"]
    return any(place is not None and (place >= at if side == "high" else place <= at) for place in places)


def _halves(evidence: Evidence, knob: str) -> tuple[list[int], list[int]]:
    """Trials with low and with high values of ``knob``; equal values stay together."""
    places = {
        trial.number: place
        for trial in evidence.trials
        if trial.number in evidence.comparison.values and (place := evidence.place(trial, knob)) is not None
    }
    ordered = sorted(places.values())
    if not ordered or ordered[0] == ordered[-1]:
        return [], []
    # The cut between two neighbouring values that divides most evenly.
    cuts = [low for low, high in pairwise(ordered) if low < high]
    cut = min(cuts, key=lambda c: abs(2 * sum(v <= c for v in ordered) - len(ordered)))
    return [n for n, v in places.items() if v <= cut], [n for n, v in places.items() if v > cut]


def _beats(ones: Sequence[float], others: Sequence[float]) -> float:
    """The share of pairs in which the one is greater; a draw is half. It cares for no scale and no outlier."""
    return fmean(1.0 if one > other else 0.5 if one == other else 0.0 for one in ones for other in others)


def idle(evidence: Evidence) -> Iterator[Advice]:
    """Knobs that made no difference: fix them where the adapter is smallest."""
    compared = [trial for trial in evidence.trials if trial.number in evidence.comparison.values]
    if len(compared) < IDLE_TRIALS:
        return
    for knob in varying(compared):
        share = evidence.importance.get(knob, 1.0)
        groups = _groups(evidence, compared, knob)
        if share >= IDLE or knob in evidence.mattered or len(groups) < 2 or min(map(len, groups)) < TREND_TRIALS:
            continue
        goods = [[evidence.comparison.good(trial.number) for trial in group] for group in groups]
        if max(_beats(one, other) for one in goods for other in goods if one is not other) > IDLE_PAIRS:
            continue
        medians = [median(evidence.comparison.values[trial.number] for trial in group) for group in groups]
        value = _cheapest(compared, evidence.best, knob)
        yield Advice(
            "idle",
            f"{label(knob)} made no difference ({share:.0%} of the importance, median {evidence.comparison.metric} "
            f"{min(medians):.3g} to {max(medians):.3g}{evidence.when}): fix it at "
            f"{shown(value)} and spend the trials elsewhere",
            {"knob": knob, "share": share, "lowest": min(medians), "highest": max(medians), "value": value},
        )


def _groups(evidence: Evidence, trials: Sequence[Trial], knob: str) -> list[list[Trial]]:
    """Trials by their value; by halves where nearly each has a value of its own."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if knob in trial.values:
            groups.setdefault(same(trial.values[knob]), []).append(trial)
    if min(map(len, groups.values())) >= TREND_TRIALS:
        return list(groups.values())
    by_number = {trial.number: trial for trial in trials}
    return [[by_number[n] for n in half] for half in _halves(evidence, knob) if half]


def _cheapest(trials: Sequence[Trial], best: Trial, knob: str) -> Any:
    """The value with the fewest parameters, or the least to compute; the best's own where all cost the same."""
    values = {same(trial.values[knob]): trial.values[knob] for trial in trials if knob in trial.values}
    if knob.endswith((".r", "lora_dropout")):
        return min(values.values())
    if not knob.endswith(("target_modules", "modules_to_save")):
        return best.values[knob]
    sizes: dict[str, list[float]] = {text: [] for text in values}
    for trial in trials:
        if knob in trial.values:
            sizes[same(trial.values[knob])].append(trial.parameters / trial.options.lora.r)
    return values[min(sizes, key=lambda text: (median(sizes[text]), text))]


# The best trial's curves ----------------------------------------------------------------------------------


def apart(evidence: Evidence) -> Advice | None:
    """Training loss goes on down while held-out loss has turned up: rows are learnt by heart."""
    trial = evidence.best
    held = [(int(e["step"]), measured(e, "loss")) for e in trial.curve.evaluations if "rows" not in e]
    losses = _finite_ones(trial.curve.loss)
    if len(held) < 3 or len(losses) < CURVE_STEPS or not all(math.isfinite(loss) for _, loss in held):
        return None
    train = fmean(losses[-max(len(losses) // 10, 5) :])
    step, lowest = min(((s, loss) for s, loss in held), key=lambda pair: (pair[1], pair[0]))
    last = held[-1][1]
    if last < APART * train or last < RISE * lowest or last <= held[-2][1]:
        return None
    lora = trial.options.lora
    return Advice(
        "apart",
        f"training loss is down to {train:.3g} while held-out loss rose to {last:.3g} from {lowest:.3g} at step "
        f"{step}: the rows are learnt by heart. Use more dropout (now {shown(lora.lora_dropout)}), less r (now "
        f"{lora.r}), fewer steps, or more data",
        {"training": train, "held_out": last, "lowest": lowest, "step": step},
    )


def slow(evidence: Evidence) -> Advice | None:
    """The loss is still on its way down, evenly: there was room for larger or for more steps."""
    trial = evidence.best
    losses = _finite_ones(trial.curve.loss[-(len(trial.curve.loss) // 3) :])
    if len(losses) < CURVE_STEPS or fmean(losses) <= 0:
        return None
    level, slope, error, scatter = _line(losses)
    start = level - slope * len(losses) / 2
    fall = -slope * len(losses) / start if start > 0 else 0.0
    held = [measured(e, "loss") for e in trial.curve.evaluations if "rows" not in e]
    turned = len(held) > 1 and not held[-1] < held[-2]
    if fall < FALL or -slope < FALL_ERRORS * error or scatter > EVEN * level or turned:
        return None
    # Where faster trials were tried and did worse, a higher rate is no advice.
    good, comparison = evidence.comparison.good, evidence.comparison
    mine = comparison.values.get(trial.number)
    faster = [
        other.number
        for other in evidence.trials
        if other.number in comparison.values and other.options.learning_rate > trial.options.learning_rate * 1.2
    ]
    worse = [n for n in faster if mine is not None and good(n) < goodness(comparison.metric, mine)]
    figures = {"fall": fall, "scatter": scatter / level, "faster": len(faster), "faster_and_worse": len(worse)}
    words = f"the training loss still fell by {fall:.0%} over the last third of the steps, evenly"
    if faster and len(worse) > len(faster) / 2:
        return Advice(
            "slow",
            f"{words}, and {len(worse)} of {len(faster)} trials with higher rates did worse: train longer",
            figures,
        )
    lora = trial.options.lora
    return Advice(
        "slow",
        f"{words}: raise lora_alpha (now {lora.lora_alpha:g}) or the learning rate (now "
        f"{shown(trial.options.learning_rate)}), or train longer",
        figures,
    )


def _line(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Least squares: mean, slope a step, standard error of the slope, standard deviation about the line."""
    n, mean = len(values), fmean(values)
    middle = (n - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(n))
    slope = sum((i - middle) * (v - mean) for i, v in enumerate(values)) / spread
    scatter = math.sqrt(sum((v - mean - slope * (i - middle)) ** 2 for i, v in enumerate(values)) / (n - 2))
    return mean, slope, scatter / math.sqrt(spread), scatter


def spiky(evidence: Evidence) -> Advice | None:
    """The loss leaps up again and again, and more often than at lower rates on the same rows."""
    trial = evidence.best
    count, steps = _jumps(trial.curve.loss), len(trial.curve.loss)
    if steps < CURVE_STEPS or count < JUMPS or count < JUMPS_SHARE * steps:
        return None
    rate = trial.options.learning_rate
    lower = [
        _jumps(other.curve.loss[:steps]) * steps / min(len(other.curve.loss), steps)
        for other in evidence.trials
        if other.options.learning_rate < rate / 1.2 and len(other.curve.loss) >= CURVE_STEPS
    ]
    if lower and median(lower) > count / 2:
        return None  # the rows make the jumps, not the rate
    beside = f"; at lower rates the median is {median(lower):.0f}" if lower else ""
    return Advice(
        "spiky",
        f"the training loss leapt up at {count} of {steps} steps{beside}: lower the learning rate (now {shown(rate)}) "
        f"or lora_alpha (now {trial.options.lora.lora_alpha:g})",
        {"jumps": count, "steps": steps, "at_lower_rates": median(lower) if lower else None, "rate": rate},
    )


def _jumps(losses: Sequence[float | None]) -> int:
    values = _finite_ones(losses)
    if len(values) <= JUMP_WINDOW:
        return 0
    floor = JUMP_SHARE * fmean(values[:JUMP_WINDOW])
    before = (fmean(values[i - JUMP_WINDOW : i]) for i in range(JUMP_WINDOW, len(values)))
    return sum(
        value > JUMP * mean and value - mean > floor for value, mean in zip(values[JUMP_WINDOW:], before, strict=True)
    )


# What the adapter learnt ----------------------------------------------------------------------------------


def rank(evidence: Evidence) -> Advice | None:
    """The update has far fewer directions than it was given."""
    moved = {
        name: (r, used) for name, (r, used, norm) in evidence.best.used.items() if used > 0 and math.isfinite(norm)
    }
    if not moved:
        return None
    r = round(median(r for r, _ in moved.values()))
    used = sorted(used for _, used in moved.values())
    typical = median_low(used)
    enough: int = 2 ** math.ceil(math.log2(HEADROOM * typical))
    if enough > r / 2:
        return None
    most = f" ({used[-1]} in the layer that uses most)" if used[-1] > enough else ""
    return Advice(
        "rank",
        f"r of {r} uses {typical} direction{'' if typical == 1 else 's'} in the median layer{most}: r of {enough} will "
        "do",
        {"r": r, "used": typical, "largest": used[-1], "enough": enough, "modules": len(moved)},
    )


def still(evidence: Evidence) -> Advice | None:
    """Modules whose update is tiny beside that of the others."""
    norms = {name: norm for name, (_, _, norm) in evidence.best.used.items() if math.isfinite(norm)}
    if len(norms) < 3:
        return None
    middle = median(norms.values())
    idle_ones = sorted(name for name, norm in norms.items() if norm < MOVED * middle)
    if not idle_ones:
        return None
    largest = max(norms[name] for name in idle_ones)
    words = _kinds(idle_ones, norms)
    return Advice(
        "still",
        f"{words} hardly moved (at most {largest:.2g} of the weight's norm, the median module {middle:.2g}): "
        "drop them from the targets",
        {"modules": idle_ones, "largest": largest, "median": middle},
    )


def _kinds(names: Sequence[str], among: Mapping[str, Any]) -> str:
    """``"all 22 k_proj and layers.0.fc1"``: whole kinds by their name, whole layers by theirs, the rest one by one."""
    left, parts = list(names), []
    for part in (lambda name: name.rpartition(".")[2], _layer):
        for kind in sorted({part(name) for name in left} - {""}):
            members = [name for name in among if part(name) == kind]
            if len(members) > 1 and set(members) <= set(left):
                parts.append(
                    f"all {len(members)} modules of {kind}" if part is _layer else f"all {len(members)} {kind}"
                )
                left = [name for name in left if name not in members]
    parts += left[:3] + ([f"{len(left) - 3} more"] if len(left) > 3 else [])
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _layer(name: str) -> str:
    """``"model.layers.3.mlp.up_proj"`` → ``"layers.3"``; empty where no part is a number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return f"{parts[at - 1]}.{parts[at]}" if at else ""


def _finite_ones(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
