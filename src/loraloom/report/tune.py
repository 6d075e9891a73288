"""A search in the terminal: the running trials, the leaderboard, and in the end what to use and why."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table

from loraloom.files.sizes import size
from loraloom.messages import Message
from loraloom.report.format import count, duration, figure, label, params, shown
from loraloom.report.screen import Text
from loraloom.report.sentences import line, sentence
from loraloom.tuning.executor import SearchStatus
from loraloom.tuning.final_test import FinalTest
from loraloom.tuning.judge import Against
from loraloom.tuning.ranking import Score, originals, ranking, scores, varying
from loraloom.tuning.selection import difference, rows_trained
from loraloom.tuning.smaller import Cuts
from loraloom.tuning.trial import Trial
from loraloom.tuning.verdict import Verdict

#: Characters of a hyperparameter's value in a table.
WIDE = 12
#: Columns of a terminal whose width is not known.
WIDTH = 100
#: Seconds between two pictures of the live view.
REFRESH = 0.25
#: Rows of the leaderboard below the running trials.
TOP = 5
#: Lines of the live view that are not running trials.
AROUND = TOP + 6
#: Steps that the shown training loss is the mean of.
SMOOTH = 10
#: Configurations of the front that are named.
FRONT = 3
#: Steps between two evaluations that an improvement needs.
SLOPE_STEPS = 20


# -- tables -----------------------------------------------------------------------------------------------------------


@dataclass
class Column:
    """``drop``: columns with more of it go first if a table is too wide; 0 stays, a hyperparameter always."""

    head: str
    cells: list[str]
    words: bool = False
    drop: int = 0

    @property
    def width(self) -> int:
        return max(map(len, [self.head, *self.cells]))


def _table(columns: Sequence[Column], width: int, styles: Sequence[str] = ()) -> Table:
    kept = list(columns)
    while sum(column.width + 1 for column in kept) - 1 > width and any(column.drop for column in kept):
        kept.remove(max(kept, key=lambda column: column.drop))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in kept:
        # Words are cut, not wrapped, if it is still too wide: rich narrows these columns first.
        justify, cut = ("left", "ellipsis") if column.words else ("right", None)
        table.add_column(Text(column.head), justify=justify, no_wrap=not column.words)  # type: ignore[arg-type]
        column.cells = [Text(cell, no_wrap=True, overflow=cut) for cell in column.cells]  # type: ignore[misc]
    for number, row in enumerate(zip(*(column.cells for column in kept), strict=True)):
        table.add_row(*row, style=styles[number] if styles else "")
    return table


def _params_columns(trials: Sequence[Trial], names: Iterable[str]) -> list[Column]:
    return [
        Column(
            label(name),
            [shown(trial.values[name], WIDE) if name in trial.values else "" for trial in trials],
            words=any(isinstance(trial.values.get(name), str | list) for trial in trials),
        )
        for name in names
    ]


def leaderboard(found: Verdict | Sequence[Trial], metric: str, rows: int | None = None, width: int = WIDTH) -> Table:
    """All configurations, or the first ``rows``, best first, with the hyperparameters that vary."""
    trials = found.trials if isinstance(found, Verdict) else found
    known = found.scores if isinstance(found, Verdict) else scores(trials, metric)
    order = (found.ranking if isinstance(found, Verdict) else ranking(trials, metric, known))[:rows]
    groups = originals(trials)
    firsts = [groups[number][0] for number in order]
    times = [fmean(trial.seconds for trial in groups[number]) for number in order]
    columns = [
        Column("trial", list(map(str, order))),
        *_params_columns(firsts, varying(trials)),
        Column(metric, [figure(known[number].mean, known[number].error) for number in order]),
        Column("params", [count(trial.parameters) for trial in firsts], drop=1),
        Column("adapter", [size(trial.bytes) if trial.bytes else "" for trial in firsts], drop=3),
        Column("time", list(map(duration, times)), drop=2),
        Column("state", [state(trial, known[number]) for number, trial in zip(order, firsts, strict=True)], words=True),
    ]
    styles = ["dim" if trial.state in ("stopped", "failed") else "" for trial in firsts]
    if order and known[order[0]].values:
        styles[0] = "bold"
    return _table(columns, width, styles)


def state(trial: Trial, score: Score) -> str:
    """``"finished ×3"``, three seeds; ``"stopped 33%"``, a third of the way."""
    if trial.state == "finished":
        return "finished" + (f" ×{len(score.values)}" if len(score.values) > 1 else "")
    return f"{trial.state} {trial.step / max(trial.steps, 1):.0%}"


# -- the end ----------------------------------------------------------------------------------------------------------


def conclusion(found: Verdict) -> RenderableType:
    """What to use, how it compares, which hyperparameters mattered, and what to try next."""
    best = found.best
    notes = [Text(f"note: {sentence(note)}", "yellow") for note in found.notes]
    if not found.recommended:
        first = Message("not_above_head") if found.learned else Message("nothing_learned")
        lines = [Text(sentence(first), "bold yellow"), Text(sentence(_trial(found, _settings(found, best))))]
        lines += map(Text, [*_beside_baseline(found), *_tested(found)])
        return _with_advice([*lines, *notes], found, "what to change")
    use = Message("use", params=_settings(found, best), unadapted=best.unadapted)
    lines = [Text(sentence(use), "bold"), Text(sentence(_trial(found)))]
    lines += map(Text, [*_beside_baseline(found), *_beside_runner_up(found), *_cut(found), *_tested(found)])
    lines += map(Text, _others(found))
    if found.tie or found.runner_up is None or found.why.kind == "preferred":
        lines.append(Text(f"why: {sentence(found.why)}"))
    return _with_advice([*lines, *notes, Text(_mattered(found))], found, "what to try next")


def _trial(found: Verdict, settings: dict[str, Any] | None = None) -> Message:
    best, one = found.best, found.figure
    extent = {"trial": best.number, "parameters": best.parameters, "bytes": best.bytes, "params": settings}
    interval = [] if one is None else [one.value, one.low, one.high]
    reached = _reached(found.metric, found.scores[best.number])
    return Message("trial", **extent, rows=found.rows, interval=interval, **reached)


def _beside_baseline(found: Verdict) -> list[str]:
    """The best beside the hardest baseline, on the rows that chose it."""
    return [sentence(_against(one, one.words)) for one in found.against if one.trial is None][:1]


def _beside_runner_up(found: Verdict) -> list[str]:
    second, best = found.runner_up, found.best
    if second is None:
        return []
    rival = next((one for one in found.against if one.trial is not None), None)
    ratio = second.parameters / max(best.parameters, 1)
    figures = {"trial": second.number, "params": _settings(found, second), "ratio": ratio}
    if rival is None:
        mine, its = found.scores[best.number], found.scores[second.number]
        away = {"distance": its.mean - mine.mean, "tie": found.tie, "tie_noise": difference(mine, its)}
        away |= _reached(found.metric, its)
        return [sentence(Message("runner_up", **figures, **away))]
    compared = {name: value for name, value in _against(rival, "").figures.items() if name != "what"}
    return [sentence(Message("runner_up_is", **figures, compared=compared))]


def _cut(found: Verdict) -> list[str]:
    return [] if found.cuts is None else [sentence(one) for one in cut_messages(found.cuts, found.metric)]


def _tested(found: Verdict) -> list[str]:
    """The best on the rows that chose nothing, beside the hardest baseline and, if it is recommended, the runner-up."""
    if found.test is None:
        return []
    against = found.test.against
    shown = [one for one in against if one.trial is None][:1]
    if found.recommended:
        shown += [one for one in against if one.trial is not None]
    return [sentence(one) for one in final_test_messages(replace(found.test, against=shown))]


def _others(found: Verdict) -> list[str]:
    """Those of the front that cost less than the best."""
    best = found.best
    costs = {number: rows_trained(found.trial(number)) for number in [best.number, *found.front]}

    def less(number: int) -> bool:
        return costs[number] < costs[best.number] or found.trial(number).parameters < best.parameters

    others = [number for number in found.front if number in found.able and number != best.number and less(number)]
    vary = len({costs[number] for number in [best.number, *others]}) > 1
    entries = [
        {
            "trial": number,
            "value": found.scores[number].mean,
            "bytes": found.trial(number).bytes,
            "rows": costs[number] if vary else None,
        }
        for number in others[:FRONT]
    ]
    return [sentence(Message("also", others=entries, metric=found.metric))] if entries else []


def _with_advice(lines: Sequence[Text], found: Verdict, title: str) -> RenderableType:
    parts: list[RenderableType] = [Text("\n").join(lines)]
    if found.advice:
        parts.append(Text(f"\n{title}", "bold"))
        for advice in found.advice:
            bullet = Table.grid(padding=(0, 1, 0, 0))
            bullet.add_row("•", Text(sentence(advice)))
            parts.append(bullet)
    return Padding(Group(*parts), (1, 0, 0, 0))


def cut_messages(cuts: Cuts, metric: str) -> list[Message]:
    """The lower rank and the other scale that are offered."""
    messages = []
    if cuts.offered is not None:
        messages.append(Message("smaller", name=metric, adapter=cuts.adapter, **asdict(cuts.offered)))
    if cuts.scaled is not None:
        more = {"name": metric, "adapter": cuts.scaled_adapter, "scales": len(cuts.scales)}
        messages.append(Message("scaled", **more, **asdict(cuts.scaled)))
    return messages


def final_test_messages(test: FinalTest) -> list[Message]:
    """The winner on rows that chose nothing, and beside each of the others."""
    one = test.figure
    reached = {"metric": test.metric, "value": one.value, "low": one.low, "high": one.high}
    names = [other.words or f"the runner-up, trial {other.trial}" for other in test.against]
    return [
        Message("tested", rows=test.rows, seeds=test.seeds, **reached),
        *(_against(other, name) for other, name in zip(test.against, names, strict=True)),
    ]


def _against(other: Against, what: str) -> Message:
    better = other.better
    return Message(
        "against",
        what=what,
        figures=[other.figure.value, other.figure.low, other.figure.high],
        better=[better.value, better.low, better.high],
        rows=better.rows,
        seeds=better.seeds,
        needed=better.rows_needed,
        clear=better.clear,
    )


def _settings(found: Verdict, trial: Trial) -> dict[str, Any]:
    """The hyperparameters as ``train`` takes them: alpha as the number that it came to."""
    lora = trial.options.lora
    alpha = f"{lora.lora_alpha:g}{' with rslora' if lora.use_rslora else ''}"
    return {
        name: alpha if name.endswith("lora_alpha") else trial.values[name]
        for name in found.params
        if name in trial.values
    }


def _reached(metric: str, score: Score) -> dict[str, Any]:
    return {"metric": metric, "value": score.mean, "noise": score.noise, "seeds": len(score.values)}


def _mattered(found: Verdict) -> str:
    if found.importance_reason is not None:
        return f"which hyperparameters mattered is unknown: {sentence(found.importance_reason)}"
    mattered = {name: found.importance[name] for name in found.mattered}
    rest = {name: share for name, share in found.importance.items() if name not in mattered}
    return sentence(Message("mattered", mattered=mattered, rest=rest))


# -- while it runs ----------------------------------------------------------------------------------------------------


class NewEvaluations:
    """Which trials were evaluated since the last look. Evaluations from before a resume are not new."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def of(self, trials: Iterable[Trial], running: Container[int]) -> list[Trial]:
        """Those of ``trials``, some of which are ``running`` now."""
        found = []
        for trial in trials:
            done = len(trial.curve.evaluations)
            known = self._seen.get(trial.number, max(done - 1, 0) if trial.number in running else done)
            self._seen[trial.number] = done
            if done > known:
                found.append(trial)
        return found


class TuneMeter:
    """The live view of a search: a picture that redraws itself in a terminal, a line for each evaluation elsewhere.

    Args:
        clock: seconds, to redraw at most every ``REFRESH`` of them.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.drawn = -math.inf
        self.new = NewEvaluations()
        self.live = (
            Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
            if console.is_terminal
            else None
        )

    def __enter__(self) -> TuneMeter:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def event(self, message: Message) -> None:
        """One line that stays: a trial starts, is paused, finishes."""
        self.console.print(line(message), soft_wrap=True)

    def update(self, status: SearchStatus) -> None:
        """Show where the search stands."""
        if self.live is None:
            self._lines(status)
        elif (now := self.clock()) - self.drawn >= REFRESH:
            self.drawn = now
            self.live.update(self.picture(status), refresh=True)

    def _lines(self, status: SearchStatus) -> None:
        names = varying(status.trials)
        for trial in self.new.of(status.trials, {trial.number for trial in status.running}):
            self.console.print(Text(_line(trial, names, status)), soft_wrap=True)

    def picture(self, status: SearchStatus) -> RenderableType:
        """What the live view shows of ``status``."""
        states = [trial.state for trial in status.trials]
        counted = [f"{states.count(s)} {s}" for s in ("finished", "stopped", "failed", "waiting") if s in states]
        speed = f"{status.tokens_per_second:,.0f} tokens/s"
        parts = [f"slots {len(status.running)}/{status.slots}", speed, _left(status), ", ".join(counted)]
        head = Text(" · ".join(part for part in parts if part), "bold", no_wrap=True, overflow="ellipsis")
        room = max(self.console.height - AROUND, 3)
        table = _running(status.running[:room], varying(status.trials), status.metric, self.console.width)
        hidden = len(status.running) - room
        shown: list[RenderableType] = [head, table, Text(f"and {hidden} more" if hidden > 0 else "", "dim")]
        if any(score.values for score in scores(status.trials, status.metric).values()):
            shown.append(leaderboard(status.trials, status.metric, TOP, self.console.width))
        return Group(*shown)


def _running(running: Sequence[Trial], names: Sequence[str], metric: str, width: int) -> Table:
    values = [trial.points(metric) for trial in running]
    columns = [
        Column("running", [str(trial.number) for trial in running]),
        *_params_columns(running, names),
        Column("step", [f"{trial.step}/{trial.steps}" for trial in running]),
        Column("loss", [figure(training_loss(trial)) for trial in running]),
        Column(metric, [figure(points[-1][1] if points else math.nan) for points in values]),
    ]
    return _table(columns, width)


def _line(trial: Trial, names: Sequence[str], status: SearchStatus) -> str:
    gain, left = improvement(trial, status.metric), _left(status)
    return (
        f"trial {trial.number} ({params(trial.values, names, WIDE, between=' ')}) step {trial.step} of {trial.steps}: "
        f"training loss {figure(training_loss(trial))}, {status.metric} {figure(trial.points(status.metric)[-1][1])}"
        + (f" ({gain:+.3g} in 100 steps)" if gain is not None else "")
        + (f"; {left}" if left else "")
    )


def _left(status: SearchStatus) -> str:
    return "" if status.seconds_left is None else f"{duration(status.seconds_left)} left"


def training_loss(trial: Trial) -> float:
    """The mean of the last steps; NaN before the first, and when one of them was not finite."""
    last = [math.nan if loss is None else loss for loss in trial.curve.loss[-SMOOTH:]]
    return fmean(last) if last else math.nan


def improvement(trial: Trial, metric: str) -> float | None:
    """Change of the metric between the last two evaluations, per 100 steps; None if they are too near each other."""
    points = trial.points(metric)
    if len(points) < 2:
        return None
    (before, old), (step, new) = points[-2:]
    change, steps = new - old, step - before
    return 100 * change / steps if steps >= SLOPE_STEPS and math.isfinite(change) else None
