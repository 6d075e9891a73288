"""SHA-256 of files, to detect changed or damaged ones, and of plain values."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

BLOCK = 1 << 20
#: Seconds after which a change to a file is sure to give it another time.
SETTLED = 2.0


def file_hash(path: str | Path) -> str:
    """The SHA-256 of a file, read block by block.

    Raises:
        OSError: the file cannot be read.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def known_hash(path: str | Path) -> str:
    """``file_hash``, but the file is read once as long as its size and its times are the same.

    A file that changed a moment ago is read every time: it may change again without another time.

    Raises:
        OSError: the file cannot be read.
    """
    found = os.stat(path)
    if time.time() - max(found.st_mtime, found.st_ctime) < SETTLED:
        return file_hash(path)
    return _hash(os.path.abspath(path), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=64)
def _hash(path: str, *stamp: int) -> str:
    return file_hash(path)


def value_hash(value: Any) -> str:
    """The SHA-256 of plain JSON values; keys stand in the order that they have."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def first_changed(folder: Path, files: Mapping[str, str]) -> tuple[Path, OSError | None] | None:
    """The first of ``files`` (name → ``file_hash``) in ``folder`` that has changed, and the error of reading it."""
    for name, wanted in sorted(files.items()):
        path = folder / name
        try:
            if file_hash(path) != wanted:
                return path, None
        except OSError as error:
            return path, error
    return None
