"""What a training will need, in memory and time, from its real rows and model: said before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from loraloom.config.lora import LoraConfig
from loraloom.data.example import Example
from loraloom.engine.pack import Pack
from loraloom.files.resources import memory_free
from loraloom.training.preflight.memory import Memory, estimate

#: Forwards and backwards that are timed; one more comes before them.
TIMED = 2
#: A forward is about a third of a step.
FORWARD = 1 / 3


@dataclass(frozen=True)
class ResourceEstimate:
    """Bytes and seconds. ``memory`` is of a whole process; ``free`` is what is left beside the loaded model."""

    memory: Memory
    free: int
    seconds: float
    #: how the logits of a causal language model come about, in a sentence
    logits: str = ""

    @property
    def fits(self) -> bool:
        return self.memory.total - self.memory.base <= self.free


def estimate_resources(
    pack: Pack,
    adapter: str,
    config: LoraConfig,
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    empty: nn.Module,
    dtype: str,
    batch_size: int,
    forwards: int,
    evaluations: float,
    gradient_checkpointing: bool = False,
) -> ResourceEstimate:
    """Memory counted for the longest rows, and time from a few forwards and backwards of rows of middling length.

    The adapter keeps its numbers. ``empty`` is the model without weights; ``forwards`` and ``evaluations`` are those of
    the whole training, as far as this process has a part in them.
    """
    lengths = sorted(len(example.input_ids) for example in train)
    texts, longest = pack.task.widest(train)
    _, memory = estimate(
        empty, config, rows=batch_size * texts, length=longest, dtype=dtype, recompute=gradient_checkpointing
    )
    order = sorted(range(len(train)), key=lambda row: len(train[row].input_ids))
    middle = max(0, (len(order) - batch_size) // 2)
    examples = [train[row] for row in order[middle : middle + batch_size]]
    batch = {adapter: pack.task.collate(examples, pack.pad_id)}
    times = []
    for _ in range(TIMED + 1):
        started = time.perf_counter()
        pack.backward(batch, dropout_seeds={adapter: 0})
        times.append(time.perf_counter() - started)
        for parameter in pack.parameters_of(adapter).values():
            parameter.grad = None
    tokens = sum(len(example.input_ids) for example in examples)
    each = min(times[1:]) / tokens  # seconds a token
    mean = sum(lengths) / len(lengths)
    seconds = each * mean * batch_size * forwards
    seconds += FORWARD * each * evaluations * sum(len(example.input_ids) for example in held_out)
    return ResourceEstimate(memory, free_memory(), seconds, str(pack.way or ""))


def needs(
    empty: Callable[[], nn.Module],
    config: LoraConfig,
    widest: tuple[int, int],
    dtype: str,
    batch_sizes: Iterable[int],
    again: bool,
) -> dict[int, int]:
    """Rows of a forward → bytes that a step with them takes beside the frozen model, as far as it can be counted.

    ``widest`` is that of the examples: see ``Task.widest``.
    """
    found = {}
    for rows in batch_sizes:
        _, memory = estimate(empty(), config, rows=rows * widest[0], length=widest[1], dtype=dtype, recompute=again)
        if memory.activations is not None:
            found[rows] = memory.total - memory.base
    return found


def free_memory() -> int:
    """Bytes that this process could still take: of the accelerator if there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return memory_free()
