"""One run per output folder at a time. Two would delete each other's checkpoints and mix their files.

An operating-system lock on a file in the folder, released when the process ends in any way; the contents of the file
only name the holder. If the file system has no such locks, nothing is locked. Knows nothing of what a run writes.
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
#: Seconds for which a held lock is tried, and between two tries: another process may hold it only to check it.
PATIENCE, BETWEEN = 0.25, 0.05


class Taken(Exception):
    """Another process or thread holds the lock."""


def exclusive(path: Path, patience: float) -> BaseFileLock | None:
    """Acquire the lock of the file ``path``; None if locks are not supported. ``patience`` -1 waits without limit.

    Raises:
        Taken: not acquired within ``patience`` seconds.
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
    except OSError:  # no locks, or no file can be created: the first write into the folder reports the reason
        if not there:
            with contextlib.suppress(OSError):
                path.unlink()
        return None


def release(path: Path, lock: BaseFileLock | None) -> None:
    """Release a lock of ``exclusive`` and delete its file."""
    if lock is not None:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: nobody else's is deleted
        lock.release()


def _make_way(path: Path) -> None:
    """Delete a symbolic or hard link in place of the lock file."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
            path.unlink()


def check(folder: str | Path) -> None:
    """Raise ``ConfigError`` if another run holds the lock of ``folder``; the message names that run."""
    if os.path.lexists(Path(folder) / LOCK_NAME):
        with held(folder):
            pass


def is_held(folder: str | Path) -> bool:
    """Whether a run is under way in ``folder``."""
    try:
        check(folder)
    except ConfigError:
        return True
    return False


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Context that holds ``folder`` for this run, creating it if needed. Leaves no trace of the lock.

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
        with contextlib.suppress(OSError):  # a full disk: the lock is held nevertheless
            since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            path.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}))
    return lock


def _who(path: Path) -> str:
    try:
        found = json.loads(path.read_bytes())
        elsewhere = "" if found["host"] == socket.gethostname() else f" on {found['host']}"
        return f"process {found['pid']}{elsewhere}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "of a process that has not yet said which"
