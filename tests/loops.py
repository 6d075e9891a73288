"""A loop around the step, for tests of what a step computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loraloom import PeftModel
from loraloom.engine.loop import StepEvent, advance
from loraloom.engine.pack import Pack
from loraloom.engine.slot import Slot
from loraloom.tasks.base import Task


def train_pack(
    model: PeftModel,
    slots: Sequence[Slot],
    task: Task | str,
    pad_id: int = 0,
    on_step: Callable[[StepEvent], object] = lambda event: None,
) -> int:
    """Train all ``slots`` to their last step. Returns the tokens seen."""
    pack, tokens = Pack(model, task=task, pad_id=pad_id), 0
    while running := [slot for slot in slots if slot.running]:
        before = [slot.step for slot in running]
        tokens += advance(pack, running)
        for slot, step in zip(running, before, strict=True):
            if slot.step > step:
                on_step(StepEvent.of(slot, tokens, 1.0))
    return tokens
