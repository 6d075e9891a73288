"""What a run says in the terminal: what will train, how it goes, what came out. Figures in, text out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from loraloom.config.lora import LoraConfig
from loraloom.files import resources
from loraloom.files.sizes import size
from loraloom.lora.inspection import ENERGY, Inspection
from loraloom.report.screen import Text
from loraloom.train.preflight.rates import HIGHEST, falls

if TYPE_CHECKING:
    from loraloom.engine.loop import Progress
    from loraloom.train.preflight.doctor import Finding
    from loraloom.train.preflight.estimate import ResourceEstimate
    from loraloom.train.preflight.memory import Memory
    from loraloom.train.run import RunResult
    from loraloom.train.setup import TrainJob

#: Characters of an example's text in the list of predictions.
SHOWN = 100
#: Seconds between two lines on how far the reading of rows is.
TELL = 15.0
#: Columns from which on the bar has room for the rate and the memory.
WIDE = 100


def overview(job: TrainJob) -> RenderableType:
    """What will be trained on what, and what was done to the rows."""
    data, made = job.data, job.plan
    lines = [
        f"{len(data.train.examples):,} rows to train on, {len(data.evaluation.examples):,} held out; "
        f"{data.train.tokens:,} tokens an epoch, padding {data.padding:.1%}",
        f"{made.parameters:,} of {made.base_parameters + made.parameters:,} parameters train: "
        f"LoRA in {len(made.targets)} modules"
        + (f", in full {', '.join(extra.name for extra in made.saved)}" if made.saved else ""),
        f"{_count(job.steps, 'step')}, {job.steps_per_epoch:,} an epoch",
    ]
    notes = [Text(note) for note in (*data.notes, *made.notes)]
    return Text("\n").join([*notes, *map(Text, lines), *(Text(f"warning: {w}", "yellow") for w in data.warnings)])


def expectations(findings: Sequence[Finding], ahead: ResourceEstimate) -> RenderableType:
    """What training will take, and what the doctor has to say."""
    memory = ahead.memory
    more = memory.total - memory.base
    lines = [
        Text(
            f"memory {size(memory.total)} (the frozen model {size(memory.base)}, and {size(more)} more, of "
            f"{size(ahead.free)} free), time about {_about(ahead.seconds)}"
        )
    ]
    if ahead.logits:
        lines.append(Text(ahead.logits))
    if memory.activations is None:
        lines.append(Text("what is kept for the backward cannot be told beforehand for this model", "yellow"))
    if not ahead.fits:
        lines.append(
            Text(
                "warning: that is more than there is: lower batch_size (and raise gradient_accumulation_steps by as "
                "much), or max_length, or give --gradient-checkpointing or dtype bfloat16",
                "yellow",
            )
        )
    return Text("\n").join([*lines, *(Text(f"warning: {finding.text}", "yellow") for finding in findings)])


def _about(seconds: float) -> str:
    """Time for people: ``"40 s"``, ``"12 min"``, ``"3 h 20 min"``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Reading:
    """A watcher of rows as they are read and tokenised: a live line in a terminal, one line now and then elsewhere."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.status = console.status("reading") if console.is_terminal else None
        self.told = clock()

    def __enter__(self) -> Reading:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        line = f"{done:,} {what}" if total is None else f"{done:,} of {total:,} {what}"
        if self.status is not None:
            self.status.update(line)
        elif self.clock() - self.told >= TELL:
            self.told = self.clock()
            self.console.print(Text(line))


class Meter:
    """A watcher of the loop: a live bar in a terminal, one line an evaluation elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.loss: float | None = None
        self.seen = 0
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        slot = progress.slot
        if self.loss is None:  # the time left is worked out from steps of now, not from those of a run gone on with
            self.bar.reset(self.task, completed=slot.step - 1)
            self.seen = sum(one["step"] < slot.step for one in slot.curve.evaluations)
        latest = slot.curve.loss[-1]
        self.loss = latest if self.loss is None else 0.9 * self.loss + 0.1 * latest
        speed = progress.tokens / progress.seconds
        state = [f"rate {slot.curve.learning_rate[-1]:.2g}", size(memory_used())]
        figures = [f"loss {self.loss:.3f}"]
        if slot.curve.evaluations:
            figures += _figures({k: v for k, v in slot.curve.evaluations[-1].items() if k != "loss"})[:1]
        figures += state if self.console.width >= WIDE else []
        self.bar.update(self.task, completed=slot.step, figures="  ".join([*figures, f"{speed:,.0f} tokens/s"]))
        if len(slot.curve.evaluations) > self.seen:
            self.seen = len(slot.curve.evaluations)
            held_out = ", ".join(_figures(slot.curve.evaluations[-1]))
            line = f"step {slot.step}: training loss {self.loss:.3f}, {held_out}, {', '.join(state)}"
            self.console.print(Text(f"{line}, {speed:,.0f} tokens/s"), soft_wrap=True)


def _figures(evaluation: dict[str, float]) -> list[str]:
    """``["held-out loss 0.5", "accuracy 0.8"]``."""
    return [
        f"{'held-out loss' if key == 'loss' else key} {value:.3f}" for key, value in evaluation.items() if key != "step"
    ]


def memory_used() -> int:
    """Bytes that this process holds: of the accelerator where there is one."""
    import torch

    return int(torch.cuda.memory_reserved()) if torch.cuda.is_available() else resources.memory_used()


def outcome(result: RunResult, folder: str | Path, plot: Path, record_path: Path) -> RenderableType:
    """The end of a run: the figures, where the files are, and three predictions."""
    record = result.record
    figures = ", ".join(_figures(record["result"]))
    head = Text(f"\n{figures} after {_count(record['steps'], 'step')} in {record['seconds']:.0f} s", "bold")
    files = Text(f"adapter {folder}\nrecord  {record_path}\ncurves  {plot}\n")
    more = _further(record)
    return Group(head, *([Text(f"warning: {more}", "yellow")] if more else []), files, predictions(result.predictions))


def _further(record: Mapping[str, Any]) -> str:
    """What to do where the held-out loss was still falling at the end of a run."""
    found = falls(record["curve"]["evaluations"])
    if found is None:
        return ""
    options = record["options"]
    steps, rate = options["max_steps"], 2 * options["learning_rate"]
    longer = f"--max-steps {2 * steps}" if steps else f"--epochs {2 * options['epochs']:g}"
    faster = f", or at a higher rate (--lr {rate:g})" if rate <= HIGHEST else ""
    fall = f"{found[0]:.3f} to {found[1]:.3f}"
    return f"the held-out loss was still falling at the end ({fall}): train longer ({longer}){faster}"


def memory_table(memory: Memory) -> str:
    """What a training step needs, part by part."""
    parts = {"frozen model": memory.base, "adapter": memory.adapter, "its gradients": memory.gradients}
    parts |= {"AdamW": memory.optimizer}
    if memory.activations is not None:
        parts["kept for backward"] = memory.activations
    lines = [f"  {name:18} {size(count):>10}" for name, count in {**parts, "in all": memory.total}.items()]
    note = "" if memory.activations is not None else " and what is kept for backward, which cannot be told beforehand"
    return "\n".join(lines) + note


def inspection(folder: str, found: Inspection) -> str:
    """An adapter: its config as far as it differs from the defaults, its size, and what each module learnt."""
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


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
