"""How many trials train together: as many as cost no speed, within the memory there is.

The memory is counted from shapes, by ``training.preflight.memory``; the speed is measured for a moment, on the rows of
the search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loraloom.config.lora import LoraConfig
from loraloom.engine.loop import advance
from loraloom.engine.pack import Pack
from loraloom.errors import ConfigError
from loraloom.files.sizes import size
from loraloom.training.failures import explain
from loraloom.training.preflight.estimate import free_memory, step_memory
from loraloom.training.setup import Setup

#: More slots are taken as long as they train at least this share of the most tokens in a second: who stays and who
#: goes is decided better among many.
AS_FAST = 0.95
#: Of what is free, and of what the estimate says: it counts tensors, and an allocator needs some room beside them.
SHARE, MARGIN = 0.9, 1.15
#: A number of slots is measured for at most ``STEPS`` steps, and after two of them for at most ``SECONDS``.
STEPS, SECONDS = 8, 1.0
#: Measurements of each of two numbers of slots, in turns, before one is chosen: on a busy machine a single measurement
#: may be slow by chance.
TURNS = 3


@dataclass(frozen=True)
class Slots:
    """How many slots, and the figures that decided: what was measured and asked for, and what fits."""

    count: int
    figures: dict[str, Any]


def plan_slots(
    pack: Pack,
    setup: Setup,
    config: LoraConfig,
    most: int,
    memory: int | None,
    wanted: int | None,
    neighbours: int = 1,
) -> Slots:
    """Slots for adapters like ``config``, the largest of the search.

    Args:
        most: how many trials there are to train at once.
        memory: bytes that the search may use in all, or None for what is free.
        wanted: a number given by the user, which is not measured but checked against ``memory``.
        neighbours: searching processes on this machine, this one included, that share what is free.

    Raises:
        ConfigError: not even one fits.
    """
    need = step_memory(setup, config, setup.options.batch_size)
    sharing = 1 if torch.cuda.is_available() else neighbours  # each has its own GPU
    room = memory - need.base if memory else int(SHARE * free_memory() / sharing)
    each = int(MARGIN * (need.total - need.base))
    fit = room // max(each, 1)
    if fit < 1:
        raise ConfigError(
            f"memory: a trial needs {size(each)} beside the model of {size(need.base)}, and there is "
            f"{size(max(room, 0))}; lower batch_size, max_length or the ranks of the space, or give more memory"
        )
    if wanted is not None:
        count = min(wanted, fit, most)
        return Slots(count, {"wanted": wanted, "fit": fit, "room": room, "each": each})
    most = min(most, fit)
    rates = measured(lambda count: _rate(pack, setup, config, count), most)
    best = max(map(max, rates.values()))
    count = max(count for count, seen in rates.items() if max(seen) >= AS_FAST * best)
    return Slots(count, {"rates": rates, "fit": fit if fit == most else None, "room": room, "each": each})


def measured(rate: Callable[[int], float], most: int) -> dict[int, list[float]]:
    """``rate(count)`` for 1, 2, 4, ... and ``most``, until more slots cost speed or do not fit.

    That they cost speed is believed only once both, these and the fastest so far, were measured ``TURNS`` times.
    """
    rates: dict[int, list[float]] = {}
    count = 1
    while True:
        try:
            rates[count] = [rate(count)]
            while _slower(rates, count) and len(rates[count]) < TURNS:
                fastest = max(rates, key=lambda n: max(rates[n]))
                rates[count].append(rate(count))
                if len(rates[fastest]) < TURNS:
                    rates[fastest].append(rate(fastest))
        except (RuntimeError, MemoryError) as error:
            if not rates or not explain(error).startswith("out of memory"):
                raise
            return rates
        if count == most or _slower(rates, count):
            return rates
        count = min(2 * count, most)


def _slower(rates: Mapping[int, Sequence[float]], count: int) -> bool:
    return max(rates[count]) < AS_FAST * max(map(max, rates.values()))


def _rate(pack: Pack, setup: Setup, config: LoraConfig, count: int) -> float:
    """Tokens a second with ``count`` slots."""
    # The fastest step counts: the machine may be busy otherwise.
    return max(tokens / seconds for tokens, seconds in _probe(pack, setup, config, count))


def seconds_of_step(pack: Pack, setup: Setup, config: LoraConfig) -> float:
    """Seconds of a step of one adapter like ``config``."""
    return min(seconds for _, seconds in _probe(pack, setup, config, 1))


def _probe(pack: Pack, setup: Setup, config: LoraConfig, count: int) -> list[tuple[int, float]]:
    """Tokens and seconds of a few steps with ``count`` slots, which are gone afterwards."""
    names = [f"probe-{i}" for i in range(count)]
    try:
        for name in names:
            pack.add(name, config)
        slots = [setup.slot(name, setup.options, steps=STEPS + 1) for name in names]
        advance(pack, slots)
        found, began = [], time.perf_counter()
        for step in range(STEPS):
            started = time.perf_counter()
            tokens = advance(pack, slots)
            found.append((tokens, time.perf_counter() - started))
            if step >= 1 and time.perf_counter() - began > SECONDS:
                break
        return found
    finally:
        for name in names:
            if name in pack.adapters:
                pack.remove(name)
