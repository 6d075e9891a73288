"""One run in an output folder at a time. Two would delete each other's checkpoints and mix their files.

The lock is the system's own on a file in the folder, so it goes with the process, however that dies; what the file
holds only says who has it. Where the file system has no such locks, nothing is locked: no reason not to train. Knows
nothing of what a run writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK_NAME = ".loraloom.lock"
#: Seconds for which a lock that is taken is tried, and between two tries: another process may only be looking.
PATIENCE, BETWEEN = 0.25, 0.05


class Taken(Exception):
    """Another process, or another thread of this one, has the lock."""


def exclusive(path: Path, patience: float) -> BaseFileLock | None:
    """The lock of the file ``path``, once it is had; None where there can be none. ``patience`` -1 waits for ever.

    Raises:
        Taken: it was not to be had within ``patience`` seconds.
    """
    from filelock import FileLock, Timeout

    there = os.path.lexists(path)
    lock = FileLock(path, patience, thread_local=False, poll_interval=BETWEEN, fallback_to_soft=False)
    try:
        _make_way(path)
        lock.acquire()
        return lock
    except Timeout:
        raise Taken from None
    except OSError:  # no locks here, or no file: who writes into the folder says why it cannot be written
        if not there:
            with contextlib.suppress(OSError):
                path.unlink()
        return None


def release(path: Path, lock: BaseFileLock | None) -> None:
    """Let go of what ``exclusive`` gave, and leave no file."""
    if lock is not None:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: nobody else's is deleted
        lock.release()


def _make_way(path: Path) -> None:
    """Delete a link, symbolic or a second name of a file, in the lock's place: a lock is a file of its own."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
            path.unlink()


def check(folder: str | Path) -> None:
    """Raise ``ConfigError`` if another run holds the lock of ``folder``; the message names that run."""
    if os.path.lexists(Path(folder) / LOCK_NAME):
        with held(folder):
            pass


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Have ``folder``, which is made if need be, for this run alone. Afterwards it is as if there was no lock.

    Raises:
        ConfigError: another run is under way in it; the message names it.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = _acquire(folder)
    try:
        yield
    finally:
        release(folder / LOCK_NAME, lock)
        for path in made:  # those into which nothing was written
            with contextlib.suppress(OSError):
                path.rmdir()


def _acquire(folder: Path) -> BaseFileLock | None:
    path = folder / LOCK_NAME
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = exclusive(path, PATIENCE)
    except Taken:
        raise ConfigError(
            f"output: another run is under way in {folder} ({_who(path)}); wait for its end, or give another folder "
            "with --output"
        ) from None
    if lock is not None:
        with contextlib.suppress(OSError):  # a full disk: the lock is had all the same
            path.write_text(json.dumps(_note()))
    return lock


def _note() -> dict[str, object]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}


def _who(path: Path) -> str:
    try:
        found = json.loads(path.read_bytes())
        elsewhere = "" if found["host"] == socket.gethostname() else f" on {found['host']}"
        return f"process {found['pid']}{elsewhere}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "of a process that has not yet said which"
