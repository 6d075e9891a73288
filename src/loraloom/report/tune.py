"""What a search says in the terminal: who is running, who leads, and in the end what to use and why."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table

from loraloom.files.sizes import size
from loraloom.report.screen import Text
from loraloom.tasks.metrics.registry import greater_is_better
from loraloom.tune.bar import Gain
from loraloom.tune.format import label, params, shown
from loraloom.tune.ranking import Score, last_measured, measured, originals, ranking, scores, varying
from loraloom.tune.trial import Trial
from loraloom.tune.verdict import Verdict, difference

#: Characters of a hyperparameter's value in a table.
WIDE = 12
#: Columns that a whole leaderboard with five hyperparameters needs.
FULL_WIDTH = 100
#: Seconds between two pictures of the live view.
REFRESH = 0.25
#: Rows of the leaderboard below the running trials.
TOP = 5
#: Lines of the live view that are not running trials.
AROUND = TOP + 6
#: Steps that the shown training loss is the mean of.
SMOOTH = 10


def leaderboard(
    found: Verdict | Sequence[Trial], metric: str, rows: int | None = None, width: int = FULL_WIDTH
) -> Table:
    """All configurations, or the first ``rows``, best first. Only hyperparameters that vary get a column.

    With five of them it fits ``FULL_WIDTH`` columns; below that the adapter's bytes are left out and words are cut.
    """
    trials = found.trials if isinstance(found, Verdict) else found
    known = found.scores if isinstance(found, Verdict) else scores(trials, metric)
    order = found.ranking if isinstance(found, Verdict) else ranking(trials, metric, known)
    groups = originals(trials)
    names = varying(trials)
    full = width >= FULL_WIDTH
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("trial", justify="right", no_wrap=True)
    words = [name for name in names if any(isinstance(t.values.get(name), str | list) for t in trials)]
    for name in names:
        table.add_column(_cut(label(name)), justify="left" if name in words else "right", no_wrap=name not in words)
    for head in (metric, "params", *(["adapter"] if full else []), "time"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for place, number in enumerate(order[:rows]):
        trial, score = groups[number][0], known[number]
        table.add_row(
            str(number),
            *(_cut(shown(trial.values[name], WIDE) if name in trial.values else "") for name in names),
            figure(score.mean, score.noise),
            count(trial.parameters),
            *([size(trial.bytes) if trial.bytes else ""] if full else []),
            duration(sum(t.seconds for t in groups[number]) / len(groups[number])),
            state(trial, score),
            style="bold" if place == 0 and score.values else "dim" if trial.state in ("stopped", "failed") else "",
        )
    return table


def _cut(text: str) -> Text:
    """Cut, not wrapped, where its column is too narrow: rich narrows these columns first."""
    return Text(text, no_wrap=True, overflow="ellipsis")


def state(trial: Trial, score: Score) -> str:
    """``"finished ×3"``, three seeds; ``"stopped 33%"``, a third of the way."""
    if trial.state == "finished":
        return "finished" + (f" ×{len(score.values)}" if len(score.values) > 1 else "")
    return f"{trial.state} {trial.step / max(trial.steps, 1):.0%}"


def figure(value: float, noise: float | None = None) -> str:
    """``"0.801 ±0.006"``; as many digits as the noise needs."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:.3g}"
    digits = 4 if noise and noise < 0.0005 else 3
    return f"{value:.{digits}f}" + (f" ±{noise:.{digits}f}" if noise and round(noise, digits) else "")


def count(number: float) -> str:
    """``"295k"``, ``"1.18M"``."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """``"41 s"``, ``"12:34"``, ``"1:02:03"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


# The end --------------------------------------------------------------------------------------------------


def conclusion(found: Verdict) -> RenderableType:
    """What to use, what comes next to it, which hyperparameters mattered, and what to try next."""
    best = found.scores[found.best.number]
    if not found.learned:
        return _nothing(found, best)
    lines = [
        Text(f"use {_settings(found.best, found.params)}", "bold"),
        Text(f"trial {found.best.number}: {_reached(found.metric, best)}, {_extent(found.best)}"),
    ]
    if found.gain is not None:
        lines.append(Text(_above(found.gain)))
    if found.runner_up is not None:
        lines.append(Text(_beside(found, found.runner_up)))
    if found.why and (found.tie or found.runner_up is None):
        lines.append(Text(f"why: {found.why}"))
    lines += [Text(f"note: {note}", "yellow") for note in found.notes]
    lines.append(Text(_importance(found)))
    return _with_advice(lines, found, "what to try next")


def _nothing(found: Verdict, best: Score) -> RenderableType:
    """No configuration is recommended: what the best of them reached, what it had to beat, and what to change."""
    number, beat = found.best.number, found.gain
    reached = f"trial {number} ({_settings(found.best, found.params)}), {_reached(found.metric, best)}"
    lines = [Text("nothing was learned: no configuration is recommended", "bold yellow")]
    lines.append(Text(f"the best of them is {reached}" + (f"; {_above(beat)}" if beat is not None else "")))
    lines += [Text(f"note: {note}", "yellow") for note in found.notes]
    return _with_advice(lines, found, "what to change")


def _with_advice(lines: Sequence[Text], found: Verdict, title: str) -> RenderableType:
    parts: list[RenderableType] = [Text("\n").join(lines)]
    if found.advice:
        parts.append(Text(f"\n{title}", "bold"))
        for advice in found.advice:
            bullet = Table.grid(padding=(0, 1, 0, 0))
            bullet.add_row("•", Text(advice.text))
            parts.append(bullet)
    return Padding(Group(*parts), (1, 0, 0, 0))


def _above(beat: Gain) -> str:
    """``"0.43 ± 0.05 above always 'a' (accuracy 0.333), by the held-out rows"``."""
    error = f" ± {_gap(beat.error)}" if math.isfinite(beat.error) and beat.error else ""
    greater = greater_is_better(beat.metric) == (beat.gain > 0)
    far = f"{_gap(abs(beat.gain))}{error} {'above' if greater else 'below'}" if beat.gain else "no better than"
    return f"{far} {beat.bar_words} ({beat.metric} {figure(beat.bar)}), by the held-out rows"


def _settings(trial: Trial, names: Iterable[str]) -> str:
    """The hyperparameters as ``train`` takes them: alpha as the number that it came to."""
    lora = trial.options.lora
    alpha = f"{lora.lora_alpha:g}{' with rslora' if lora.use_rslora else ''}"
    values = {name: alpha if name.endswith("lora_alpha") else value for name, value in trial.values.items()}
    return params(values, names, between=", ")


def _reached(metric: str, score: Score) -> str:
    seeds = f" over {len(score.values)} seeds" if len(score.values) > 1 else ""
    # A noise of 0 is that of seeds that all did the same: it says nothing.
    return f"{metric} {figure(score.mean)}" + (f" ± {_gap(score.noise)}" if score.noise else "") + seeds


def _extent(trial: Trial) -> str:
    return f"{trial.parameters:,} parameters" + (f", {size(trial.bytes)}" if trial.bytes else "")


def _beside(found: Verdict, other: Trial) -> str:
    """The runner-up against the best: its size and its distance."""
    mine, its = found.scores[found.best.number], found.scores[other.number]
    gap = its.mean - mine.mean
    ratio = other.parameters / max(found.best.parameters, 1)
    extent = "of the same size" if 0.95 < ratio < 1.05 else f"{ratio:.2g} times the size"
    if ratio <= 0.95:
        words = {2: "half the size", 3: "a third of the size", 4: "a quarter of the size"}
        near = [text for part, text in words.items() if abs(ratio * part - 1) < 0.1]
        extent = near[0] if near else f"{ratio:.0%} of the size"
    where = "equal to it" if gap == 0 else f"{_gap(abs(gap))} {'above' if gap > 0 else 'below'}"
    noise = difference(mine, its)
    tie = f": a tie within the noise of {_gap(noise)}" if found.tie and noise else ": a tie" if found.tie else ""
    settings = _settings(other, found.params)
    return f"runner-up, trial {other.number} ({settings}): {_reached(found.metric, its)}; {extent}, {where}{tie}"


def _gap(value: float) -> str:
    return figure(value) if value >= 0.0005 else f"{value:.1g}"


def _importance(found: Verdict) -> str:
    if not found.importance:
        return f"which hyperparameters mattered cannot be told: {found.importance_reason}"

    def listed(names: Iterable[str]) -> str:
        return ", ".join(f"{label(name)} {found.importance[name]:.0%}" for name in names)

    rest = [name for name in found.importance if name not in found.mattered]
    if not found.mattered:
        return f"which hyperparameters mattered: none more than chance would have it ({listed(rest)})"
    return f"what mattered: {listed(found.mattered)}" + (f"; no more than chance: {listed(rest)}" if rest else "")


# While it runs --------------------------------------------------------------------------------------------


class TuneMeter:
    """The live view of a search: a picture that redraws itself in a terminal, a line an evaluation elsewhere.

    Args:
        metric: the one that trials are compared by.
        clock: seconds, to redraw at most every ``REFRESH`` of them.
    """

    def __init__(self, console: Console, metric: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.metric, self.clock = console, metric, clock
        self.drawn = -math.inf
        #: trial → evaluations that a line was printed for
        self.seen: dict[int, int] = {}
        self.live = (
            Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
            if console.is_terminal
            else None
        )

    def __enter__(self) -> TuneMeter:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def event(self, text: str) -> None:
        """One line that stays: a trial began, was stopped, finished."""
        self.console.print(Text(text), soft_wrap=True)

    def update(
        self,
        running: Sequence[Trial],
        trials: Sequence[Trial],
        slots: int,
        tokens_per_second: float,
        seconds_left: float | None,
    ) -> None:
        """Show where the search stands. ``slots`` are all there are, ``running`` those that are full."""
        if self.live is None:
            self._lines(running, trials)
        elif (now := self.clock()) - self.drawn >= REFRESH:
            self.drawn = now
            self.live.update(self._picture(running, trials, slots, tokens_per_second, seconds_left), refresh=True)

    def _lines(self, running: Sequence[Trial], trials: Sequence[Trial]) -> None:
        active, names = {trial.number for trial in running}, varying(trials)
        for trial in trials:
            done = len(trial.curve.evaluations)
            # Of a trial not seen before, as after a search was resumed, the past is not told again.
            known = self.seen.get(trial.number, max(done - 1, 0) if trial.number in active else done)
            self.seen[trial.number] = done
            if done > known:
                gain = improvement(trial, self.metric)
                words = params(trial.values, names, WIDE)
                value = last_measured(trial, self.metric)
                self.event(
                    f"trial {trial.number} ({words}) step {trial.step}/{trial.steps}: training loss "
                    f"{figure(training_loss(trial))}, {self.metric} {figure(value[1] if value else math.nan)}"
                    + (f" ({gain:+.3g} in 100 steps)" if gain is not None else "")
                )

    def _picture(
        self,
        running: Sequence[Trial],
        trials: Sequence[Trial],
        slots: int,
        tokens_per_second: float,
        seconds_left: float | None,
    ) -> RenderableType:
        states = [trial.state for trial in trials]
        counted = [f"{states.count(s)} {s}" for s in ("finished", "stopped", "failed", "waiting") if s in states]
        left = f"{duration(seconds_left)} left" if seconds_left is not None else ""
        parts = [f"slots {len(running)}/{slots}", f"{tokens_per_second:,.0f} tokens/s", left, ", ".join(counted)]
        head = Text(" · ".join(part for part in parts if part), "bold", no_wrap=True, overflow="ellipsis")
        room = max(self.console.height - AROUND, 3)
        table = self._running(running[:room], varying(trials))
        more = Text(f"and {len(running) - room} more", "dim") if len(running) > room else Text("")
        ranked: list[RenderableType] = [head, table, more]
        if any(score.values for score in scores(trials, self.metric).values()):
            ranked.append(leaderboard(trials, self.metric, TOP, self.console.width))
        return Group(*ranked)

    def _running(self, running: Sequence[Trial], names: Sequence[str]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("running", justify="right", no_wrap=True)
        table.add_column("hyperparameters")
        for name in ("r", "step", "loss", self.metric, "per 100"):
            table.add_column(name, justify="right", no_wrap=True)
        for trial in running:
            value, gain = last_measured(trial, self.metric), improvement(trial, self.metric)
            table.add_row(
                str(trial.number),
                _cut(params(trial.values, [name for name in names if name != "lora.r"], WIDE)),
                str(trial.options.lora.r),
                f"{trial.step}/{trial.steps}",
                figure(training_loss(trial)),
                figure(value[1]) if value else "–",
                f"{gain:+.3g}" if gain is not None else "–",
            )
        return table


def training_loss(trial: Trial) -> float:
    """The mean of the last steps; NaN before the first, and when one of them was not finite."""
    last = [math.nan if loss is None else loss for loss in trial.curve.loss[-SMOOTH:]]
    return fmean(last) if last else math.nan


def improvement(trial: Trial, metric: str) -> float | None:
    """Change of the metric between the last two evaluations, per 100 steps."""
    if len(trial.curve.evaluations) < 2:
        return None
    before, last = trial.curve.evaluations[-2:]
    change, steps = measured(last, metric) - measured(before, metric), last["step"] - before["step"]
    return 100 * change / steps if steps > 0 and math.isfinite(change) else None
