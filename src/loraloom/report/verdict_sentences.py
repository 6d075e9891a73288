"""What a search ends with, in sentences: the verdict, and what to try next."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loraloom.files.durations import short
from loraloom.files.sizes import size
from loraloom.report.format import counted, figure, gap, label, shown
from loraloom.report.format import params as settings

Table = Mapping[str, str | Callable[..., str]]

# -- the verdict ------------------------------------------------------------------------------------------------------


def _tie(top: int, winner: int, gap: float, noise: float, metric: str, parameters: int, top_parameters: int) -> str:
    less = f", less than the noise of {noise:.3g}" if noise else ""
    return (
        f"trials {top} and {winner} differ by {gap:.3g} in {metric}{less}: a tie, so the cheaper one wins, with "
        f"{parameters:,} parameters against {top_parameters:,}"
    )


def _best(metric: str, tied: int) -> str:
    return f"the best {metric}" + (f" of {tied} that are tied within the noise, and the cheapest" if tied > 1 else "")


def _steered(stopped: Sequence[int], kept: Sequence[int]) -> list[str]:
    what = (("stopped", stopped), ("kept", kept))
    return [f"{verb} trial{'s' * (len(numbers) > 1)} {shown(list(numbers))}" for verb, numbers in what if numbers]


def _reached(metric: str, value: float, noise: float | None, seeds: int) -> str:
    # A noise of 0 is that of seeds that all did the same: it says nothing.
    return f"{metric} {figure(value)}{f' ± {gap(noise)}' if noise else ''}{f' over {seeds} seeds' if seeds > 1 else ''}"


def _use(params: Mapping[str, Any], unadapted: str = "") -> str:
    return f"use {settings(params)}" + (f" ({unadapted} stay unadapted)" if unadapted else "")


def _trial(
    trial: int,
    parameters: int,
    bytes: int,
    rows: int = 0,
    interval: Sequence[float] = (),
    params: Mapping[str, Any] | None = None,
    **reached: Any,
) -> str:
    """``params`` are given if the trial is not recommended."""
    extent = f"{parameters:,} parameters{f', {size(bytes)}' if bytes else ''}"
    what = f"trial {trial}" if params is None else f"the best of them is trial {trial} ({settings(params)})"
    if not interval:
        return f"{what}: {_reached(**reached)}, {extent}"
    seeds = reached["seeds"]
    over = f" over {seeds} seeds" if seeds > 1 else ""
    where = f"on the {counted(rows, 'row')} that chose it"
    return f"{what}: {reached['metric']} {_interval(*interval)}{over} {where}, {extent}"


def _extent(ratio: float) -> str:
    if 0.95 < ratio < 1.05:
        return "of the same size"
    return f"{float(f'{ratio:.2g}'):,g} times the size"


def _runner_up_is(trial: int, params: Mapping[str, Any], ratio: float, compared: Mapping[str, Any]) -> str:
    """The configuration of the runner-up after how it compares."""
    extent = _extent(ratio)
    return f"{_against(what=f'the runner-up, trial {trial}', **compared)}: {settings(params)}, {extent}"


def _runner_up(
    trial: int, params: Mapping[str, Any], ratio: float, distance: float, tie: bool, tie_noise: float, **reached: Any
) -> str:
    """Without figures row by row, which old searches lack."""
    extent = _extent(ratio)
    where = f"{gap(abs(distance))} {'above' if distance > 0 else 'below'}" if distance else "equal to it"
    end = "" if not tie else f": a tie within the noise of {gap(tie_noise)}" if tie_noise else ": a tie"
    return f"runner-up, trial {trial} ({settings(params)}): {_reached(**reached)}; {extent}, {where}{end}"


def _also(others: Sequence[Mapping[str, Any]], metric: str) -> str:
    def one(trial: int, value: float, bytes: int, rows: int | None) -> str:
        less = "" if rows is None else f", {rows:,} rows to train on"
        return f"trial {trial} ({metric} {figure(value)}, {size(bytes)}{less})"

    return f"smaller or faster: {', '.join(one(**other) for other in others)}"


def _preferred(
    top: int,
    winner: int,
    gap: float,
    metric: str,
    parameters: int,
    top_parameters: int,
    rows: int,
    top_rows: int,
    prefer: str,
    within: float | None,
) -> str:
    near = f"is within {within:g} of" if within is not None else "cannot be told apart from"
    less = f"has {parameters:,} parameters against {top_parameters:,}"
    if prefer == "fast" and rows != top_rows:
        less = f"trains on {rows:,} rows against {top_rows:,}"
    return f"trial {winner} {near} trial {top}, the best by {metric} ({gap:.3g} above), and {less}"


def _smaller(
    name: str,
    r: int,
    parameters: int,
    bytes: int,
    metric: float,
    worse: float,
    error: float,
    by_energy: bool,
    adapter: str,
) -> str:
    lost = f"{gap(worse)} worse" if worse > 0 else f"{gap(-worse)} better" if worse < 0 else "no different"
    extent = f"{parameters:,} parameters, {size(bytes)}"
    way = f"the size of r={r}, with a rank for each module," if by_energy else f"r={r}"
    return f"cut to {way} it is as good ({name} {figure(metric)}, {lost} ± {gap(error)}), with {extent}: {adapter}"


def _tested(metric: str, rows: int, seeds: int, value: float, low: float, high: float) -> str:
    over = f" over {seeds} seeds" if seeds > 1 else ""
    return f"on {counted(rows, 'test row')} that chose nothing: {metric} {_interval(value, low, high)}{over}"


def _interval(value: float, low: float, high: float) -> str:
    return f"{figure(value)} ({figure(low)} to {figure(high)}, 95 %)"


def _against(
    what: str, figures: Sequence[float], better: Sequence[float], rows: int, seeds: int, needed: int | None, clear: bool
) -> str:
    """``"better than trial 3 (0.700) by 0.030 (0.002 to 0.058, 95 %, paired on 800 rows, 2 seeds)"``."""
    value, low, high = better
    paired = f"paired on {counted(rows, 'row')}" + (f", {seeds} seeds" if seeds > 1 else "")
    if clear:
        side = "better" if value > 0 else "worse"
        low, high = sorted((abs(low), abs(high)))
        by = f"{gap(abs(value))} ({gap(low)} to {gap(high)}, 95 %, {paired})"
        return f"{side} than {what} ({figure(figures[0])}) by {by}"
    way = "its seeds differ too much for any number of rows"
    if needed is not None:
        way = f"about {float(f'{needed:.1g}'):,.0f} would do"
    return f"cannot be told apart from {what} ({figure(figures[0])}) on {counted(rows, 'row')}; {way}"


def _mattered(mattered: Mapping[str, float], rest: Mapping[str, float]) -> str:
    def listed(shares: Mapping[str, float]) -> str:
        return ", ".join(f"{label(name)} {share:.0%}" for name, share in shares.items())

    if not mattered:
        return f"no hyperparameter mattered more than chance ({listed(rest)})"
    return f"what mattered: {listed(mattered)}" + (f"; no more than chance: {listed(rest)}" if rest else "")


VERDICT: Table = {
    "use": _use,
    "trial": _trial,
    "runner_up": _runner_up,
    "runner_up_is": _runner_up_is,
    "nothing_learned": "nothing was learned: no configuration is recommended",
    "not_above_head": (
        "no configuration is recommended: none is shown to be better than a new head on the frozen model, which is far "
        "cheaper"
    ),
    "also": _also,
    "only_one": "the only configuration that could be compared",
    "best": _best,
    "tie": _tie,
    "preferred": _preferred,
    "none_fits": lambda max_size, trial, bytes: (
        f"no adapter that learned something has at most {size(max_size)}: trial {trial} is the smallest, with "
        f"{size(bytes)}; let the space have lower ranks or fewer targets"
    ),
    "none_finished": "no trial finished: the {compared} that came furthest are compared, at {share:.0%} of their steps",
    "smaller": _smaller,
    "scaled": lambda name, factor, lora_alpha, metric, better, error, scales, adapter: (
        f"at {factor:g} times its scale (lora_alpha {lora_alpha:g}) it is better ({name} {figure(metric)}, "
        f"{gap(better)} better ± {gap(error)}, the best of {scales} scales on the rows that chose it): {adapter}"
    ),
    "tested": _tested,
    "against": _against,
    "test_used_before": "these test rows were used before, for another verdict: they have chosen too",
    "clock_ended": lambda seconds, steps: (
        f"the time was over after {short(seconds)} ({steps:,} steps of all trials), so another run may come to another "
        "verdict"
    ),
    "steered": lambda stopped, kept: (
        f"the user {' and '.join(_steered(stopped, kept))}, so another run may come to another verdict"
    ),
    "no_test": (
        "its figures are of the {rows:row} that chose it, so they are too good by an unknown amount; data.test keeps "
        "rows for a figure that is not (--test-split 0.1)"
    ),
    "one_seed": (
        "each configuration was trained with one seed: differences are of these adapters, and other seeds may order "
        "them otherwise"
    ),
    "adapter_damaged": "the adapter of trial {trial} is not used: {damage}",
    "mattered": _mattered,
    "few_trials": "{trials} trials can be compared; {needed} are needed to say which hyperparameter mattered",
    "few_steps": "{steps} steps are too few to say which hyperparameter mattered; {needed} are needed",
    "nothing_varied": "no hyperparameter had more than one value",
    "all_equal": "all trials have the same {metric}",
    "nothing_in_common": "the best trials have nothing in common that the others lack",
}

# -- what to try next -------------------------------------------------------------------------------------------------


def _failures(failed: int, trials: int, rate: float, held: float | None = None) -> str:
    if held is None:
        return (
            f"{failed} of {trials} trials diverged, the one with the lowest rate at {shown(rate)}: lower the learning "
            "rates of the space"
        )
    which = (
        f"{failed} of {trials} trials from rate {shown(rate)} on"
        if trials > 1
        else f"the trial with rate {shown(rate)}"
    )
    return f"{which} diverged; {shown(held)} held: make it the upper bound of the rate"


def _edge(knob: str, side: str, value: Any, near: float, far: float, metric: str, at: float, pairs: float) -> str:
    this, other = ("upper", "lower") if side == "high" else ("lower", "upper")
    return (
        f"the best {label(knob)}, {shown(value)}, is at the {this} edge of the space: widen it there. The {this} half "
        f"of the trials has a median {metric} of {near:.3g}{_when(at)}, the {other} half {far:.3g}"
    )


def _idle(knob: str, share: float, lowest: float, highest: float, value: Any, metric: str, at: float) -> str:
    return (
        f"{label(knob)} made no difference ({share:.0%} of the importance, median {metric} {lowest:.3g} to "
        f"{highest:.3g}{_when(at)}): fix it at {shown(value)} and spend the trials elsewhere"
    )


def _when(share: float) -> str:
    return "" if share > 0.995 else f" after {share:.0%} of the steps"


def _spiky(jumps: int, steps: int, at_lower_rates: float | None, rate: float, lora_alpha: float) -> str:
    beside = "" if at_lower_rates is None else f"; at lower rates the median is {at_lower_rates:.0f}"
    return (
        f"the training loss spiked at {jumps} of {steps} steps{beside}: lower the learning rate (now {shown(rate)}) or "
        f"lora_alpha (now {lora_alpha:g})"
    )


def _apart(
    training: float,
    held_out: float | None,
    lowest: float = math.nan,
    step: int = 0,
    dropout: float = 0.0,
    r: int = 0,
    trial: int | None = None,
) -> str:
    if trial is None:
        return (
            f"training loss is down to {training:.3g} while held-out loss rose to {held_out:.3g} from {lowest:.3g} at "
            f"step {step}: the adapter is overfitting. Use more dropout (now {shown(dropout)}), less r (now {r}), "
            "fewer steps, or more data"
        )
    beside = "" if held_out is None else f" while its held-out loss is {held_out:.3g}"
    return (
        f"the training loss of trial {trial} came down to {training:.3g}{beside}: it is overfitting. Check that the "
        "labels are right and the held-out rows are of the same kind (loraloom data), get more rows, or train for "
        "fewer epochs with less r and more dropout"
    )


def _slow(fall: float, faster: int, faster_and_worse: int, lora_alpha: float, rate: float, scatter: float) -> str:
    still = f"the training loss still fell by {fall:.0%} over the last third of the steps, evenly"
    if faster and faster_and_worse > faster / 2:
        return f"{still}, and {faster_and_worse} of {faster} trials with higher rates did worse: train longer"
    return f"{still}: raise lora_alpha (now {lora_alpha:g}) or the learning rate (now {shown(rate)}), or train longer"


def _rank(r: int, used: int, largest: int, enough: int, modules: int) -> str:
    most = f" ({largest} in the layer that uses most)" if largest > enough else ""
    return f"r of {r} uses {counted(used, 'direction')} in the median layer{most}: r of {enough} will do"


def _still(modules: Sequence[str], groups: Sequence[Mapping[str, Any]], largest: float, median: float) -> str:
    parts = [f"all {g['count']} {g['type']}" for g in groups if "type" in g]
    parts += [f"all {g['count']} modules of {g['layer']}" for g in groups if "layer" in g]
    single = [g["module"] for g in groups if "module" in g]
    parts += single[:3] + ([f"{len(single) - 3} more"] if len(single) > 3 else [])
    which = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return (
        f"{which} hardly moved (at most {largest:.2g} of the weight's norm, the median module {median:.2g}): drop them "
        "from the targets"
    )


def _rows(tried: int, gain: float, metric: str, bar_words: str, rows: int, enough: int, error: float) -> str:
    about = f"; if it is real, about {enough:,} would show it" if rows < enough < 100 * rows else ""
    return (
        f"the best of {tried} is {gain:.3g} better in {metric} than {bar_words}, which {counted(rows, 'held-out row')} "
        f"cannot tell from luck{about}: hold out more"
    )


def _stuck(lowest: float, base: float | None, rates: Sequence[float], steps: int) -> str:
    below = "its first values" if base is None else f"that of the best constant answer ({base:.3g})"
    seen = f": the lowest is {lowest:.3g}" if math.isfinite(lowest) else ""
    tried = shown(rates[0]) if rates[0] == rates[1] else f"{shown(rates[0])} to {shown(rates[1])}"
    return (
        f"in {steps} steps no trial's training loss came clearly below {below}{seen}. Raise the learning rates (tried: "
        f"{tried}), train longer (epochs, max_steps), or adapt more modules; and check that the labels follow from the "
        "rows at all (loraloom data)"
    )


def _behind_head(gain: float, metric: str, rates: Sequence[float], steps: int) -> str:
    tried = shown(rates[0]) if rates[0] == rates[1] else f"{shown(rates[0])} to {shown(rates[1])}"
    far = f"{-gain:.3g} behind" if gain else "no better than"
    return (
        f"in {steps} steps the best LoRA is {far} a new head in {metric}: train longer (epochs, max_steps), raise the "
        f"learning rates (tried: {tried}), or adapt more modules"
    )


ADVICE: Table = {
    "failures": _failures,
    "edge": _edge,
    "spiky": _spiky,
    "apart": _apart,
    "slow": _slow,
    "rank": _rank,
    "still": _still,
    "idle": _idle,
    "stuck": _stuck,
    "rows": _rows,
    "behind_head": _behind_head,
    "metric": (
        "the held-out loss of the best is {gain:.3g} below {bar:.3g}, and its {metric} is no better than that of "
        "{bar_words}: it has learned something that {metric} does not see. Compare by the loss (metric: loss) or by a "
        "metric that counts rare classes, or train longer"
    ),
    "full": (
        "{bar_words} has {metric} {bar:.3g} already, which leaves no room: compare by another metric (loss, or one "
        "that counts rare classes such as f1_macro), or hold out harder rows"
    ),
}
