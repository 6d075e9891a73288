"""One slot's own part of training: its rows in its order, its optimizer, its schedule, its curve.

Nothing here depends on the other slots of a pack or on where this one sits among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loraloom import tasks
from loraloom.data.batches import bucketed
from loraloom.data.example import Example
from loraloom.data.table.store import lengths_of
from loraloom.distributed.process_group import SINGLE, ProcessGroup
from loraloom.engine import optimizers
from loraloom.engine.lr_schedule import Schedule
from loraloom.lora.initialize import seed_of
from loraloom.tasks.base import Task

#: Half precision's gradients are lost below 2**-24: losses are multiplied with this, and with half as much after each
#: step whose gradients were not finite, and with twice as much after so many in a row that were.
SCALE, GROWS_AFTER = 2.0**16, 2000


@dataclass
class Curve:
    """What was seen on the way. Steps count from 1; losses are per step, evaluations where they were made."""

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


class Slot:
    """The training state of one adapter.

    Args:
        parameters: the adapter's trainable tensors by name, all of them and nothing else.
        steps: how many optimizer steps this slot takes in all.
        batch_size: rows of one forward; ``gradient_accumulation_steps`` of these make a step.
        loraplus_lr_ratio: the learning rate of B over that of everything else (LoRA+, Hayou et al. 2024).
        warmup_steps: in place of ``warmup_ratio``, a share of the steps.
        decay_ratio: the share of the steps in which ``warmup_stable_decay`` goes down.
        optim: ``adamw``, or a class of torch.optim that takes ``optim_args``.
        task: what the rows' labels are.
        scaled: losses are scaled, as half precision needs it.
        world: the processes that share each batch.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        examples: Sequence[Example],
        *,
        steps: int,
        batch_size: int,
        learning_rate: float,
        gradient_accumulation_steps: int = 1,
        loraplus_lr_ratio: float = 1.0,
        lr_scheduler_type: str = "linear",
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.0,
        warmup_steps: int | None = None,
        decay_ratio: float = 0.2,
        optim: str = "adamw",
        optim_args: Mapping[str, Any] | None = None,
        max_grad_norm: float = 1.0,
        seed: int = 0,
        task: Task | str = "causal-lm",
        scaled: bool = False,
        world: ProcessGroup | None = None,
    ) -> None:
        self.name, self.seed, self._task = name, seed, tasks.get(task)
        self.steps, self.step = steps, 0
        self.accumulation = gradient_accumulation_steps
        warmup = math.ceil(warmup_ratio * steps) if warmup_steps is None else warmup_steps
        self._schedule = Schedule(learning_rate, steps, warmup, lr_scheduler_type, math.ceil(decay_ratio * steps))
        self.max_grad_norm = max_grad_norm
        self.world = world or SINGLE
        #: what losses are multiplied with, and for how many steps that went well
        self.scale: tuple[float, int] = (SCALE if scaled else 1.0, 0)
        self._scaled = scaled
        self.curve = Curve()
        #: why it cannot go on, once it cannot, and the examples that it was working on
        self.failure = ""
        self.failed: list[int] = []
        #: why it ends before its last step
        self.enough = ""
        timed = [(p, loraplus_lr_ratio if _is_b(key) else 1.0) for key, p in parameters.items()]
        self.optimizer = optimizers.build(optim, timed, weight_decay, optim_args or {})
        self._examples = examples
        self._lengths, self._batch_size = lengths_of(examples), batch_size
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        #: the batches of this step that are yet to come, with their shares of its labels
        self._waiting: list[tuple[list[int], float]] = []
        self._loss = 0.0

    @property
    def done(self) -> bool:
        return self.step >= self.steps or bool(self.enough)

    @property
    def running(self) -> bool:
        return not self.done and not self.failure

    @property
    def example(self) -> Example:
        """One of its rows."""
        return self._examples[0]

    def next_examples(self) -> tuple[list[Example], float]:
        """The rows of the next forward, and what their mean loss is to be multiplied with.

        That is their share of the labels of the step, and the scale. A process without a row of a batch takes one that
        counts nothing, for all go through the same products.
        """
        if not self._waiting:
            first = self.step * self.accumulation
            batches = [self._batch(number) for number in range(first, first + self.accumulation)]
            labels = sum(self._labels(batch) for batch in batches)
            for batch in batches:
                mine = self.world.shard(batch)
                self._waiting.append((mine or batch[:1], self._labels(mine) / max(labels, 1)))
        rows, share = self._waiting[0]
        return [self._examples[row] for row in rows], share * self.scale[0]

    def _labels(self, rows: Sequence[int]) -> int:
        return sum(self._task.count(self._examples[row]) for row in rows)

    def _batch(self, number: int) -> list[int]:
        """Batch ``number`` of this slot's order, which goes through the rows again and again, each time anew."""
        epoch, place = divmod(number, -(-len(self._lengths) // self._batch_size))
        if self._epoch[0] != epoch:
            self._epoch = epoch, bucketed(self._lengths, self._batch_size, self.seed, epoch)
        return self._epoch[1][place]

    @property
    def dropout_seed(self) -> int:
        """Of the next forward's dropout masks: it follows from the slot's own seed and step alone.

        Processes draw masks of their own for their rows.
        """
        forward = self.accumulation - len(self._waiting) if self._waiting else 0
        more = [forward, self.world.rank] if self.world.rank else [forward] if forward else []
        return seed_of("dropout", self.seed, self.step, *more)

    @property
    def within(self) -> tuple[int, float]:
        """How many forwards of the step under way were seen, and their part of its loss."""
        return (self.accumulation - len(self._waiting), self._loss) if self._waiting else (0, 0.0)

    def go_on(
        self,
        step: int,
        curve: Curve,
        within: tuple[int, float] = (0, 0.0),
        scale: tuple[float, int] | None = None,
    ) -> None:
        """Stand where another slot with these rows stood. The optimizer's state and gradients come apart from this."""
        self.step, self.curve = step, curve
        self.scale = scale or self.scale
        seen, self._loss = within
        if seen:
            self.next_examples()
            del self._waiting[:seen]

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, from 0."""
        return self._schedule.rate(step)

    def update(self, loss: float) -> None:
        """Go on after a backward; ``loss`` is that of its rows. A step once all forwards of the step were seen.

        Where a scaled loss gave gradients that are not finite, the step is to be taken again, with half the scale.
        """
        rows, share = self._waiting.pop(0)
        # A row that stands in for none says nothing, not even that its loss is NaN.
        loss = self.world.total(share * loss if share else 0.0)
        self._loss += loss
        if not math.isfinite(loss):
            self.failure, self.failed = f"step {self.step + 1}: the loss is {loss}", rows
        elif not self._waiting:
            rate, (scale, good) = self.rate(self.step), self.scale
            reduce = self.world.sum if self.world.size > 1 else None
            norm = self.optimizer.step(rate, self.max_grad_norm, scale, reduce)
            if not math.isfinite(norm):
                if self._scaled and scale > 1.0:
                    self.scale, self._loss = (scale / 2, 0), 0.0
                else:
                    self.failure, self.failed = f"step {self.step + 1}: the norm of the gradients is {norm}", rows
                return
            if self._scaled:
                self.scale = (scale, good + 1) if good + 1 < GROWS_AFTER else (2 * scale, 0)
            self.step += 1
            self.curve.loss.append(self._loss)
            self.curve.learning_rate.append(rate)
            self._loss = 0.0


def _is_b(key: str) -> bool:
    return ".lora_B." in f"{key}." or ".lora_embedding_B." in f"{key}."
