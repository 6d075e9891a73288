"""The sentences of all messages, by kind. Another language is another table of the same kinds.

An entry is a template or a function of the message's figures. In a template a figure without a format is written for
people (``format.shown``), one with a noun is counted: ``{rows:row}`` gives ``"2,000 rows"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from loraloom.files.durations import short
from loraloom.files.sizes import size
from loraloom.messages import Message, Warn
from loraloom.report.format import about, counted, shown
from loraloom.report.format import params as settings
from loraloom.report.screen import Text
from loraloom.report.verdict_sentences import ADVICE, VERDICT, Table


class _Figure:
    def __init__(self, value: Any) -> None:
        self._value = value

    def __repr__(self) -> str:
        return repr(self._value)

    def __format__(self, spec: str) -> str:
        if not spec:
            return self._value if isinstance(self._value, str) else shown(self._value)
        noun = len(spec) > 1 and spec.replace(" ", "").isalpha()
        return counted(self._value, spec) if noun else format(self._value, spec)


def lines(messages: Iterable[Message]) -> RenderableType:
    return Text("\n").join(map(line, messages))


def line(message: Message) -> Text:
    """The sentence as a line; a warning begins with the word, in yellow."""
    text = sentence(message)
    return Text(f"warning: {text}", "yellow") if isinstance(message, Warn) else Text(text)


def sentence(message: Message, table: Table | None = None) -> str:
    """What ``message`` says, in the language of ``table``, by default English."""
    entry = (ENGLISH if table is None else table)[message.kind]
    if callable(entry):
        return entry(**message.figures)
    return entry.format(**{name: _Figure(value) for name, value in message.figures.items()})


# -- a search under way -----------------------------------------------------------------------------------------------


def _slots(
    slots: int,
    workers: int,
    room: int,
    each: int,
    fit: int | None,
    rates: Mapping[int, Sequence[float]] | None = None,
    wanted: int = 0,
) -> str:
    memory = f"{size(room)} for {size(each)} a trial"
    if rates is None:
        why = f"{wanted} as given"
        if slots != wanted:
            why = f"{slots} of the {wanted} given: {memory if slots == fit else 'there are no more trials'}"
    else:
        found = [f"{n}: {max(seen):,.0f}{_spread(seen)}" for n, seen in rates.items()]
        limit = f"; no more than {fit} fit ({memory})" if fit is not None else ""
        why = f"tokens a second by number of slots: {', '.join(found)}{limit}"
    together = f"{slots} trials train together" if slots > 1 else "one trial at a time"
    return f"slots: {together}{f' on each of {workers} workers' if workers > 1 else ''} ({why})"


def _spread(rates: Sequence[float]) -> str:
    return f" ({min(rates):,.0f} to {max(rates):,.0f})" if len(rates) > 1 else ""


def _extended(added: int, trials: int, changed: Sequence[str]) -> str:
    more = f"{counted(added, 'more trial')}, {trials} in all" if added else "no more trials"
    return f"the search is extended: {more}{f'; other {shown(changed)}' if changed else ''}"


def _bar(metric: str, bar_words: str | None, bar: float | None) -> str:
    return "any answer that does not depend on the rows" if bar is None else f"{bar_words} ({bar:.3g})"


def _none_taken_off(share: float, trials: int, constant: bool) -> str:
    below = "that of the best constant answer" if constant else "that of its first steps"
    return (
        f"at {share:.0%} of the steps no trial has taken off yet (training loss below {below}): all {trials} continue"
    )


def _rung(
    share: float,
    taken_off: int,
    trials: int,
    promoted: Sequence[int],
    paused: Sequence[int],
    undecided: Sequence[int] = (),
) -> str:
    on = f"{shown(promoted)} continue" if len(promoted) > 1 else f"{shown(promoted)} continues"
    close = f" ({shown(undecided)}: too close to the best to stop)" if undecided else ""
    rest = f"; {shown(paused)} paused: others are better so far" if paused else ""
    return f"at {share:.0%} of the steps {taken_off} of {trials} trials have taken off: {on}{close}{rest}"


def _overtaken(winner: int, leader: int, share: float, resumed: Sequence[int], paused: Sequence[int]) -> str:
    told = f"looking back: at {share:.0%} of the steps trial {leader} was better than trial {winner}, which wins now"
    if not paused:
        return f"{told}; no paused trial was as close"
    left = [number for number in paused if number not in resumed]
    found = [f"{shown(resumed)} of those paused there train to their end as well"] if resumed else []
    found += [f"{shown(left)} of those paused there stay so: the budget is spent"] if left else []
    return f"{told}; {'; '.join(found)}"


SEARCH: Table = {
    "note": "{text}",
    "data": "{rows:,} rows to train on, {held_out:,} held out; {tokens:,} tokens an epoch, padding {padding:.1%}",
    "few_rows": (
        "{rows:row} for {part} are few: a share of them, such as accuracy, is known to within {margin:.2f} at best (95 "
        "%), so only large differences can be shown; more rows show smaller ones"
    ),
    "one_class_test": (
        "all {rows} test rows are labelled {label}, so the test says nothing of the others; keep more rows for it"
    ),
    "left_for_full": "not used by the search, but when the best is trained in full ({file}): {keys}",
    "resumed": "resuming in {folder}: {ended} of {trials} trials have ended",
    "extended": _extended,
    "time_over": lambda seconds, steps, finish, stopped: (
        f"the time is nearly over ({short(seconds)}, {steps:,} steps): "
        + (f"{shown(finish)} can still finish" if finish else "no trial can still finish")
        + (f", {counted(stopped, 'other')} cannot" if stopped and finish else "")
    ),
    "asked": lambda request, trial: (
        f"trial {trial} is stopped, as the user asked"
        if request == "stop"
        else f"trial {trial} is not paused at the rungs, as the user asked"
    ),
    "request_late": "--{request} {trial}: that trial has ended meanwhile",
    "kept": "trial {trial}, paused at step {step}, continues to its end: the user keeps it",
    "request_left": lambda requests, running: (
        f"{', '.join(f'--{kind} {trial}' for kind, trial in requests)}: "
        + (
            "the search does it after the step under way"
            if running
            else "no search runs there now, so it is done when the search is resumed"
        )
    ),
    "slots": _slots,
    "to_beat": lambda metric, **bar: f"to beat: {_bar(metric, **bar)} in {metric}",
    "started": lambda trial, params: f"trial {trial} starts: {settings(params)}",
    "restarted": "{error}; trial {trial} starts again from its first step",
    "failed": "trial {trial} failed: {reason}",
    "finished": "trial {trial} finished: {metric} {value:.4g}",
    "none_taken_off": _none_taken_off,
    "rung": _rung,
    "overtaken": _overtaken,
    "finalists": "finalists {trials}: again with {seeds:more seed} each",
    "leaders": "{trials} train to their end, and {seeds:more seed} of each beside them",
    "repeats_dropped": "not among the finalists: {trials}; their further seeds do not count",
    "paused_resume": lambda trials, **bar: (
        f"no finished trial is above {_bar(**bar)}: {shown(trials)} resume and train to their end"
    ),
    "out_of_memory": "out of memory: continuing with {slots:slot}",
    "worker_died": "worker {worker} died; its trials resume from their last saved state",
}

# -- a run ------------------------------------------------------------------------------------------------------------


def _threads(
    threads: int,
    instead: int,
    quota: float | None = None,
    allowed: int | None = None,
    cores: int = 0,
    load: float = 0.0,
) -> str:
    why = f" on {cores} cores whose load is {load:.1f}"
    if quota is not None:
        why = f", and the quota of this container is {quota:g} cores"
    elif allowed is not None:
        why = f", and it may use {allowed} cores"
    return (
        f"torch computes with {threads} threads{why}: threads that wait for a core hold up all others; set "
        f"OMP_NUM_THREADS={instead}"
    )


def _rate(rate: float, optim: str, lowest: float, highest: float) -> str:
    how, what = ("low", "the adapter will hardly change") if rate < lowest else ("high", "training may diverge")
    return f"a learning rate of {rate:g} is {how} for LoRA with {optim} (usual: {lowest:g} to {highest:g}): {what}"


def _trainable(parameters: int, total: int, modules: int, in_full: Sequence[str]) -> str:
    full = f", in full {', '.join(in_full)}" if in_full else ""
    return f"{parameters:,} of {total:,} parameters train: LoRA in {modules} modules{full}"


def _needs(total: int, base: int, free: int, seconds: float) -> str:
    return (
        f"memory {size(total)} (the frozen model {size(base)}, and {size(total - base)} more, of {size(free)} free), "
        f"time about {about(seconds)}"
    )


def _still_falling(before: float, last: float, rate: float | None, max_steps: int | None, epochs: float) -> str:
    longer = f"--max-steps {2 * max_steps}" if max_steps else f"--epochs {2 * epochs:g}"
    faster = f", or at a higher rate (--lr {rate:g})" if rate is not None else ""
    fall = f"{before:.3f} to {last:.3f}"
    return f"the held-out loss was still falling at the end ({fall}): train longer ({longer}){faster}"


RUN: Table = {
    "trainable": _trainable,
    "steps": "{steps:step}, {per_epoch:,} an epoch",
    "needs": _needs,
    "activations_unknown": "activation memory could not be estimated for this model",
    "too_large": (
        "that is more than there is: lower batch_size (and raise gradient_accumulation_steps by as much), or "
        "max_length, or give --gradient-checkpointing or dtype bfloat16"
    ),
    "still_falling": _still_falling,
    "run_resumed": "resuming from {path}, after step {step:,} of {steps:,}",
    "already_finished": "{folder}: finished after {steps:,} steps; nothing is left to do",
    "no_checkpoint": (
        "the run in {folder} that ended early, after step {step:,}, left no whole checkpoint: training starts afresh"
    ),
    "skipped": lambda what, why="": f"{what} is skipped: {why}" if why else f"{what}; it is skipped",
    "replaced": "{error}; it is replaced (overwrite)",
    "rounding": lambda where, changes: (
        f"since {where} was written, {'; '.join(changes)}: the last bits of the result may differ"
    ),
    "stopped_early": "stopped early, after step {step:,} of {steps:,}: {reason}",
    "best_taken": "the adapter is that of step {step:,}: {metric} {value:.4g}",
    "threads": _threads,
    "rate": _rate,
    "experts": lambda experts, names: (
        f"{experts} are not adapted" + (f": target_parameters={names} would adapt them" if names else "")
    ),
    "tied": (
        "the adapter changes the {changed} embeddings alone, whose weight is tied to the {other} embeddings: merged, "
        "they would no longer be one weight. To train both as one, name both in modules_to_save"
    ),
    "dtype": (
        "this processor has no instructions for {dtype}: adapted layers run in float32, all others will be very slow. "
        "Use dtype float32 if there is enough memory, else target_modules all-linear"
    ),
    "overflow": "float16 on a CPU overflows early: use bfloat16 or float32",
    "end": (
        "the tokenizer ends a text with token {token} ({name!r}), and the model's config names {model}: generation may "
        "not stop where training did"
    ),
    "pad": (
        "the pad token is the end token ({name!r}); the end of a text is learned all the same, for padding is known by "
        "its position here"
    ),
    "batch": "a step takes {batch_size:row}, and there are {rows}: every step sees the same rows",
    "short": "{steps:step} in all: an adapter hardly learns in so few",
}

ENGLISH: Table = {**SEARCH, **VERDICT, **ADVICE, **RUN}
