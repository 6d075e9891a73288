"""Cores and memory that this process may use, within the limits of its container.

Containers set limits by control groups (Linux): version 2 has one tree, version 1 a tree per controller. In a container
the path of a process's group may be that of the host; its own group is then the root.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores() -> int:
    """Number of cores on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(root: Path = ROOT, own: Path = OWN) -> float | None:
    """The smallest core limit of this process's control groups; None without a limit."""
    found = []
    for group in _groups("cpu", root, own):
        with contextlib.suppress(OSError, ValueError):  # no limit is "max", or -1
            if (group / "cpu.max").exists():
                share, period = (group / "cpu.max").read_text().split()
            else:
                share, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            found += [int(share) / int(period)] if int(share) > 0 else []
    return min(found, default=None)


def memory_used() -> int:
    """Resident memory of this process, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def memory_free(root: Path = ROOT, own: Path = OWN) -> int:
    """Bytes that this process can still allocate, by the machine and by its control groups."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_left(root, own)])


def _left(root: Path, own: Path) -> Iterator[int]:
    """Remaining bytes of each control group with a limit. Cached files count as free: the system evicts them."""
    for group in _groups("memory", root, own):
        with contextlib.suppress(OSError, ValueError, KeyError):
            new = (group / "memory.max").exists()
            limit, used = ("max", "current") if new else ("limit_in_bytes", "usage_in_bytes")
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = int(stat["inactive_file" if new else "total_inactive_file"])
            taken = int((group / f"memory.{used}").read_text()) - files
            yield max(0, int((group / f"memory.{limit}").read_text()) - taken)


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The control groups of this process for ``controller``, and their parents."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = own.read_text().splitlines()
    for line in lines:
        number, names, path = line.split(":", 2)
        if number == "0" or controller in names.split(","):
            base = root if number == "0" else root / controller
            inner = Path(path.lstrip("/"))
            yield from dict.fromkeys(base / part for part in (inner, *inner.parents, Path()))
