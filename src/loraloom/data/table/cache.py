"""Cache entries: folders that are complete or absent, verified when read, and rebuilt if damaged.

This file knows folders, sizes and hashes, not the meaning of the files. An entry is a folder named by the hash of its
inputs, with a ``manifest.json`` that lists every file with size and SHA-256. The modification time of the manifest is
the time of the last use, and users of an entry hold a lock on the manifest; ``eviction`` uses both.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loraloom.data.table import eviction
from loraloom.data.table.eviction import MANIFEST, Gone
from loraloom.errors import SaveError
from loraloom.files.atomic import remove_tree
from loraloom.files.hashing import file_hash
from loraloom.files.jsonio import MALFORMED
from loraloom.files.lock import Taken, exclusive, release
from loraloom.files.log import Log, info

#: The folder of the cache, where it is to be another than the system's.
VARIABLE = "LORALOOM_CACHE"
#: Of the layout of entries. Another one is as good as none.
FORMAT = 1
#: Maximum bytes of a file in memory.
SPOOL = 16 * 2**20
#: The packages of ``SOURCE`` whose code decides what tokens a row becomes: reading, shapes and the tasks' encoders.
SOURCE, PACKAGES, SUFFIXES = Path(__file__).parents[2], ("data", "tasks"), (".py", ".jinja")


def cache_folder() -> Path:
    """``$LORALOOM_CACHE``, or ``loraloom`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "loraloom"


def key_of(parts: Mapping[str, Any]) -> str:
    """The key of ``parts``, which are plain JSON values."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@functools.cache
def code_hash() -> str:
    """The hash of all that makes rows into tokens, beside what the user chose: code of ours and of libraries."""
    digest = hashlib.sha256()
    files = [path for package in PACKAGES for path in (SOURCE / package).rglob("*") if path.suffix in SUFFIXES]
    for path in sorted(files):
        digest.update(path.read_bytes())
    for package in ("loraloom", "tokenizers", "transformers", "jinja2"):
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Context of writes to the cache: errors of the file system become ``SaveError``, and another folder is used."""
    try:
        yield
    except OSError as error:
        raise SaveError(str(error.strerror)) from error


class Growing(io.BufferedWriter):
    """A file of a draft."""

    def write(self, data: Any) -> int:
        with _writing():
            return super().write(data)

    def close(self) -> None:
        with _writing():
            super().close()


class Draft:
    """A folder that is being written. Files are created only by ``file``, so that the manifest lists them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Growing] = {}

    def file(self, name: str) -> Growing:
        with _writing():
            self._files[name] = Growing(io.FileIO(self.folder / name, "w"))
        return self._files[name]

    def drop(self) -> None:
        """Close all files, also those that cannot be written."""
        for file in self._files.values():
            with contextlib.suppress(SaveError):
                file.close()

    def finish(self, key: str, info: Mapping[str, Any]) -> None:
        """Write the manifest, last: a folder without a manifest is no entry."""
        for file in self._files.values():
            file.close()
        paths = {name: self.folder / name for name in self._files}
        files = {name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for name, path in paths.items()}
        manifest = {"format": FORMAT, "key": key, "info": info, "files": files}
        with _writing():
            (self.folder / MANIFEST).write_text(json.dumps(manifest, sort_keys=True, indent=1), encoding="utf-8")


@dataclass
class Entry:
    """A complete folder. ``info`` is the result of its builder; ``fresh`` if it was built just now."""

    folder: Path
    info: dict[str, Any]
    fresh: bool
    _keep: Any = field(default=None, repr=False)  # released with the entry: its lock, or a temporary folder

    def array(self, name: str, dtype: str) -> npt.NDArray[Any]:
        """A file as an array that stays on disk."""
        path = self.folder / name
        mapped = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
        # A plain array over the map: slices of numpy's own class for maps are several times as slow.
        return np.asarray(mapped).view(np.ndarray)

    def lines(self, name: str) -> Iterator[bytes]:
        with open(self.folder / name, "rb") as file:
            yield from file


class Memory:
    """The files and ``info`` of small data: an entry that is not in the cache. A large file is moved to disk."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}
        self.info: dict[str, Any] = {}

    def file(self, name: str) -> Any:
        self.files[name] = tempfile.SpooledTemporaryFile(SPOOL)  # noqa: SIM115 - open as long as this is
        return self.files[name]

    def array(self, name: str, dtype: str) -> npt.NDArray[Any]:
        self.files[name].seek(0)
        return np.frombuffer(self.files[name].read(), dtype)

    def lines(self, name: str) -> Iterator[bytes]:
        self.files[name].seek(0)
        yield from self.files[name]

    def copy_to(self, draft: Draft) -> dict[str, Any]:
        for name, file in self.files.items():
            file.seek(0)
            shutil.copyfileobj(file, draft.file(name))
        return self.info


def find(kind: str, key: str, log: Log = info) -> Entry | None:
    """The entry of this key if there is a complete one. Writes only the time of use."""
    return _read(cache_folder() / kind / key, key, log)


def entry(kind: str, key: str, build: Callable[[Draft], Mapping[str, Any]], log: Log = info) -> Entry:
    """The entry of this key, from the cache or from ``build``, which fills a folder and returns its info.

    If the cache cannot be written (read-only, full), the folder is a temporary one, which is logged; ``build`` may be
    called twice then. If several processes need the same entry, one builds it and the others wait; without locks all
    build it and the first to finish wins. After a build, entries that were long unused or exceed the limit are deleted,
    which is logged.

    Raises:
        ConfigError: the limit of the cache is invalid.
        SaveError: the system's folder for temporary files is full as well.
    """
    root, limit = cache_folder() / kind, eviction.limit()
    try:
        with _writing():
            root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{key}.lock", log):
            found = _read(root / key, key, log)
            if found is not None:
                return found
            made = _built(root, key, build)
        if gone := eviction.make(root.parent, limit):
            log(f"deleted from the cache folder {root.parent}: {gone} (see {eviction.VARIABLE})")
        return made
    except SaveError as failure:
        log(
            f"the cache folder {root.parent} cannot be written ({failure}), so what was made of the "
            f"rows lies in a temporary folder and is made again the next time; set {VARIABLE} to choose another folder"
        )
    temporary = tempfile.TemporaryDirectory(prefix="loraloom-rows-")  # deleted with the entry
    try:
        return Entry(Path(temporary.name), _make(Path(temporary.name), key, build), True, temporary)
    except SaveError as failure:
        raise SaveError(
            f"{temporary.name}: the rows cannot be written ({failure}); free space there, or set "
            f"{VARIABLE} to a folder on a disk with room"
        ) from None


def _built(root: Path, key: str, build: Callable[[Draft], Mapping[str, Any]]) -> Entry:
    for left in root.glob(f".{key}.*.part"):  # of processes that were killed: those alive hold the lock
        remove_tree(left)
    aside, target = root / f".{key}.{secrets.token_hex(4)}.part", root / key
    try:
        with _writing():
            aside.mkdir()
        info = _make(aside, key, build)
        use = eviction.use(aside / MANIFEST)  # before other processes can see the entry
        try:
            os.rename(aside, target)
        except OSError:  # a damaged entry, or one of a process that has no locks either
            if (other := _read(target, key, lambda text: None)) is not None:
                return replace(other, fresh=True)
            with _writing():
                eviction.discard(target)
                os.rename(aside, target)
        return Entry(target, info, True, use)
    finally:
        remove_tree(aside)  # absent after a success


def _make(folder: Path, key: str, build: Callable[[Draft], Mapping[str, Any]]) -> dict[str, Any]:
    draft = Draft(folder)
    try:
        info = json.loads(json.dumps(build(draft)))  # equal to the info that is read from a manifest
        draft.finish(key, info)
        return info  # type: ignore[no-any-return]
    finally:
        draft.drop()


def _read(folder: Path, key: str, log: Log) -> Entry | None:
    if not folder.is_dir():
        return None
    try:
        use = eviction.use(folder / MANIFEST)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = {folder / name: file for name, file in manifest["files"].items()}
        # Sizes first: they are cheaper than hashes.
        whole = all(path.stat().st_size == file["bytes"] for path, file in files.items()) and all(
            file_hash(path) == file["sha256"] for path, file in files.items()
        )
        if manifest["format"] == FORMAT and manifest["key"] == key and whole:
            return Entry(folder, manifest["info"], False, use)
    except Gone:
        return None
    except (OSError, *MALFORMED):
        pass
    log(f"{folder}: damaged, so it is made again")
    return None


@contextlib.contextmanager
def _locked(path: Path, log: Log) -> Iterator[None]:
    """Hold the lock at ``path``, waiting for its holder. Without locks all build, and the first one wins."""
    try:
        lock = exclusive(path, 0)
    except Taken:
        log("another process prepares the same rows; waiting for it")
        lock = exclusive(path, -1)
    try:
        yield
    finally:
        release(path, lock)
