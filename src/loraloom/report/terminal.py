"""A run in the terminal: what will train, how it goes, what came out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from loraloom.config.lora import LoraConfig
from loraloom.files import resources
from loraloom.files.sizes import size
from loraloom.lora.inspection import ENERGY, Inspection
from loraloom.messages import Message, Warn
from loraloom.report.format import counted, duration
from loraloom.report.screen import Text
from loraloom.report.sentences import line, lines
from loraloom.training.preflight.rates import HIGHEST, falls

if TYPE_CHECKING:
    from loraloom.data.table.scan import OnProgress
    from loraloom.engine.loop import StepEvent
    from loraloom.training.preflight.estimate import ResourceEstimate
    from loraloom.training.preflight.memory import Memory
    from loraloom.training.setup import TrainJob
    from loraloom.training.trainer import RunResult

#: Characters of an example's text in the list of predictions.
SHOWN = 100
#: Seconds between two lines of progress in a log.
TELL = 15.0
#: From this many columns on the bar has room for the rate and the memory.
WIDE = 100


def overview(job: TrainJob) -> RenderableType:
    """What will be trained on what, and what was done to the rows."""
    data, made = job.data, job.plan
    messages = [
        *(Message("note", text=note) for note in made.notes),
        *data.messages(),
        Message(
            "trainable",
            parameters=made.parameters,
            total=made.base_parameters + made.parameters,
            modules=len(made.targets),
            in_full=[extra.name for extra in made.saved],
        ),
        Message("steps", steps=job.steps, per_epoch=job.steps_per_epoch),
    ]
    return lines(messages)


def expectations(findings: Sequence[Message], needs: ResourceEstimate) -> RenderableType:
    """What training will take, and what may go wrong."""
    memory = needs.memory
    figures = {"total": memory.total, "base": memory.base, "free": needs.free, "seconds": needs.seconds}
    messages = [Message("needs", **figures)]
    if needs.logits:
        messages.append(Message("note", text=needs.logits))
    if memory.activations is None:
        messages.append(Warn("activations_unknown"))
    if not needs.fits:
        messages.append(Warn("too_large"))
    return lines([*messages, *findings])


@contextlib.contextmanager
def reading(console: Console, clock: Callable[[], float] = time.monotonic) -> Iterator[OnProgress]:
    """The callback of rows that are read and tokenised: a live line in a terminal, one line now and then elsewhere."""
    status = console.status("reading") if console.is_terminal else None
    printed = clock()

    def progress(what: str, done: int, total: int | None) -> None:
        nonlocal printed
        line = f"{done:,} {what}" if total is None else f"{done:,} of {total:,} {what}"
        if status is not None:
            status.update(line)
        elif clock() - printed >= TELL:
            printed = clock()
            console.print(Text(line))

    with status or contextlib.nullcontext():
        yield progress


class Meter:
    """The callback ``on_step`` of a terminal: a live bar, or a line now and then and for each evaluation elsewhere."""

    def __init__(self, console: Console, steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.loss: float | None = None
        self.measured: dict[str, float] = {}
        #: the first step that was seen and when, for the time left; when a line was printed
        self.first, self.printed = (0, 0.0), clock()
        # All of it fits in 80 columns; a wider bar would push out the figures.
        self.bar = Bar(
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=steps, figures="")

    def __enter__(self) -> Meter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, event: StepEvent) -> None:
        now = self.clock()
        if self.loss is None:  # the time left follows from the steps of this start, not from those before a resume
            self.bar.reset(self.task, completed=event.step - 1)
            self.first = event.step, now
        self.loss = event.loss if self.loss is None else 0.9 * self.loss + 0.1 * event.loss
        self.measured = event.evaluation or self.measured
        speed = f"{event.tokens / event.seconds:,.0f} tokens/s"
        state = [f"rate {event.learning_rate:.2g}", size(memory_used())]
        figures = [f"loss {self.loss:.3f}", *_figures({k: v for k, v in self.measured.items() if k != "loss"})[:1]]
        figures += state if self.console.width >= WIDE else []
        self.bar.update(self.task, completed=event.step, figures="  ".join([*figures, speed]))
        if event.evaluation or (not self.console.is_terminal and now - self.printed >= TELL):
            self.printed = now
            parts = [f"training loss {self.loss:.3f}", *_figures(event.evaluation or {}), *state, speed]
            left = self._left(event, now)
            parts += [f"{duration(left)} left"] if left is not None else []
            self.console.print(Text(f"step {event.step:,} of {event.steps:,}: {', '.join(parts)}"), soft_wrap=True)

    def _left(self, event: StepEvent, now: float) -> float | None:
        """Seconds to the last step; None before two steps were seen."""
        done = event.step - self.first[0]
        return (event.steps - event.step) * (now - self.first[1]) / done if done > 0 else None


def _figures(evaluation: dict[str, float]) -> list[str]:
    """``["held-out loss 0.5", "accuracy 0.8"]``."""
    return [f"{'held-out loss' if key == 'loss' else key} {value:.3f}" for key, value in evaluation.items()]


def memory_used() -> int:
    """Bytes that this process holds: on the accelerator if there is one."""
    import torch

    return int(torch.cuda.memory_reserved()) if torch.cuda.is_available() else resources.memory_used()


def outcome(result: RunResult, folder: str | Path, plot: Path, record_path: Path) -> RenderableType:
    """The end of a run: the figures, where the files are, and three predictions."""
    record = result.record
    figures = ", ".join(_figures(record["result"]))
    head = Text(f"\n{figures} after {counted(record['steps'], 'step')} in {record['seconds']:.0f} s", "bold")
    files = Text(f"adapter {folder}\nrecord  {record_path}\ncurves  {plot}\n")
    return Group(head, *map(line, _still_falling(record)), files, predictions(result.predictions))


def _still_falling(record: Mapping[str, Any]) -> Iterator[Message]:
    """What to do if the held-out loss was still falling at the end of a run."""
    if found := falls(record["curve"]["evaluations"]):
        options, rate = record["options"], 2 * record["options"]["learning_rate"]
        figures = {"before": found[0], "last": found[1], "rate": rate if rate <= HIGHEST else None}
        yield Warn("still_falling", **figures, max_steps=options["max_steps"], epochs=options["epochs"])


def memory_table(memory: Memory) -> str:
    """What a training step needs, part by part."""
    parts = {"frozen model": memory.base, "adapter": memory.adapter, "its gradients": memory.gradients}
    parts |= {"AdamW": memory.optimizer}
    if memory.activations is not None:
        parts["kept for backward"] = memory.activations
    lines = [f"  {name:18} {size(count):>10}" for name, count in {**parts, "in all": memory.total}.items()]
    note = "" if memory.activations is not None else " and activation memory, which could not be estimated"
    return "\n".join(lines) + note


def inspection(folder: str, found: Inspection) -> str:
    """An adapter: its config where it differs from the defaults, its size, and the update of each module."""
    config, defaults = found.config.to_dict(), LoraConfig().to_dict()
    lines = [
        f"{folder}: {found.parameters:,} parameters, {size(found.bytes)}",
        f"base model: {config['base_model_name_or_path']}; dtype {', '.join(found.dtypes)}",
    ]
    shown = ("r", "lora_alpha", "lora_dropout", "target_modules")
    more = [key for key in config if config[key] != defaults[key] and key not in (*shown, "base_model_name_or_path")]
    lines += [f"  {key}: {config[key]}" for key in (*shown, *more)]
    lines += [f"note: {note}" for note in found.config.notes]
    if found.updates:
        rows = [("module", "r", "scale", "norm", "rank used", "largest singular values")]
        for u in found.updates:
            largest = "  ".join(f"{value:<7.3g}" for value in u.singular_values[:4]).rstrip()
            rows.append((u.name, str(u.r), f"{u.scale:g}", f"{u.norm:.4g}", str(u.used_rank), largest))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        for name, *numbers, largest in rows:
            cells = (f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=True))
            lines.append("  ".join([f"{name:{widths[0]}}", *cells, largest]))
    lines += [f"{name}: {'×'.join(map(str, shape))}, in full" for name, shape in found.others.items()]
    if found.updates:
        ranks = sorted(u.used_rank for u in found.updates)
        lines.append(
            f"rank used = fewest singular directions with {ENERGY:.0%} of the update's squared norm; "
            f"median {ranks[len(ranks) // 2]}, largest {ranks[-1]}"
        )
    return "\n".join(lines)


def predictions(rows: list[dict[str, Any]]) -> Table:
    table = Table("held-out text", "expected", "predicted", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(_short(str(row[key]))) for key in ("input", "expected", "predicted")))
    return table


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
