"""One run in an output folder at a time. Two would delete each other's checkpoints and mix their files.

The lock is the system's own on a file in the folder, so it goes with the process, however that dies; what the file
holds only says who has it. Where the system or the file system has no such locks, nothing is locked: no reason not to
train. Knows nothing of what a run writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from loraloom.errors import ConfigError
from loraloom.files.atomic import is_at

LOCK_NAME = ".loraloom.lock"
#: Looks at a lock that is taken, and seconds between them: another process may only be looking too.
LOOKS, BETWEEN = 5, 0.05

#: A symbolic link at the lock's place is not followed: what it leads to is not ours to write.
_NOT_THROUGH = getattr(os, "O_NOFOLLOW", 0)

#: Open files of the locks of this process. A fork is not the run: what it inherits of them, it closes.
_held: set[int] = set()
_watched: list[bool] = []


def check(folder: str | Path) -> None:
    """Say that another run is under way in ``folder``. Nothing is written.

    Raises:
        ConfigError: so it is; the message names it.
    """
    with contextlib.suppress(OSError):
        handle = os.open(Path(folder) / LOCK_NAME, os.O_RDONLY | _NOT_THROUGH)
        try:
            _take(handle, Path(folder), shared=True)
        finally:
            os.close(handle)


@contextlib.contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Have ``folder``, which is made if need be, for this process alone. Afterwards it is as if there was no lock.

    Raises:
        ConfigError: another run is under way in it; the message names it.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    handle = _acquire(folder)
    try:
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                (folder / LOCK_NAME).unlink()  # while it is held: nobody else's is deleted
            _held.discard(handle)
            with contextlib.suppress(OSError):
                os.close(handle)
        for path in made:  # those into which nothing was written
            with contextlib.suppress(OSError):
                path.rmdir()


def _acquire(folder: Path) -> int | None:
    """The open file of a lock; None where there can be none."""
    path = folder / LOCK_NAME
    while True:  # others came and went: each time one of them has had the lock
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _make_way(path)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | _NOT_THROUGH, 0o666)
        except OSError:  # who writes into the folder says why it cannot be written
            return None
        kept = False
        try:
            if not _take(handle, folder):
                with contextlib.suppress(OSError):
                    path.unlink()
                return None
            # Else it was deleted by who had it before: others, who look at the path, would not see it.
            if kept := is_at(handle, path):
                with contextlib.suppress(OSError):  # a full disk: the lock is had all the same
                    _note(handle)
                _register(handle)
                return handle
        finally:
            if not kept:
                os.close(handle)


def _make_way(path: Path) -> None:
    """Delete a link, symbolic or a second name of a file, in the lock's place: a lock is a file of its own."""
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink > 1):
            path.unlink()


def _take(handle: int, folder: Path, *, shared: bool = False) -> bool:
    """Whether the lock is had now; not so where there are none."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
    for look in range(LOOKS):
        if look:
            time.sleep(BETWEEN)
        try:
            fcntl.flock(handle, how)
            return True
        except BlockingIOError:
            pass
        except OSError:  # a file system without locks
            return False
    raise ConfigError(
        f"output: another run is under way in {folder} ({_who(handle)}); wait for its end, or give another folder with "
        "--output"
    )


def _who(handle: int) -> str:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        elsewhere = "" if found["host"] == socket.gethostname() else f" on {found['host']}"
        return f"process {found['pid']}{elsewhere}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "of a process that has not yet said which"


def _note(handle: int) -> None:
    since = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())


def _register(handle: int) -> None:
    if not _watched:
        os.register_at_fork(after_in_child=_let_go)
        _watched.append(True)
    _held.add(handle)


def _let_go() -> None:
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()
