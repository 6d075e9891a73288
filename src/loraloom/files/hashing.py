"""SHA-256 of files, to detect changed or damaged ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

BLOCK = 1 << 20


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
