"""The one training loop: a pack of slots, of which a single run is a pack of one.

A step takes each running slot's next rows, runs them through the frozen model together, and lets each slot update
itself from the gradients of its own loss. When to evaluate and to save is decided here; how, is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loraloom.distributed.process_group import SINGLE
from loraloom.engine.pack import Pack
from loraloom.engine.slot import Slot
from loraloom.errors import TrainingError
from loraloom.lora.model import PeftModel
from loraloom.messages import ignore
from loraloom.tasks.base import Task

#: What to do about a loss that is not finite.
CALMER = "lower the learning rate or lora_alpha, or use dtype bfloat16 or float32 instead of float16"


@dataclass(frozen=True)
class StepEvent:
    """What a callback gets after each step of a slot. Plain figures: ``dataclasses.asdict`` gives JSON."""

    name: str
    step: int
    steps: int
    loss: float
    learning_rate: float
    #: since training began, what came before a resume included
    tokens: int
    seconds: float
    #: what was measured at this step, if anything was
    evaluation: dict[str, float] | None = None
    format: int = 1

    @classmethod
    def of(cls, slot: Slot, tokens: int, seconds: float) -> StepEvent:
        curve = slot.curve
        last = curve.evaluations[-1] if curve.evaluations else {}
        found = {key: value for key, value in last.items() if key != "step"} if last.get("step") == slot.step else None
        return cls(slot.name, slot.step, slot.steps, curve.loss[-1], curve.learning_rate[-1], tokens, seconds, found)


OnStep = Callable[[StepEvent], object]


@dataclass
class Every:
    """When something is due: every so many steps or minutes; never, where neither is given.

    The clock has no part in the numbers of a training, only in when it is looked at and written down.
    """

    steps: int | None = None
    minutes: float | None = None
    _last: float = field(default_factory=time.monotonic, repr=False)

    def due(self, step: int) -> bool:
        if self.minutes is not None and time.monotonic() - self._last >= 60 * self.minutes:
            self._last = time.monotonic()
            return True
        return self.at(step)

    def at(self, step: int) -> bool:
        """Whether it is due at ``step`` whatever the clock says."""
        return self.steps is not None and step % self.steps == 0


def advance(pack: Pack, slots: Sequence[Slot]) -> int:
    """One forward and backward for all ``slots``, and what follows for each: a step, or the note of its failure.

    Returns the number of tokens seen.
    """
    batches, shares, tokens = {}, {}, 0
    for slot in slots:
        examples, shares[slot.name] = slot.next_examples()
        batches[slot.name] = pack.task.collate(examples, pack.pad_id)
        tokens += sum(len(example.input_ids) for example in examples)
    seeds = {slot.name: slot.dropout_seed for slot in slots}
    losses = pack.backward(batches, dropout_seeds=seeds, weights=shares)
    for slot in slots:
        slot.update(losses[slot.name])
    return tokens


def train_pack(
    model: PeftModel,
    slots: Sequence[Slot],
    task: Task | str,
    pad_id: int,
    *,
    evaluate_every: int | Every,
    evaluate: Callable[[Slot], dict[str, float]],
    save_every: Every | None = None,
    save: OnStep = ignore,
    measured: OnStep = ignore,
    on_step: OnStep = ignore,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Train every slot to its last step and evaluate it every ``evaluate_every`` steps and at its end.

    Returns the number of tokens seen. A slot whose loss is not finite stops, with the weights from before that step,
    and the others go on. One that comes from a checkpoint is first given what was due at its step.

    Args:
        save: called when it is due, before an evaluation, which may take long and fail.
        measured: called after each evaluation. It may end the slot by its ``stop_reason``.
        on_step: called after each step, and on a resume after an evaluation that was still due.
        stopped: asked before each forward; it ends the loop early, be it within a step.

    Raises:
        TrainingError: the loss was not finite with all of them.
    """
    every = Every(evaluate_every) if isinstance(evaluate_every, int) else evaluate_every
    started, tokens = time.perf_counter(), 0

    def now(slot: Slot) -> StepEvent:
        return StepEvent.of(slot, tokens, time.perf_counter() - started)

    def look(slot: Slot, due: bool) -> bool:
        """Evaluate if it is ``due`` and was not done at this step, as it may have been before the slot was saved."""
        there = bool(slot.curve.evaluations) and slot.curve.evaluations[-1]["step"] == slot.step
        missing = (slot.done or due) and not there
        if missing:
            slot.curve.evaluations.append({"step": slot.step, **evaluate(slot)})
        if missing or there:
            measured(now(slot))
        return missing

    def ended() -> bool:
        """What one process is asked, all do: at the end of a step, for gradients within it are each one's own."""
        if world.size > 1 and any(slot.micro_step for slot in slots):
            return False
        return world.any(stopped())

    pack, world = Pack(model, task=task, pad_id=pad_id), slots[0].world if slots else SINGLE
    for slot in slots:
        if slot.step and not slot.micro_step and look(slot, every.at(slot.step)):
            on_step(now(slot))
    while (running := [slot for slot in slots if slot.running]) and not ended():
        before = [slot.step for slot in running]
        tokens += advance(pack, running)
        for slot, step in zip(running, before, strict=True):
            if slot.step == step:
                continue
            if save_every is not None and world.agree(save_every.due(slot.step)):
                save(now(slot))
            look(slot, world.agree(every.due(slot.step)))
            on_step(now(slot))
    if slots and all(slot.failure for slot in slots):
        raise TrainingError(f"{slots[0].failure}, so training cannot go on; {CALMER}")
    return tokens
