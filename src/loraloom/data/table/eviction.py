"""Room in the cache: entries that were long unused, or are too much, are deleted; those in use never are.

Who uses an entry holds a shared lock of the system on its manifest, which goes with the process. Who deletes one must
have that lock alone. Where there are no such locks, it cannot be known who uses what, and nothing is deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
    """Bytes that the cache may take, as ``$LORALOOM_CACHE_LIMIT`` says; 0 for as many as it wants.

    Raises:
        ConfigError: that is no size.
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
    """An entry is in use for as long as this is kept."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.handle)


class Gone(Exception):
    """Somebody else uses the entry, or deletes it."""


def use(manifest: Path) -> Use | None:
    """Note that the entry of ``manifest`` is used, now and for as long as what comes back is kept.

    None where that cannot be noted: there is no such file, or the system has no locks.

    Raises:
        Gone: it is being deleted.
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


@dataclass
class _Found:
    folder: Path
    bytes: int
    used: float


def make(folder: Path, limit: int) -> str:
    """Delete entries of the cache in ``folder`` until it takes at most ``limit`` bytes. Returns what went, in words.

    What cannot be looked at stays: that is no reason not to use what was built.
    """
    with contextlib.suppress(OSError):
        return _make(folder, limit) if limit else ""
    return ""


def _make(folder: Path, limit: int) -> str:
    now = time.time()
    for draft in folder.glob("*/.*.part"):
        if now - _newest(draft) > HOURS * 3600:  # of a process that was killed
            remove_tree(draft)
    entries = sorted(_entries(folder), key=lambda entry: entry.used)
    total, old, much = sum(entry.bytes for entry in entries), list[int](), list[int]()
    for entry in entries:
        unused = now - entry.used > DAYS * 86400
        if (unused or total > limit) and _delete(entry.folder):
            (old if unused else much).append(entry.bytes)
            total -= entry.bytes
    said = [(old, f"unused for {DAYS} days"), (much, f"the longest unused, to stay below {sizes.size(limit)}")]
    return "; ".join(
        f"{len(found)} {'entry' if len(found) == 1 else 'entries'} ({sizes.size(sum(found))}), {why}"
        for found, why in said
        if found
    )


def _entries(folder: Path) -> Iterator[_Found]:
    """What loraloom wrote there; the folder may hold other things too."""
    for manifest in folder.glob(f"*/*/{MANIFEST}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(manifest.read_bytes())["key"] == manifest.parent.name:
                taken = sum(path.stat().st_size for path in manifest.parent.iterdir())
                yield _Found(manifest.parent, taken, manifest.stat().st_mtime)


def _delete(entry: Path) -> bool:
    """Whether it could be: nobody uses it."""
    with contextlib.suppress(OSError, Gone):
        held = _hold(entry / MANIFEST, os.O_RDWR, "LOCK_EX")
        if held is not None:
            aside = entry.with_name(f".{entry.name}.{secrets.token_hex(4)}.part")
            os.rename(entry, aside)  # absent at once, as it was whole at once
            remove_tree(aside)
            return True
    return False


def _newest(folder: Path) -> float:
    """When something in ``folder`` was last written; now, where that cannot be told."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except OSError:
        return time.time()
