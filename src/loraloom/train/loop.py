"""The one training loop: a pack of slots, of which a single run is a pack of one.

A step takes each running slot's next rows, runs them through the frozen model in one forward with one route, takes
each slot's own loss on its own rows, and lets each slot update itself. Rows of different slots never meet: the
gradient of a sum of losses is each slot's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

from loraloom.config import TaskType
from loraloom.data.batches import collate, evaluation_batches, join
from loraloom.data.encode import Example
from loraloom.errors import TrainingError
from loraloom.lora.model import PeftModel
from loraloom.train import tasks
from loraloom.train.objective import Objective
from loraloom.train.slot import Slot


@dataclass(frozen=True)
class Progress:
    """What a watcher sees after each step."""

    slot: Slot
    tokens: int
    seconds: float


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

    Returns the number of tokens seen. ``stopped`` is asked between steps and ends the loop early.

    Raises:
        TrainingError: a slot's loss is not finite. Its weights are those from before that step.
    """
    train_adapters(model)
    objective = Objective(model, task)
    device = next(model.parameters()).device
    warm_up(model, objective, slots, pad_id, task)
    started, tokens = time.perf_counter(), 0
    while (running := [slot for slot in slots if not slot.done]) and not stopped():
        batch = join([(slot.name, slot.next_examples()) for slot in running], pad_id, task)
        inputs = {key: value.to(device) for key, value in batch.inputs.items()}
        labels = inputs.pop("labels")
        # The backward is inside: gradient checkpointing runs parts of the forward again and needs their route.
        with model.base_model.routed(batch.slots, {slot.name: slot.dropout_seed for slot in running}):
            out = objective.forward(inputs)
            losses = {name: objective.loss(out[rows], labels[rows]) for name, rows in _blocks(batch.slots).items()}
            for slot in running:
                value = float(losses[slot.name].detach())
                if not math.isfinite(value):
                    raise TrainingError(
                        f"step {slot.step + 1}: the loss is {value}, so training cannot go on; lower the learning rate "
                        "or lora_alpha, or use dtype bfloat16 or float32 instead of float16"
                    )
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        tokens += batch.tokens
        for slot in running:
            slot.update(losses[slot.name])
            if slot.done or slot.step % evaluate_every == 0:
                slot.curve.evaluations.append({"step": slot.step, **evaluate(slot)})
            watch(Progress(slot, tokens, time.perf_counter() - started))
    return tokens


def warm_up(model: PeftModel, objective: Objective, slots: Sequence[Slot], pad_id: int, task: TaskType) -> None:
    """Let the layers learn what they share, so that the first step adds up in the same order as all that follow."""
    device = next(model.parameters()).device
    with _evaluating(model, torch.no_grad()):
        for slot in slots:
            inputs = {key: value.to(device) for key, value in collate([slot.example], pad_id, task).items()}
            inputs.pop("labels")
            with model.base_model.routed([slot.name]):
                objective.forward(inputs)
    model.base_model.router.inputs.learn()


def train_adapters(model: PeftModel) -> None:
    """The adapters' own dropout is on; the frozen model runs as it does in use.

    Its dropout, and that of heads, would be drawn for all slots together, so that one slot's training would depend on
    the others'; and its running statistics would change.
    """
    model.eval()
    for layer in model.base_model.layers.values():
        layer.training = True
    for wrapper in model.base_model.saved_modules.values():
        for module in wrapper.modules_to_save.modules():
            module.training = not isinstance(module, _DropoutNd)


def _blocks(slots: Sequence[str]) -> dict[str, slice]:
    """Each slot's rows, which lie together."""
    starts = {name: slots.index(name) for name in dict.fromkeys(slots)}
    return {name: slice(start, start + slots.count(name)) for name, start in starts.items()}


def evaluate(
    model: PeftModel, name: str, task: TaskType, examples: Sequence[Example], pad_id: int, batch_size: int
) -> dict[str, float]:
    """``{"loss", metric}`` of one adapter over all ``examples``. The model's mode is as it was afterwards."""
    objective = Objective(model, task)
    device = next(model.parameters()).device
    parts = []
    with _evaluating(model, torch.inference_mode()):
        for rows in evaluation_batches([len(e.input_ids) for e in examples], batch_size):
            inputs = collate([examples[row] for row in rows], pad_id, task)
            inputs = {key: value.to(device) for key, value in inputs.items()}
            labels = inputs.pop("labels")
            with model.base_model.routed([name] * len(rows)):
                parts.append(objective.score(objective.forward(inputs), labels))
    scores = tasks.total(parts)
    return {"loss": scores.loss, tasks.metric_name(task): tasks.metric(task, scores)}


@contextmanager
def _evaluating(model: PeftModel, mode: AbstractContextManager[Any]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with mode:
            yield
    finally:
        for module, training in modes:
            module.training = training
