"""Datasets of the library ``datasets``: a saved folder, or a name on the hub.

This file knows splits, configurations and errors of the network. A dataset's own classes (``ClassLabel``) are read as
their names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraloom.data.read.source import Source
from loraloom.data.read.tables import CHUNK, arrow_rows, class_names
from loraloom.data.rows import OnBad, Row
from loraloom.errors import ConfigError, DataError, first_line, nearest
from loraloom.files import network

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class DatasetSource(Source):
    """One split of a dataset, opened at the first read. Rows are numbered from 1."""

    path: str = ""
    saved: bool = False
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        self._opened: Dataset | None = None

    @classmethod
    def named(cls, entry: dict[str, Any], saved: bool) -> DatasetSource:
        """The source of an entry whose path may be ``path:split`` or ``path:config:split``."""
        parts = [entry["path"]]
        if not os.path.lexists(entry["path"]):
            head, *rest = entry["path"].rsplit(":", 2)
            # The colon after the letter of a drive is part of the path.
            parts = (
                [head, *rest] if not saved or len(rest) < 2 or os.path.isdir(head) else [f"{head}:{rest[0]}", rest[1]]
            )
        inside = {"split": parts[-1] if len(parts) > 1 else None, "name": parts[1] if len(parts) > 2 else None}
        for key, part in inside.items():
            if None not in (part, entry.get(key)) and part != entry[key]:
                raise ConfigError(f"data: {entry['path']} and {key!r} name two: {part!r} and {entry[key]!r}")
        split, config = (entry.get(key) or part for key, part in inside.items())
        if saved and (config is not None or entry.get("revision") is not None):
            key = "name" if config is not None else "revision"
            raise ConfigError(f"data: {parts[0]} is a saved dataset, which has no {key!r}")
        named = ":".join(part for part in (parts[0], config, split) if part)
        rest = {"saved": saved, "config": config, "split": split, "revision": entry.get("revision")}
        return cls(named, weight=entry["weight"], path=parts[0], **rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # another process opens the dataset again

    def _dataset(self) -> Dataset:
        if self._opened is None:
            self._opened = self._one_split(_load_saved(self.path) if self.saved else self._load_hub())
        return self._opened

    def _one_split(self, found: Any) -> Dataset:
        from datasets import DatasetDict

        if not isinstance(found, DatasetDict):
            if self.split is not None and self.saved and str(found.split) != self.split:
                raise DataError(f"{self.path}: one dataset that is not in splits; there is no {self.split!r}")
            dataset: Dataset = found
            return dataset
        splits = list(found)
        wanted = self.split or ("train" if "train" in splits or len(splits) > 1 else splits[0])
        if wanted not in splits:
            raise DataError(
                f"{self.path}: no split {wanted!r}; there is {', '.join(splits)} "
                f"(name it: {self.path}:{splits[0]}){nearest(wanted, splits)}"
            )
        return found[wanted]

    def _load_hub(self) -> Any:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError

        try:
            if network.unreachable():
                return self._load_cached()
            # All splits: the error of a missing one lists them.
            return load_dataset(self.path, self.config, revision=self.revision)
        except DatasetNotFoundError as exc:
            raise DataError(
                f"{self.path}: no such file or folder here{_beside(self.path)}, and no dataset of that name on the "
                f"hub: {first_line(exc)}"
            ) from None
        except (ConnectionError, TimeoutError) as exc:
            why = network.unreachable() or f"HF_HUB_OFFLINE is set, or it was lost meanwhile: {first_line(exc)}"
            raise DataError(
                f"{self.path}: no such file or folder here{_beside(self.path)}; as the name of a dataset on the hub "
                f"it would have to be fetched, and there is no network ({why})"
            ) from None
        except Exception as exc:  # the libraries of the network and of formats have no common base
            raise DataError(f"{self.path}: the dataset cannot be loaded: {first_line(exc)}") from exc

    def _load_cached(self) -> Any:
        """The cached copy, which ``load_dataset`` uses only after it tried the network for half a minute.

        Raises:
            ConnectionError: the dataset is not in the cache.
        """
        from datasets.packaged_modules.cache.cache import Cache

        name = self.path.rpartition("/")[2]
        try:
            return Cache(
                repo_id=self.path, dataset_name=name, config_name=self.config, version="auto", hash="auto"
            ).as_dataset()
        except ValueError as exc:
            raise ConnectionError(str(exc)) from None

    def _rows(self, bad: OnBad | None) -> Iterator[Row]:
        dataset = self._dataset()
        features = dataset.features.to_dict()
        classes = {name: names for name, feature in features.items() if (names := class_names(feature))}
        yield from arrow_rows(dataset.with_format("arrow").iter(batch_size=CHUNK), classes, self.name)

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of the name, the revision and the dataset's own fingerprint, by the name."""
        parts = (self.name, self.revision or "", self._dataset()._fingerprint)
        return {self.name: hashlib.sha256("\n".join(parts).encode()).hexdigest()}

    def describe(self) -> str:
        """The source in a few words, for a note to the user."""
        said = f"{self.name} ({'a saved dataset' if self.saved else 'a dataset of the hub'}"
        said += f", revision {self.revision})" if self.revision else ")"
        return said if self.weight == 1 else f"{said}, weight {self.weight:g}"


def _load_saved(path: str) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(path)
    except Exception as exc:  # of Arrow, JSON or the file system: the folder is damaged
        raise DataError(f"{path}: the saved dataset cannot be read: {first_line(exc)}") from exc


def _beside(path: str) -> str:
    folder = os.path.dirname(path) or "."
    return nearest(os.path.basename(path), os.listdir(folder) if os.path.isdir(folder) else ())
