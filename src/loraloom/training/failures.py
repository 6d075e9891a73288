"""Why a training ended, in words that say what to do. Knows no files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from loraloom.config.train import TrainConfig
from loraloom.data.example import Example
from loraloom.engine.slot import Slot
from loraloom.errors import FailureError, brief
from loraloom.files.sizes import size
from loraloom.inference.evaluation import Evaluator
from loraloom.inference.session import Session

#: What to do about a loss that is not finite.
CALMER = "lower the learning rate or lora_alpha, or use dtype bfloat16 or float32 instead of float16"
#: Rows that are named; more are counted.
NAMED = 5


class Interrupted(FailureError):
    """Training was stopped by the user; what was there is saved. ``record`` is what ``run.json`` then holds."""

    def __init__(self, message: str, record: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.record = record


def explain(
    error: BaseException,
    options: TrainConfig | None = None,
    *,
    evaluating: bool = False,
    needs: Callable[[list[int]], Mapping[int, int]] | None = None,
) -> str:
    """One line on an error that is not loraloom's own; for the commonest one, what to do.

    ``needs`` counts what steps of fewer rows would take, in bytes.
    """
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"out of memory; {_less(options, evaluating)}{_counted(options, needs)}"
    return brief(error)


def _less(options: TrainConfig | None, evaluating: bool) -> str:
    """What takes less memory, what costs least first."""
    if options is None:
        return "lower batch_size or max_length, or use dtype bfloat16"
    if evaluating and options.eval_batch_size > 1:
        return f"lower eval_batch_size ({options.eval_batch_size}), which changes no result"
    anew = []
    if options.batch_size > 1:
        half, times = options.batch_size // 2, 2 * options.gradient_accumulation_steps
        same = "" if options.batch_size % 2 else f" and gradient_accumulation_steps {times}, as many rows in a step"
        anew.append(f"batch_size {half}{same}")
    if options.max_length is not None:
        anew.append(f"a lower max_length than {options.max_length}")
    if options.dtype == "float32":
        anew.append("dtype bfloat16")
    ways = f"start over with {'; or '.join(anew)}" if anew else "take a smaller model"
    if options.gradient_checkpointing:
        return ways
    return f"set gradient_checkpointing, with which it can resume, or {ways}"


def _counted(options: TrainConfig | None, needs: Callable[[list[int]], Mapping[int, int]] | None) -> str:
    if options is None or needs is None or options.batch_size == 1:
        return ""
    sizes = [options.batch_size >> shift for shift in range(4) if options.batch_size >> shift]
    try:
        found = needs(sizes)
    except Exception:  # what can be told without it, is
        return ""
    told = ", ".join(f"{size(count)} with batch_size {rows}" for rows, count in found.items())
    return f" (beside the model a step takes {told})" if told else ""


def not_finite(failure: str, failed: Sequence[int], guilty: Sequence[int], where: Callable[[int], str]) -> str:
    """A loss or gradient that is not finite, with the rows that it came from.

    Args:
        failure: the step and what was not finite.
        failed: the examples of that forward, by number.
        guilty: those whose loss is not finite by itself.
        where: the row of an example, in words.
    """
    named = list(dict.fromkeys(where(number) for number in guilty or failed))
    more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
    rows = ", ".join(named[:NAMED]) + more
    if guilty and len(guilty) < len(failed):
        return f"{failure} because of {rows}, so training cannot go on; look at what is there, or {CALMER}"
    which = "each of its rows" if guilty else "its rows together, though on none alone"
    return f"{failure} on {which} ({rows}), so training cannot go on; {CALMER}" if rows else f"{failure}; {CALMER}"


def nonfinite_examples(session: Session, slot: Slot, examples: Sequence[Example]) -> list[int]:
    """Of the examples that ``slot`` failed on, those whose loss is not finite by themselves, as numbers."""

    def loss(number: int) -> float:
        return float(Evaluator(session, [examples[number]]).losses([slot.name]))

    return [number for number in slot.failed_examples if not math.isfinite(loss(number))]
