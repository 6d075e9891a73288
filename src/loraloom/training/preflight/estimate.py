"""The memory and time of a training, from its real rows and model, before the first step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from loraloom.config.lora import LoraConfig
from loraloom.data.table.store import lengths_of
from loraloom.engine.pack import Pack
from loraloom.files.resources import memory_free
from loraloom.training.preflight.memory import Memory, estimate
from loraloom.training.setup import ADAPTER, Setup, TrainJob

#: Timed forwards and backwards, after one that is not timed.
TIMED = 2
#: The share of a step's time that its forward takes.
FORWARD = 1 / 3


@dataclass(frozen=True)
class ResourceEstimate:
    """Bytes and seconds. ``memory`` counts one process; ``free`` is what is left beside the loaded model."""

    memory: Memory
    free: int
    seconds: float
    #: how the logits of a causal language model come about, in a sentence
    logits: str = ""

    @property
    def fits(self) -> bool:
        return self.memory.total - self.memory.base <= self.free


def outlook(job: TrainJob) -> ResourceEstimate:
    """What training ``job`` takes: memory counted for the longest rows, time measured on rows of median length.

    The adapter does not change.
    """
    options, train, processes = job.options, job.data.train.examples, job.world.size
    batch_size, lengths = -(-options.batch_size // processes), list(map(int, lengths_of(train)))
    memory = step_memory(job, job.config(options), batch_size)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    middle = max(0, (len(order) - batch_size) // 2)
    rows = order[middle : middle + batch_size]
    pack = Pack(job.model, task=job.task, pad_id=job.pad_id)
    batch = {ADAPTER: job.task.collate([train[row] for row in rows], pack.pad_id)}
    times = []
    for _ in range(TIMED + 1):
        started = time.perf_counter()
        pack.backward(batch, dropout_seeds={ADAPTER: 0})
        times.append(time.perf_counter() - started)
        for parameter in pack.parameters_of(ADAPTER).values():
            parameter.grad = None
    each = min(times[1:]) / sum(lengths[row] for row in rows)  # seconds a token
    forwards = job.steps * options.gradient_accumulation_steps
    every = {"steps": options.eval_steps, "epoch": job.steps_per_epoch}.get(options.eval_at)
    evaluations = (max(1, job.steps // every) if every else 1) / processes
    seconds = each * sum(lengths) / len(lengths) * batch_size * forwards
    seconds += FORWARD * each * evaluations * sum(map(int, lengths_of(job.data.validation.examples)))
    return ResourceEstimate(memory, free_memory(), seconds, str(pack.objective.way or ""))


def step_memory(setup: Setup, config: LoraConfig, batch_size: int) -> Memory:
    """The memory of a step of one adapter with ``batch_size`` rows, all as long as the longest."""
    options, (texts, length) = setup.options, setup.task.widest(setup.data.train.examples)
    rows, recompute = batch_size * texts, options.gradient_checkpointing
    return estimate(setup.empty(), config, rows=rows, length=length, dtype=options.dtype, recompute=recompute)[1]


def free_memory() -> int:
    """Bytes that this process can still allocate: on the accelerator if there is one, else in main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return memory_free()
