"""One slot's own part of training: its rows in its order, its optimizer, its schedule, its curve.

Nothing here depends on the other slots of a pack, or on this slot's place among them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from loraloom import tasks
from loraloom.data.batches import bucketed
from loraloom.data.example import Example
from loraloom.data.table.store import lengths_of
from loraloom.distributed.process_group import SINGLE, ProcessGroup
from loraloom.engine import optimizers
from loraloom.engine.lr_schedule import Schedule
from loraloom.engine.optimizer_state import by_name, by_parameter
from loraloom.engine.slot_state import SlotState, check_names
from loraloom.errors import AdapterError
from loraloom.lora.initialize import seed_of
from loraloom.tasks.base import Task

#: Gradients of half precision underflow below 2**-24, so losses are multiplied by a scale. A step whose gradients are
#: not finite halves it, and as many finite steps in a row as the interval double it.
INITIAL_LOSS_SCALE, GROWTH_INTERVAL = 2.0**16, 2000
#: Fields of a slot that change while it trains, beside its tensors and its curve.
_VALUES = ("step", "step_loss", "loss_scale", "good_steps", "stop_reason", "failure", "failed_examples")


@dataclass
class Curve:
    """What was measured in training. Steps count from 1; losses and rates are per step."""

    loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


class Slot:
    """The training state of one adapter.

    Args:
        parameters: the adapter's trainable tensors by name, all of them and nothing else.
        steps: optimizer steps of the whole training.
        batch_size: rows of one forward; ``gradient_accumulation_steps`` of these micro-batches make a step.
        loraplus_lr_ratio: the learning rate of B over that of everything else (LoRA+, Hayou et al. 2024).
        warmup_steps: replaces ``warmup_ratio``, a share of the steps.
        decay_ratio: the share of the steps in which ``warmup_stable_decay`` decays.
        optim: ``adamw``, or a class of torch.optim with ``optim_args``.
        task: what the rows' labels are.
        scaled: multiply losses by a loss scale, as float16 needs it.
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
        self._parameters = dict(parameters)
        self.steps, self.step = steps, 0
        self._accumulation = gradient_accumulation_steps
        warmup = math.ceil(warmup_ratio * steps) if warmup_steps is None else warmup_steps
        self._schedule = Schedule(learning_rate, steps, warmup, lr_scheduler_type, math.ceil(decay_ratio * steps))
        self.max_grad_norm = max_grad_norm
        self.world = world or SINGLE
        self.loss_scale, self._scaled = INITIAL_LOSS_SCALE if scaled else 1.0, scaled
        #: steps with finite gradients since the loss scale changed
        self.good_steps = 0
        self.curve = Curve()
        #: why it stopped with an error, and the numbers of the examples of that forward
        self.failure = ""
        self.failed_examples: list[int] = []
        #: why it ends before its last step
        self.stop_reason = ""
        factors = {key: (p, loraplus_lr_ratio if _is_b(key) else 1.0) for key, p in parameters.items()}
        self.optimizer = optimizers.build(optim, factors, weight_decay, optim_args or {})
        self._examples = examples
        self._lengths, self._batch_size = lengths_of(examples), batch_size
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        #: the micro-batches left of the step in progress, each with its share of the step's labels
        self._micro_batches: list[tuple[list[int], float]] = []
        #: the part of the step's loss that was seen
        self.step_loss = 0.0

    @property
    def done(self) -> bool:
        return self.step >= self.steps or bool(self.stop_reason)

    @property
    def running(self) -> bool:
        return not self.done and not self.failure

    def next_examples(self) -> tuple[list[Example], float]:
        """The rows of the next forward, and the weight of their mean loss.

        The weight is their share of the step's labels, times the loss scale. A process without a row of the micro-batch
        gets a placeholder of weight 0, because all processes must compute the same products.
        """
        if not self._micro_batches:
            first = self.step * self._accumulation
            batches = [self._batch(number) for number in range(first, first + self._accumulation)]
            labels = sum(self._labels(batch) for batch in batches)
            for batch in batches:
                mine = self.world.shard(batch)
                self._micro_batches.append((mine or batch[:1], self._labels(mine) / max(labels, 1)))
        rows, share = self._micro_batches[0]
        return [self._examples[row] for row in rows], share * self.loss_scale

    def _labels(self, rows: Sequence[int]) -> int:
        return sum(self._task.count(self._examples[row]) for row in rows)

    def _batch(self, number: int) -> list[int]:
        """Micro-batch ``number`` from the start of training. Each epoch has another order."""
        epoch, place = divmod(number, -(-len(self._lengths) // self._batch_size))
        if self._epoch[0] != epoch:
            self._epoch = epoch, bucketed(self._lengths, self._batch_size, self.seed, epoch)
        return self._epoch[1][place]

    @property
    def dropout_seed(self) -> int:
        """The seed of the next forward's dropout masks, from the slot's own seed, step and micro-step alone.

        Each process draws other masks, for its rows.
        """
        more = [self.micro_step, self.world.rank] if self.world.rank else [self.micro_step] if self.micro_step else []
        return seed_of("dropout", self.seed, self.step, *more)

    @property
    def micro_step(self) -> int:
        """Forwards of the step in progress whose gradients are accumulated."""
        return self._accumulation - len(self._micro_batches) if self._micro_batches else 0

    def rate(self, step: int) -> float:
        """The learning rate of ``step``, from 0."""
        return self._schedule.rate(step)

    def update(self, loss: float) -> None:
        """Count a backward over ``next_examples``, whose mean loss is ``loss``; after a step's last one, step.

        If gradients of a scaled loss are not finite, the same step is repeated with half the scale.
        """
        rows, share = self._micro_batches.pop(0)
        # A placeholder row contributes nothing, not even a NaN.
        loss = self.world.total(share * loss if share else 0.0)
        self.step_loss += loss
        if not math.isfinite(loss):
            self._fail(f"the loss is {loss}", rows)
        elif not self._micro_batches:
            reduce = self.world.sum if self.world.size > 1 else None
            rate = self.rate(self.step)
            norm = self.optimizer.step(rate, self.max_grad_norm, self.loss_scale, reduce)
            if math.isfinite(norm):
                self._finish_step(rate)
            elif self._scaled and self.loss_scale > 1.0:
                self.loss_scale, self.good_steps, self.step_loss = self.loss_scale / 2, 0, 0.0
            else:
                self._fail(f"the norm of the gradients is {norm}", rows)

    def _fail(self, what: str, rows: list[int]) -> None:
        self.failure, self.failed_examples = f"step {self.step + 1}: {what}", rows

    def _finish_step(self, rate: float) -> None:
        if self._scaled:
            self.good_steps += 1
            if self.good_steps == GROWTH_INTERVAL:
                self.loss_scale, self.good_steps = 2 * self.loss_scale, 0
        self.step += 1
        self.curve.loss.append(self.step_loss)
        self.curve.learning_rate.append(rate)
        self.step_loss = 0.0

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> SlotState:
        """All that another slot with these arguments needs to resume to the bit. Its tensors are views of live ones."""
        optimizer = self.optimizer.state_dict()
        tensors = {f"adapter/{name}": p.detach() for name, p in self._parameters.items()}
        tensors |= {f"optimizer/{key}": tensor for key, tensor in optimizer.items()}
        tensors |= {f"gradient/{name}": p.grad for name, p in self._parameters.items() if p.grad is not None}
        values = {key: getattr(self, key) for key in _VALUES}
        values |= {"curve": asdict(self.curve), "micro_step": self.micro_step}
        stepped = by_parameter(optimizer, self._parameters)
        values["without_optimizer_state"] = [name for name in self._parameters if name not in stepped]
        return SlotState(tensors, values)

    def load_state_dict(self, state: SlotState) -> None:
        """Continue from the state of a slot with these arguments. This slot must have taken no step yet.

        Raises:
            AdapterError: a tensor that is missing, unknown or of another shape; the message names it.
        """
        adapter, gradients, values = state.below("adapter"), state.below("gradient"), copy.deepcopy(state.values)
        check_names(adapter, self._parameters, "adapter tensor")
        check_names(gradients, {key: p for key, p in self._parameters.items() if key in gradients}, "gradient of")
        optimizer = by_name(state.below("optimizer"), self._parameters)
        stepped = by_parameter(optimizer, self._parameters)
        without = values.pop("without_optimizer_state", self._parameters)
        if lost := [name for name in self._parameters if name not in stepped and name not in without]:
            raise AdapterError(f"optimizer state of {lost[0]} is missing in the saved state")
        self.optimizer.load_state_dict(optimizer)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(adapter[name])
                gradient = gradients.get(name)
                parameter.grad = None if gradient is None else gradient.to(parameter, copy=True)
        micro_step, self.curve = values.pop("micro_step"), Curve(**values.pop("curve"))
        vars(self).update({key: values[key] for key in _VALUES})
        self._micro_batches = []
        if micro_step:
            self.next_examples()
            del self._micro_batches[:micro_step]


def _is_b(key: str) -> bool:
    return ".lora_B." in f"{key}." or ".lora_embedding_B." in f"{key}."
