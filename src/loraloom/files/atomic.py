"""Replace several files of a folder together: after a crash all are old or all are new.

The new contents are written to temporary files and synced. Renaming a journal into place is the commit point; the
renames after it can be repeated by the next reader of the folder (``recover``).

A symbolic link in place of a file, or of a folder below the given one, is replaced. Its target never changes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from loraloom.errors import AdapterError, SaveError

JOURNAL = ".loraloom-commit.json"


#: The contents of a file, or a function that writes them to a path; None to delete the file.
Contents = bytes | Callable[[Path], None] | None
#: Marks a file to delete, in the journal.
_GONE = "-"


def write_files(folder: str | Path, files: Mapping[str, Contents]) -> None:
    """Replace ``folder``'s files (relative path → contents) together, written in this order. Other files do not change.

    Raises:
        SaveError: the folder cannot be written or the disk is full; the old files are unchanged. If the system fails
            after the commit point, ``recover`` finishes the replacement later, and the message says so.
    """
    folder = Path(folder)
    mark = secrets.token_hex(4)
    aside = {name: _aside(name, mark) + (_GONE if contents is None else "") for name, contents in files.items()}
    journal = folder / f".{JOURNAL}.{mark}"
    try:
        make_folder(folder)
        recover(folder)
        replace_links(*(folder / parent for parent in _below(files)))
        for path in (folder / JOURNAL, *(folder / name for name in files)):
            for left in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 8}"):
                left.unlink()  # a crash before the journal left it
        for name, contents in files.items():
            path = folder / name
            make_folder(path.parent)
            if path.is_dir() and not path.is_symlink():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            if contents is not None:
                _write(folder / aside[name], contents)
        for below in sorted({(folder / name).parent for name in files} - {folder}):
            sync(below)
        _write(journal, json.dumps({new: name for name, new in aside.items()}).encode())
        os.replace(journal, folder / JOURNAL)
        sync(folder)
    except OSError as error:
        for path in (journal, *(folder / new for new in aside.values())):
            with contextlib.suppress(OSError):
                path.unlink()
        raise SaveError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); "
            "what was there is unchanged. Free space or choose another folder"
        ) from error
    recover(folder)


def interrupted(folder: str | Path) -> bool:
    """Whether an interrupted replacement is waiting for ``recover``."""
    return os.path.lexists(Path(folder) / JOURNAL)


def recover(folder: str | Path) -> None:
    """Finish a replacement that was interrupted after its commit point. Does nothing if there is none.

    Raises:
        SaveError: it cannot be finished now, for example because the folder is read-only.
        AdapterError: the journal is invalid. The folder may be from an untrusted source, so no file is moved.
    """
    folder = Path(folder)
    journal = folder / JOURNAL
    try:
        moves = _moves(journal.read_bytes(), journal)
        if any((folder / parent).is_symlink() for parent in _below(moves.values())):
            raise _foreign(journal)
        for new, name in moves.items():
            with contextlib.suppress(FileNotFoundError):  # moved or deleted before the crash
                if new.endswith(_GONE):
                    (folder / name).unlink()
                else:
                    os.replace(folder / new, folder / name)
        for parent in {(folder / name).parent for name in moves.values()}:
            sync(parent)
        journal.unlink(missing_ok=True)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SaveError(
            f"{folder}: a save that was interrupted cannot be finished ({error.strerror}). Its new files lie there "
            "complete and are put in place as soon as the folder can be written and is read again"
        ) from error


def _moves(text: bytes, journal: Path) -> dict[str, str]:
    """The journal's moves, each from a file's temporary name to its name, all inside the folder."""
    with contextlib.suppress(ValueError, RecursionError):
        moves = json.loads(text)
        if isinstance(moves, dict) and all(
            isinstance(name, str) and _is_aside(new, name) for new, name in moves.items()
        ):
            return moves
    raise _foreign(journal)


def _foreign(journal: Path) -> AdapterError:
    return AdapterError(f"{journal}: loraloom did not write this, so it moves no file by it; delete it")


def _is_aside(new: str, name: str) -> bool:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts and Path(name).name != ""
    new = new.removesuffix(_GONE)
    return inside and re.fullmatch("[0-9a-f]{8}", new[-8:]) is not None and new == _aside(name, new[-8:])


def _below(names: Iterable[str]) -> list[Path]:
    """The parent folders of ``names``, below the folder that they are relative to, outermost first."""
    return sorted({parent for name in names for parent in Path(name).parents if parent.parts})


def _aside(name: str, mark: str) -> str:
    path = Path(name)
    return str(path.with_name(f".{path.name}.{mark}"))


def _write(path: Path, contents: bytes | Callable[[Path], None]) -> None:
    if callable(contents):
        path.touch()
        mode = path.stat().st_mode  # as the user's umask allows; safetensors restricts the file to its owner
        contents(path)
        path.chmod(mode)
    with open(path, "ab") as file:
        if isinstance(contents, bytes):
            file.write(contents)
            file.flush()
        os.fsync(file.fileno())


def replace_links(*paths: Path) -> None:
    """Delete symbolic links in place of folders: their targets must not be written."""
    for path in paths:
        if path.is_symlink():
            path.unlink()


def make_folder(folder: Path) -> None:
    """Create ``folder`` and its missing parents, and sync them."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made[::-1]:
        sync(path.parent)


def remove_tree(path: Path) -> None:
    """Delete a folder and its contents as far as possible; of a symbolic link only the link."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync(folder: Path) -> None:
    """Sync the entries of ``folder`` to disk, if the system supports it."""
    with contextlib.suppress(OSError):  # some systems cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
