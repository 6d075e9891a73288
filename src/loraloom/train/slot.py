"""One slot's own part of training: its rows in its order, its optimizer, its schedule, its curve.

Nothing here depends on the other slots of a pack or on where this one sits among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from loraloom.data.batches import bucketed
from loraloom.data.encode import IGNORE, Example
from loraloom.lora.initialize import seed_of
from loraloom.train.flat import FlatAdamW


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
        max_grad_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.name, self.seed = name, seed
        self.steps, self.step = steps, 0
        self.accumulation = gradient_accumulation_steps
        self.learning_rate, self.schedule = learning_rate, lr_scheduler_type
        self.warmup = math.ceil(warmup_ratio * steps)
        self.max_grad_norm = max_grad_norm
        self.curve = Curve()
        #: why it cannot go on, once it cannot
        self.failure = ""
        self.optimizer = FlatAdamW(
            [(p, loraplus_lr_ratio if _is_b(key) else 1.0) for key, p in parameters.items()], weight_decay
        )
        self._examples = examples
        self._lengths, self._batch_size = [len(e.input_ids) for e in examples], batch_size
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        #: the batches of this step that are yet to come, with their shares of its labels
        self._waiting: list[tuple[list[Example], float]] = []
        self._loss = 0.0

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    @property
    def running(self) -> bool:
        return not self.done and not self.failure

    @property
    def example(self) -> Example:
        """One of its rows."""
        return self._examples[0]

    def next_examples(self) -> tuple[list[Example], float]:
        """The rows of the next forward, and their share of the labels of the step."""
        if not self._waiting:
            first = self.step * self.accumulation
            batches = [self._batch(number) for number in range(first, first + self.accumulation)]
            labels = [sum(_labels(example) for example in batch) for batch in batches]
            self._waiting = [(batch, count / sum(labels)) for batch, count in zip(batches, labels, strict=True)]
        return self._waiting[0]

    def _batch(self, number: int) -> list[Example]:
        """Batch ``number`` of this slot's order, which goes through the rows again and again, each time anew."""
        epoch, place = divmod(number, -(-len(self._lengths) // self._batch_size))
        if self._epoch[0] != epoch:
            self._epoch = epoch, bucketed(self._lengths, self._batch_size, self.seed, epoch)
        return [self._examples[row] for row in self._epoch[1][place]]

    @property
    def dropout_seed(self) -> int:
        """Of the next forward's dropout masks: it follows from the slot's own seed and step alone."""
        forward = self.accumulation - len(self._waiting) if self._waiting else 0
        return seed_of("dropout", self.seed, self.step, *([forward] if forward else []))

    @property
    def within(self) -> tuple[int, float]:
        """How many forwards of the step under way were seen, and their part of its loss."""
        return (self.accumulation - len(self._waiting), self._loss) if self._waiting else (0, 0.0)

    def go_on(self, step: int, curve: Curve, within: tuple[int, float] = (0, 0.0)) -> None:
        """Stand where another slot with these rows stood. The optimizer's state and gradients come apart from this."""
        self.step, self.curve = step, curve
        seen, self._loss = within
        if seen:
            self.next_examples()
            del self._waiting[:seen]

    def rate(self, step: int) -> float:
        """The learning rate of ``step`` (from 0): up in a line through the warmup, then as ``schedule`` says."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        left = (self.steps - step) / max(self.steps - self.warmup, 1)
        if self.schedule == "cosine":
            return self.learning_rate * (1 - math.cos(math.pi * left)) / 2
        return self.learning_rate * (left if self.schedule == "linear" else 1.0)

    def update(self, loss: float) -> None:
        """Go on after a backward; ``loss`` is that of its rows. A step once all forwards of the step were seen."""
        _, share = self._waiting.pop(0)
        self._loss += share * loss
        if not math.isfinite(loss):
            self.failure = f"step {self.step + 1}: the loss is {loss}"
        elif not self._waiting:
            rate = self.rate(self.step)
            norm = self.optimizer.step(rate, self.max_grad_norm)
            if not math.isfinite(norm):
                self.failure = f"step {self.step + 1}: the norm of the gradients is {norm}"
                return
            self.step += 1
            self.curve.loss.append(self._loss)
            self.curve.learning_rate.append(rate)
            self._loss = 0.0


def _is_b(key: str) -> bool:
    return ".lora_B." in f"{key}." or ".lora_embedding_B." in f"{key}."


def _labels(example: Example) -> int:
    """How many predictions of a row are asked for: one, or one for each labelled token but the first."""
    return sum(label != IGNORE for label in example.labels[1:]) if isinstance(example.labels, list) else 1
