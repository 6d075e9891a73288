"""Several files of a folder replaced as one: after a crash there are the old ones or the new ones.

The new contents are written aside and synced. Then one rename puts a journal in place, which is the moment the new
files count; the renames that follow can be repeated by whoever reads the folder next (``recover``).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

from loraloom.errors import SaveError

JOURNAL = ".loraloom-commit.json"


def write_files(folder: str | Path, files: Mapping[str, bytes | Callable[[Path], None]]) -> None:
    """Replace ``folder``'s files (relative path → contents, or what writes them to a path) together. Others stay.

    Raises:
        SaveError: the folder cannot be written or the disk is full; the old files are as they were.
    """
    folder = Path(folder)
    mark = secrets.token_hex(4)
    aside = {name: _aside(name, mark) for name in files}
    journal = folder / f".{JOURNAL}.{mark}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        for name, contents in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            for left in (folder / name).parent.glob(f".{Path(name).name}.{'[0-9a-f]' * 8}"):
                left.unlink()  # a crash before the journal left it
            _write(folder / aside[name], contents)
        _write(journal, json.dumps({new: name for name, new in aside.items()}).encode())
        os.replace(journal, folder / JOURNAL)
        _sync(folder)
    except OSError as error:
        for path in (journal, *(folder / new for new in aside.values())):
            with contextlib.suppress(OSError):
                path.unlink()
        raise SaveError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); "
            "what was there is unchanged. Free space or choose another folder"
        ) from error
    recover(folder)


def recover(folder: str | Path) -> None:
    """Finish a replacement that a crash interrupted after it counted. Nothing happens where none was."""
    folder = Path(folder)
    try:
        moves = json.loads((folder / JOURNAL).read_bytes())
    except FileNotFoundError:
        return
    for new, name in moves.items():
        with contextlib.suppress(FileNotFoundError):  # moved before the crash
            os.replace(folder / new, folder / name)
        _sync((folder / name).parent)
    (folder / JOURNAL).unlink(missing_ok=True)


def _aside(name: str, mark: str) -> str:
    path = Path(name)
    return str(path.with_name(f".{path.name}.{mark}"))


def _write(path: Path, contents: bytes | Callable[[Path], None]) -> None:
    if callable(contents):
        contents(path)
    with open(path, "ab") as file:
        if isinstance(contents, bytes):
            file.write(contents)
            file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
