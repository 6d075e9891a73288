"""What a run says in the terminal: what will train, how it goes, what came out. Figures in, text out."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from loraloom.train.loop import Progress
    from loraloom.train.run import Prepared, RunResult

#: Characters of an example's text in the list of predictions.
SHOWN = 100


def overview(prepared: Prepared) -> RenderableType:
    """What will be trained on what, and what was done to the rows."""
    data, made = prepared.data, prepared.plan
    lines = [
        f"{len(data.train.examples):,} rows to train on, {len(data.evaluation.examples):,} held out; "
        f"{data.train.tokens:,} tokens an epoch, padding {data.padding:.1%}",
        f"{made.parameters:,} of {made.base_parameters + made.parameters:,} parameters train: "
        f"LoRA in {len(made.targets)} modules"
        + (f", in full {', '.join(extra.name for extra in made.saved)}" if made.saved else ""),
        f"{prepared.steps:,} steps, {prepared.steps_per_epoch:,} an epoch",
    ]
    warnings = []
    for what, part in (("training", data.train), ("held-out", data.evaluation)):
        if part.truncated:
            warnings.append(
                f"{part.truncated:,} {what} rows are cut to max_length={prepared.options.max_length} tokens"
            )
        if part.merged:
            warnings.append(
                f"{part.merged:,} {what} rows have a token across the end of the prompt, which is not trained on; "
                "end prompts with a space or a line break, or begin completions with one"
            )
    return Text("\n").join([*(Text(line) for line in lines), *(Text(f"warning: {w}", "yellow") for w in warnings)])


class Meter:
    """A watcher of the loop: a live bar in a terminal, one line an evaluation elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.loss: float | None = None
        self.seen = 0
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
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
        latest = slot.curve.loss[-1]
        self.loss = latest if self.loss is None else 0.9 * self.loss + 0.1 * latest
        speed = progress.tokens / progress.seconds
        figures = f"loss {self.loss:.3f}  "
        if slot.curve.evaluations:
            figures += "  ".join(_figures(slot.curve.evaluations[-1])) + "  "
        self.bar.update(self.task, completed=slot.step, figures=f"{figures}{speed:,.0f} tokens/s")
        if len(slot.curve.evaluations) > self.seen:
            self.seen = len(slot.curve.evaluations)
            held_out = ", ".join(_figures(slot.curve.evaluations[-1]))
            self.console.print(
                f"step {slot.step}: training loss {self.loss:.3f}, {held_out}, {speed:,.0f} tokens/s", highlight=False
            )


def _figures(evaluation: dict[str, float]) -> list[str]:
    """``["held-out loss 0.5", "accuracy 0.8"]``."""
    return [
        f"{'held-out loss' if key == 'loss' else key} {value:.3f}" for key, value in evaluation.items() if key != "step"
    ]


def outcome(result: RunResult, folder: str | Path, plot: Path, record_path: Path) -> RenderableType:
    """The end of a run: the figures, where the files are, and three predictions."""
    record = result.record
    figures = ", ".join(_figures(record["result"]))
    head = Text(f"\n{figures} after {record['steps']:,} steps in {record['seconds']:.0f} s", "bold")
    files = Text(f"adapter {folder}\nrecord  {record_path}\ncurves  {plot}\n")
    return Group(head, files, predictions(result.predictions))


def predictions(rows: list[dict[str, Any]]) -> Table:
    table = Table("held-out text", "expected", "predicted", box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(escape(_short(str(row[key]))) for key in ("input", "expected", "predicted")))
    return table


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
