"""What this process may use of the machine: cores and memory, within the limits of its container.

Containers limit by control groups (Linux), of version 2 in one tree or of version 1 in a tree for each controller. In
a container the path of a process's group may be that of the host, and its own group is then the root.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores() -> int:
    """Cores on which the system lets this process run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(root: Path = ROOT, own: Path = OWN) -> float | None:
    """The least number of cores that a control group of this process is given; None without a limit."""
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
    """Bytes of the machine's memory that this process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def memory_free(root: Path = ROOT, own: Path = OWN) -> int:
    """Bytes that this process could still take: what the machine has, and what its control groups leave."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_left(root, own)])


def _left(root: Path, own: Path) -> Iterator[int]:
    """Bytes that each control group with a limit has left. Files kept in memory count as used, and make way."""
    for group in _groups("memory", root, own):
        with contextlib.suppress(OSError, ValueError, KeyError):
            new = (group / "memory.max").exists()
            limit, used = ("max", "current") if new else ("limit_in_bytes", "usage_in_bytes")
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            files = int(stat["inactive_file" if new else "total_inactive_file"])
            taken = int((group / f"memory.{used}").read_text()) - files
            yield max(0, int((group / f"memory.{limit}").read_text()) - taken)


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The control groups of this process for ``controller``, and those around them."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = own.read_text().splitlines()
    for line in lines:
        number, names, path = line.split(":", 2)
        if number == "0" or controller in names.split(","):
            base = root if number == "0" else root / controller
            inner = Path(path.lstrip("/"))
            yield from dict.fromkeys(base / part for part in (inner, *inner.parents, Path()))
