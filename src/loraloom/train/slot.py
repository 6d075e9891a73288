"""One slot's own part of training: its rows in its order, its optimizer, its schedule, its curve.

Nothing here depends on the other slots of a pack or on where this one sits among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loraloom.data.batches import bucketed
from loraloom.data.encode import Example
from loraloom.lora.initialize import seed_of


@dataclass
class Curve:
    """What was seen on the way. Steps count from 1; losses are per step, evaluations where they were made."""

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


class Slot:
    """The training state of one adapter.

    Args:
        parameters: the adapter's trainable tensors, all of them and nothing else.
        steps: how many optimizer steps this slot takes in all.
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
        weight_decay: float = 0.0,
        warmup_ratio: float = 0.0,
        max_grad_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.name, self.seed = name, seed
        self.parameters = list(parameters.values())
        self.steps, self.step = steps, 0
        self.learning_rate = learning_rate
        self.warmup = math.ceil(warmup_ratio * steps)
        self.max_grad_norm = max_grad_norm
        self.curve = Curve()
        # One fused call over all tensors; also implemented for the CPU.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
        self._examples = examples
        self._order = self._batches([len(e.input_ids) for e in examples], batch_size, seed)

    @staticmethod
    def _batches(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
        epoch = 0
        while True:
            yield from bucketed(lengths, batch_size, seed, epoch)
            epoch += 1

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    @property
    def example(self) -> Example:
        """One of its rows."""
        return self._examples[0]

    def next_examples(self) -> list[Example]:
        return [self._examples[row] for row in next(self._order)]

    @property
    def dropout_seed(self) -> int:
        """Of the next step's dropout masks: it follows from the slot's own seed and step alone."""
        return seed_of("dropout", self.seed, self.step)

    def rate(self, step: int) -> float:
        """The learning rate of ``step`` (from 0): up linearly through the warmup, then down linearly to 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        return self.learning_rate * (self.steps - step) / max(self.steps - self.warmup, 1)

    def update(self, loss: Tensor) -> None:
        """One optimizer step from the gradients that are there; ``loss`` is only noted down."""
        rate = self.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.curve.loss.append(float(loss.detach()))
        self.curve.learning_rate.append(rate)
