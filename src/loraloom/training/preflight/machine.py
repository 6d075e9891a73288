"""Whether torch's threads fit the cores that this process may use, beside the load of other processes."""

from __future__ import annotations

import math
import os

import torch

from loraloom.files.resources import cores, quota
from loraloom.messages import Warn


def examine(device: torch.device) -> list[Warn]:
    """Warnings on the processor before the first step."""
    if device.type != "cpu":
        return []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = threads(torch.get_num_threads(), cores(), quota(), load)
    return [found] if found else []


def threads(count: int, allowed: int, quota: float | None, load: float) -> Warn | None:
    """The warning on ``count`` threads with ``allowed`` cores, of which a container may use ``quota``; or None.

    ``load`` is the machine's load average, our own threads included. A thread that waits for a core delays all others
    at every product: two cores at load 15 train 20 times slower with two threads than with one.
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
