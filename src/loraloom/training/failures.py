"""Why a training ended early, and what to do. Knows no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from loraloom.config.train import TrainConfig
from loraloom.data.example import Example
from loraloom.engine.slot import Slot
from loraloom.errors import FailureError, brief
from loraloom.files.sizes import size
from loraloom.inference.evaluation import Evaluator
from loraloom.inference.session import Session
from loraloom.training.preflight.memory import Memory

#: What to do about a loss that is not finite.
CALMER = "lower the learning rate or lora_alpha, or use dtype bfloat16 or float32 instead of float16"
#: Rows named in a message; more are counted.
NAMED = 5


class Interrupted(FailureError):
    """Training was stopped by the user, and its state is saved. ``record`` is what ``run.json`` holds."""

    def __init__(self, message: str, record: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.record = record


def explain(
    error: BaseException,
    options: TrainConfig | None = None,
    *,
    evaluating: bool = False,
    needs: Callable[[int], Memory] | None = None,
) -> str:
    """One line on an error that is not loraloom's own, and what to do if memory was not enough.

    ``needs`` gives the memory of a step by its batch size.
    """
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"out of memory; {_less(options, evaluating)}{_counted(options, needs)}"
    return brief(error)


def _less(options: TrainConfig | None, evaluating: bool) -> str:
    """Ways to take less memory, the cheapest first."""
    if options is None:
        return "lower batch_size or max_length, or use dtype bfloat16"
    if evaluating and options.eval_batch_size > 1:
        return f"lower eval_batch_size ({options.eval_batch_size}), which changes no result"
    changes = []
    if options.batch_size > 1:
        half, times = options.batch_size // 2, 2 * options.gradient_accumulation_steps
        same = "" if options.batch_size % 2 else f" and gradient_accumulation_steps {times}, as many rows in a step"
        changes.append(f"batch_size {half}{same}")
    if options.max_length is not None:
        changes.append(f"a lower max_length than {options.max_length}")
    if options.dtype == "float32":
        changes.append("dtype bfloat16")
    ways = f"start over with {'; or '.join(changes)}" if changes else "take a smaller model"
    if options.gradient_checkpointing:
        return ways
    return f"set gradient_checkpointing, with which it can resume, or {ways}"


def _counted(options: TrainConfig | None, needs: Callable[[int], Memory] | None) -> str:
    if options is None or needs is None or options.batch_size == 1:
        return ""
    sizes = [options.batch_size >> shift for shift in range(4) if options.batch_size >> shift]
    try:
        found = {rows: needs(rows) for rows in sizes}
    except Exception:  # the message is useful without it
        return ""
    counted = {rows: memory.total - memory.base for rows, memory in found.items() if memory.activations is not None}
    listed = ", ".join(f"{size(count)} with batch_size {rows}" for rows, count in counted.items())
    return f" (beside the model a step takes {listed})" if listed else ""


def not_finite(failure: str, failed: Sequence[int], guilty: Sequence[int], where: Callable[[int], str]) -> str:
    """A loss or gradient that is not finite, with its rows.

    Args:
        failure: the step, and what was not finite.
        failed: the numbers of that forward's examples.
        guilty: those whose own loss is not finite.
        where: names the row of an example.
    """
    named = list(dict.fromkeys(where(number) for number in guilty or failed))
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    rows = ", ".join(named[:NAMED]) + more
    if guilty and len(guilty) < len(failed):
        return f"{failure} because of {rows}, so training cannot go on; look at what is there, or {CALMER}"
    which = "each of its rows" if guilty else "its rows together, though on none alone"
    return f"{failure} on {which} ({rows}), so training cannot go on; {CALMER}" if rows else f"{failure}; {CALMER}"


def nonfinite_examples(session: Session, slot: Slot, examples: Sequence[Example]) -> list[int]:
    """The numbers of the examples that ``slot`` failed on whose own loss is not finite."""

    def loss(number: int) -> float:
        return float(Evaluator(session, [examples[number]]).losses([slot.name]))

    return [number for number in slot.failed_examples if not math.isfinite(loss(number))]
