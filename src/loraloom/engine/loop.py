"""One step of a pack of slots, of which a single run is a pack of one.

A step takes each slot's next rows, runs them through the frozen model together, and lets each slot update itself from
the gradients of its loss. ``training.trainer`` and ``tuning.worker`` have the loops around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraloom.engine.pack import Pack
from loraloom.engine.slot import Slot


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
