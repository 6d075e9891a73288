"""Whether torch's threads fit the cores that this process may use, and the work that others do on them."""

from __future__ import annotations

import math
import os

import torch

from loraloom.files.resources import cores, quota
from loraloom.train.preflight.doctor import Finding


def examine(device: torch.device) -> list[Finding]:
    """What there is to say of the processor, before the first step on it."""
    if device.type != "cpu":
        return []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    found = threads(torch.get_num_threads(), cores(), quota(), load)
    return [found] if found else []


def threads(count: int, allowed: int, quota: float | None, load: float) -> Finding | None:
    """The finding on ``count`` threads, where ``allowed`` cores may be used, of which a container gets ``quota``.

    ``load`` counts runnable threads of the machine over the last minute, our own among them. Threads that wait for a
    core hold up all others at every product: two cores at load 15 train 20 times slower with two threads than with one.
    """
    share = max(1, math.ceil(quota)) if quota is not None else allowed
    most = min(allowed, share)
    if count > most:
        why = f"the quota of this container is {quota:g} cores" if share < allowed else f"it may use {allowed} cores"
        return _finding(f"torch computes with {count} threads, and {why}", most)
    others = load - count
    if count > 1 and others > most / 2:
        return _finding(f"torch computes with {count} threads on {most} cores whose load is {load:.1f}",
                        max(1, int(most - others)))  # fmt: skip
    return None


def _finding(what: str, instead: int) -> Finding:
    return Finding("threads", f"{what}: threads that wait for a core hold up all others; set OMP_NUM_THREADS={instead}")
