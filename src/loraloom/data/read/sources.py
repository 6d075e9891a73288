"""From the option ``data`` to sources: files, a folder, a glob, a saved dataset or a dataset of the hub.

This file knows names and paths. ``source`` and ``hub`` read the rows, ``shapes`` interprets their columns. No row is
read here.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraloom.config.names import SOURCE_KEYS
from loraloom.data.read.hub import DatasetSource
from loraloom.data.read.readers import open_file
from loraloom.data.read.source import READERS, Source, suffix
from loraloom.data.split import check_weight
from loraloom.errors import ConfigError, DataError, nearest

KINDS = ".jsonl or .json (an object on each line, or one array), .csv, .tsv, .parquet or .txt"

#: ``format`` of plain text → what a row is.
TEXT_BY = {"text": "paragraph", "text-lines": "line", "text-file": "file"}

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.+-]+){0,2}")


def resolve(spec: Any, *, format: str | None = None) -> list[Source]:
    """The sources that ``spec`` names: a path, glob or name, a mapping of ``SOURCE_KEYS``, or a list of those.

    A path is a data file, a folder of data files (with subfolders; hidden files and other files are skipped), a glob,
    or a folder that ``save_to_disk`` of ``datasets`` wrote. Any other name is a dataset of the hub. The last two take
    ``split`` (default ``train``) and ``name`` (the configuration), also as ``path:split`` or ``path:name:split``.
    ``weight`` is the number of times that each row occurs in an epoch (default 1).
    ``format`` matters here only for plain text: a row is a paragraph, with ``text-lines`` a line, with ``text-file``
    the whole file.

    Raises:
        DataError: a source does not exist or is no data.
        ConfigError: an invalid ``spec``.
    """
    entries: list[Any] = list(spec) if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    if not entries:
        raise ConfigError("data: an empty list; name a file, a folder or a dataset")
    sources = [_source(_entry(entry), format) for entry in entries]
    names = [source.name for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"data: {twice!r} is named twice; for its rows to count double give it the weight 2")
    if format in ("text-lines", "text-file"):
        for source in sources:
            other = next((path for path in source.files if suffix(path) != ".txt"), None)
            if other is not None or not source.files:
                raise ConfigError(
                    f"format: {format!r} is for plain text (.txt), and {other or source.name} is not that"
                )
    return sources


def _entry(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str | os.PathLike):
        entry = {"path": os.fspath(entry)}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"data: a path, a mapping with 'path', or a list of them is needed, not {entry!r}")
    for key in entry:
        if key not in SOURCE_KEYS:
            raise ConfigError(f"data: {key!r} is not one of {', '.join(SOURCE_KEYS)}{nearest(str(key), SOURCE_KEYS)}")
    fields = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in entry.items()}
    for key in ("path", "name", "split", "revision"):
        value = fields.get(key)
        if (value is None and key == "path") or (value is not None and not (isinstance(value, str) and value)):
            raise ConfigError(f"data: {key!r} of a source is a text, not {value!r}")
    fields["weight"] = check_weight(fields.get("weight", 1.0), fields["path"])
    return fields


def _source(entry: dict[str, Any], format: str | None) -> Source:
    name: str = entry["path"]
    by, weight = TEXT_BY.get(format or "text", "paragraph"), entry["weight"]
    if os.path.isdir(name) and not _is_saved(name):
        _no_parts(entry, "a folder of files")
        return _folder(name, weight, by)
    if _is_saved(name):
        return DatasetSource.named(entry, saved=True)
    if not os.path.lexists(name):
        stem = name.rsplit(":", 2)[0] if name.count(":") > 1 else name.split(":")[0]
        if stem != name and _is_saved(stem):
            return DatasetSource.named(entry, saved=True)
        if any(sign in name for sign in "*?["):
            _no_parts(entry, "a glob")
            found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not found:
                raise DataError(f"{name}: no file fits")
            return Source(name, [_known(Path(path)) for path in found], weight, by)
        if HUB_NAME.fullmatch(name) and suffix(Path(name)) not in READERS:
            return DatasetSource.named(entry, saved=False)
    _no_parts(entry, "a file")
    open_file(Path(name), unpack=False).close()  # raises if the file cannot be read
    return Source(name, [_known(Path(name))], weight, by)


def _no_parts(entry: dict[str, Any], what: str) -> None:
    for key in ("name", "split", "revision"):
        if entry.get(key) is not None:
            raise ConfigError(f"data: {entry['path']} is {what}, which has no {key!r}")


def _known(path: Path) -> Path:
    """``path`` itself.

    Raises:
        DataError: files of this kind are not read.
    """
    kind = suffix(path)
    packed = path.suffix.lower() == ".gz"
    if packed and kind == ".parquet":
        raise DataError(f"{path}: Parquet is not read from .gz; unpack it")
    if path.suffix.lower() in (".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz") or kind == ".tar":
        raise DataError(f"{path}: an archive; unpack it (.gz files of one data file are read as they are)")
    if kind == ".arrow":
        raise DataError(f"{path}: a part of a saved dataset; name its folder")
    if kind not in READERS:
        found = f"the suffix {kind!r}" if kind else "no suffix"
        raise DataError(f"{path}: {found}; a data file is {KINDS}")
    return path


def _folder(name: str, weight: float, by: str) -> Source:
    found: list[Path] = []
    others: list[Path] = []
    for place, folders, files in os.walk(name, onerror=_unreadable):
        folders[:] = sorted(part for part in folders if not part.startswith("."))
        for file in sorted(files):
            path = Path(place, file)
            if not file.startswith((".", "_")):
                (found if suffix(path) in READERS else others).append(path)
    if not found:
        beside = f"; there is {others[0].name}" if others else ""
        raise DataError(f"{name}: a directory without data files in it ({KINDS}){beside}")
    return Source(name, [_known(path) for path in sorted(found)], weight, by, sorted(others))


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}")


def _is_saved(name: str) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    dataset = os.path.isfile(os.path.join(name, "state.json"))
    return dataset or os.path.isfile(os.path.join(name, "dataset_dict.json"))
