"""Whether torch's threads fit the cores that this process may use, and the work that others do on them."""

from __future__ import annotations

import math
import os

import torch

from loraloom.files.resources import cores, quota
from loraloom.messages import Warn


def examine(device: torch.device) -> list[Warn]:
    """What there is to say of the processor, before the first step on it."""
    if device.type != "cpu":
        return []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = threads(torch.get_num_threads(), cores(), quota(), load)
    return [found] if found else []


def threads(count: int, allowed: int, quota: float | None, load: float) -> Warn | None:
    """The warning about ``count`` threads, where ``allowed`` cores may be used, of which a container gets ``quota``.

    ``load`` counts runnable threads of the machine over the last minute, our own among them. Threads that wait for a
    core hold up all others at every product: two cores at load 15 train 20 times slower with two threads than with one.
    """
    share = max(1, math.ceil(quota)) if quota is not None else allowed
    most = min(allowed, share)
    if count > most:
        limit = {"quota": quota} if share < allowed else {"allowed": allowed}
        return Warn("threads", threads=count, instead=most, **limit)
    others = load - count
    if count > 1 and others > most / 2:
        return Warn("threads", threads=count, instead=max(1, int(most - others)), cores=most, load=load)
    return None
