"""Eviction of cache entries that were long unused or exceed the limit; entries in use are never deleted.

A user of an entry holds a shared operating-system lock on its manifest, which ends with the process. Deleting needs the
exclusive lock. Without such locks the users are unknown, and nothing is deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from loraloom.errors import ConfigError
from loraloom.files import sizes
from loraloom.files.atomic import remove_tree

MANIFEST = "manifest.json"
#: What the cache may take: bytes, or a size such as 20GiB. With 0 nothing is ever deleted.
VARIABLE = "LORALOOM_CACHE_LIMIT"
LIMIT = 20 * 2**30
#: Days after which an entry that nobody used is deleted, and hours after which a draft that nobody writes is rubbish.
DAYS, HOURS = 30, 24


def limit() -> int:
    """The limit of the cache in bytes, from ``$LORALOOM_CACHE_LIMIT``; 0 for no limit.

    Raises:
        ConfigError: not a size.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if not given:
        return LIMIT
    found = sizes.read(given)
    if found is None:
        raise ConfigError(
            f"{VARIABLE}: must be bytes or a size such as 20GiB or 500MB, or 0 to delete nothing, found {given!r}"
        )
    return found


class Use:
    """Keeps an entry in use during its lifetime."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.handle)


class Gone(Exception):
    """Another process uses or deletes the entry."""


def use(manifest: Path) -> Use | None:
    """Mark the entry of ``manifest`` as used, now and during the lifetime of the result.

    None if the file is missing or the system has no locks.

    Raises:
        Gone: the entry is being deleted.
    """
    found = _hold(manifest, os.O_RDONLY, "LOCK_SH")
    if found is not None:
        with contextlib.suppress(OSError):  # a cache that can only be read
            os.utime(found.handle)
    return found


def _hold(manifest: Path, mode: int, how: str) -> Use | None:
    try:
        import fcntl

        found = Use(os.open(manifest, mode | getattr(os, "O_NOFOLLOW", 0)))
        fcntl.flock(found.handle, getattr(fcntl, how) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Gone from None
    except (OSError, ImportError):
        return None
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(found.handle), manifest.lstat()):
            return found
    raise Gone  # another process was faster


def discard(entry: Path) -> None:
    """Delete an entry. Other processes see it whole or not at all."""
    aside = entry.with_name(f".{entry.name}.{secrets.token_hex(4)}.part")
    os.rename(entry, aside)
    remove_tree(aside)


def make(folder: Path, limit: int) -> str:
    """Delete entries of the cache in ``folder`` until it takes at most ``limit`` bytes. Returns a summary.

    Entries that cannot be read are kept, without an error.
    """
    now, gone = time.time(), dict[str, list[int]]()
    if not limit:
        return ""
    for draft in folder.glob("*/.*.part"):
        if now - _newest(draft) > HOURS * 3600:  # of a process that was killed
            remove_tree(draft)
    entries = sorted(_entries(folder))
    total = sum(size for _, size, _ in entries)
    for used, size, entry in entries:
        unused = now - used > DAYS * 86400
        if (unused or total > limit) and _delete(entry):
            why = f"unused for {DAYS} days" if unused else f"the longest unused, to stay below {sizes.size(limit)}"
            gone.setdefault(why, []).append(size)
            total -= size
    return "; ".join(
        f"{len(found)} {'entry' if len(found) == 1 else 'entries'} ({sizes.size(sum(found))}), {why}"
        for why, found in gone.items()
    )


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of the last use, bytes and folder of loraloom's entries; the cache's folder may contain other files too."""
    for manifest in folder.glob(f"*/*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(manifest.read_bytes())["key"] == manifest.parent.name:
                taken = sum(path.stat().st_size for path in manifest.parent.iterdir())
                yield manifest.stat().st_mtime, taken, manifest.parent


def _delete(entry: Path) -> bool:
    """Delete an entry unless it is in use. Returns whether it was deleted."""
    with contextlib.suppress(OSError, Gone):
        held = _hold(entry / MANIFEST, os.O_RDWR, "LOCK_EX")
        if held is not None:
            discard(entry)
            return True
    return False


def _newest(folder: Path) -> float:
    """Time of the last write in ``folder``; now if unknown."""
    with contextlib.suppress(OSError):
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    return time.time()
