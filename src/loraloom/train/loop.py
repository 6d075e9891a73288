"""The one training loop: a pack of slots, of which a single run is a pack of one.

A step takes each running slot's next rows, runs them through the frozen model together, and lets each slot update
itself from the gradients of its own loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraloom.config import TaskType
from loraloom.data.batches import collate
from loraloom.errors import TrainingError
from loraloom.lora.model import PeftModel
from loraloom.train.evaluation import evaluate as evaluate
from loraloom.train.pack import Pack
from loraloom.train.slot import Slot


@dataclass(frozen=True)
class Progress:
    """What a watcher sees after each step."""

    slot: Slot
    tokens: int
    seconds: float


def advance(pack: Pack, slots: Sequence[Slot]) -> int:
    """One forward and backward for all ``slots``, and what follows for each: a step, or the note of its failure.

    Returns the number of tokens seen.
    """
    batches, shares, tokens = {}, {}, 0
    for slot in slots:
        examples, shares[slot.name] = slot.next_examples()
        batches[slot.name] = collate(examples, pack.pad_id, pack.task)
        tokens += sum(len(example.input_ids) for example in examples)
    seeds = {slot.name: slot.dropout_seed for slot in slots}
    losses = pack.backward(batches, dropout_seeds=seeds, weights=shares)
    for slot in slots:
        slot.update(losses[slot.name])
    return tokens


def train_pack(
    model: PeftModel,
    slots: Sequence[Slot],
    task: TaskType,
    pad_id: int,
    *,
    evaluate_every: int,
    evaluate: Callable[[Slot], dict[str, float]],
    watch: Callable[[Progress], None] = lambda progress: None,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Train every slot to its last step and evaluate it every ``evaluate_every`` steps and at its end.

    Returns the number of tokens seen. ``stopped`` is asked between steps and ends the loop early. A slot whose loss is
    not finite stops, with the weights from before that step, and the others go on.

    Raises:
        TrainingError: so it went with all of them.
    """
    pack = Pack(model, task=task, pad_id=pad_id)
    started, tokens = time.perf_counter(), 0
    while (running := [slot for slot in slots if slot.running]) and not stopped():
        before = [slot.step for slot in running]
        tokens += advance(pack, running)
        for slot, step in zip(running, before, strict=True):
            if slot.step == step:
                continue
            if slot.done or slot.step % evaluate_every == 0:
                slot.curve.evaluations.append({"step": slot.step, **evaluate(slot)})
            watch(Progress(slot, tokens, time.perf_counter() - started))
    if slots and all(slot.failure for slot in slots):
        raise TrainingError(
            f"{slots[0].failure}, so training cannot go on; lower the learning rate or lora_alpha, or use dtype "
            "bfloat16 or float32 instead of float16"
        )
    return tokens
