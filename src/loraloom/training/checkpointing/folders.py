"""Checkpoint folders: ``OUTPUT/checkpoint-STEP`` is whole or absent, and its manifest proves it whole.

    checkpoint-40/
      adapter_model.safetensors, adapter_config.json   the adapter, as PEFT writes it
      state.safetensors                                 optimizer state, gradients within a step, random generators
      state.json                                        the slot's other values, and the run's identity
      manifest.json                                     size and sha256 of each file above

This file knows folders and hashes; ``restore`` knows what the tensors and the state mean. No pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from loraloom.config.lora import CONFIG_NAME
from loraloom.errors import ConfigError, FormatError, SaveError
from loraloom.files.atomic import make_folder, remove_tree, sync, write_files
from loraloom.files.hashing import file_hash, known_hash
from loraloom.files.jsonio import MALFORMED, check_format, exact, restored
from loraloom.lora.checkpoint import WEIGHTS_NAME, write_tensors
from loraloom.messages import Message, OnEvent, ignore

TENSORS_NAME = "state.safetensors"
STATE_NAME = "state.json"
MANIFEST_NAME = "manifest.json"
#: Of the folder's layout and the meaning of the state. Format 1, of loraloom 0.1, is read as well.
FORMAT = 2

_FILES = (WEIGHTS_NAME, CONFIG_NAME, TENSORS_NAME, STATE_NAME)
_NAME = re.compile(r"checkpoint-(\d+)")
#: Left by a killed run: a checkpoint half written or half deleted.
_ASIDE = re.compile(r"\.checkpoint-\d+\.[0-9a-f]{8}")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: every file is there and has its hash."""

    path: Path
    step: int
    state: dict[str, Any]

    def adapter(self) -> dict[str, Tensor]:
        """The adapter's tensors under PEFT's keys."""
        return _tensors(self.path / WEIGHTS_NAME)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that ``write`` got."""
        return _tensors(self.path / TENSORS_NAME)


def write(
    folder: str | Path,
    step: int,
    adapter: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write ``folder/checkpoint-STEP``, replacing an older one, and return its path.

    Everything is written to a temporary folder in ``folder``, synced to the disk and renamed. If the process is killed
    or the disk is full, nothing but a whole checkpoint has that name.

    Args:
        adapter: writes the adapter's files into the folder that it gets.
        tensors: any tensors, to the bit.
        state: JSON values; numbers that are not finite are allowed.

    Raises:
        SaveError: the disk is full or the folder cannot be written; existing checkpoints are unchanged.
    """
    folder = Path(folder)
    place, aside = folder / f"checkpoint-{step}", folder / f".checkpoint-{step}.{secrets.token_hex(4)}"
    try:
        make_folder(aside)
        adapter(aside)
        # Not sorted: the first metric of an evaluation decides by default.
        text = json.dumps({"format": FORMAT, "step": step} | exact(state), indent=1)
        write_files(aside, {TENSORS_NAME: partial(write_tensors, tensors), STATE_NAME: text.encode()})
        manifest = {
            name: {"bytes": (aside / name).stat().st_size, "sha256": file_hash(aside / name)} for name in _FILES
        }
        write_files(aside, {MANIFEST_NAME: json.dumps(manifest, indent=1, sort_keys=True).encode()})
        if os.path.lexists(place):
            _remove(place)
        os.rename(aside, place)
        sync(folder)
    except (OSError, SaveError) as error:
        cause = error.__cause__ if isinstance(error, SaveError) else error
        said = cause.strerror or str(cause) if isinstance(cause, OSError) else str(error)
        raise SaveError(
            f"{place}: the checkpoint cannot be written ({said}); those that were there are unchanged"
        ) from error
    finally:
        remove_tree(aside)  # after an error; else it was renamed
    return place


def read(path: str | Path) -> Checkpoint:
    """The checkpoint in the folder ``path``, after each file was compared with its hash.

    Raises:
        ConfigError: it is not a whole checkpoint; the message says what is wrong with it.
        FormatError: a later version of loraloom wrote it.
    """
    path = Path(path)
    try:
        found = _read(path)
    except _Damaged as damaged:
        problem = str(damaged)
    except FileNotFoundError as error:
        problem = f"it has no {Path(error.filename).name}"
    except OSError as error:
        problem = f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except MALFORMED:
        problem = f"{MANIFEST_NAME} or {STATE_NAME} is not what loraloom writes"
    else:
        check_format(found.state["format"], FORMAT, f"{path}: the checkpoint")
        return found
    raise ConfigError(f"{path} is no whole checkpoint: {problem}")


class _Damaged(Exception):
    """Why a folder is no whole checkpoint."""


def _read(path: Path) -> Checkpoint:
    if not path.is_dir():
        raise _Damaged("it is no folder" if path.exists() else "there is no such folder")
    manifest = json.loads((path / MANIFEST_NAME).read_bytes())
    for name in _FILES:
        size, wanted = manifest[name]["bytes"], manifest[name]["sha256"]
        if (found := (path / name).stat().st_size) != size:
            raise _Damaged(f"{name} has {found:,} bytes and had {size:,} when it was written")
        if known_hash(path / name) != wanted:
            raise _Damaged(f"{name} is damaged (its sha256 is not the one in {MANIFEST_NAME})")
    state = restored(json.loads((path / STATE_NAME).read_bytes()))
    if not isinstance(state["step"], int) or not isinstance(state["format"], int):
        raise TypeError
    return Checkpoint(path, state["step"], state)


def newest(
    folder: str | Path,
    on_event: OnEvent = ignore,
    fits: Callable[[Checkpoint], str] = lambda checkpoint: "",
) -> Checkpoint | None:
    """The whole checkpoint in ``folder`` with the most steps, or None.

    Args:
        on_event: called for each one that is skipped.
        fits: why a whole one is to be skipped, or an empty string.

    Raises:
        FormatError: one was written by a later version: training must not continue from an older one.
    """
    for path in listed(folder):
        try:
            found = read(path)
        except FormatError:
            raise
        except ConfigError as error:
            on_event(Message("skipped", what=str(error)))
            continue
        if not (against := fits(found)):
            return found
        on_event(Message("skipped", what=str(path), why=against))
    return None


def is_whole(path: str | Path) -> bool:
    try:
        read(path)
    except ConfigError:
        return False
    return True


def listed(folder: str | Path) -> list[Path]:
    """The paths of all checkpoints in ``folder``, whole or not, the most steps first."""
    with contextlib.suppress(OSError):
        return sorted((p for p in Path(folder).iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), key=_step)[::-1]
    return []


def rotate(folder: str | Path, limit: int, keep: Collection[int] = ()) -> None:
    """Delete old checkpoints until ``limit`` are left. The newest one, and those of the steps ``keep``, always stay.

    A checkpoint that cannot be deleted stays: training continues.
    """
    paths = listed(folder)
    stay = {path for path in paths if _step(path) in keep} | set(paths[:1])
    for path in paths:
        if len(stay) < limit:
            stay.add(path)
    for path in paths:
        if path not in stay:
            with contextlib.suppress(OSError):
                _remove(path)


def clean(folder: str | Path) -> None:
    """Delete half written and half deleted checkpoints of killed runs."""
    with contextlib.suppress(OSError):
        for path in list(Path(folder).iterdir()):
            if _ASIDE.fullmatch(path.name):
                remove_tree(path)


def forget(folder: str | Path) -> None:
    """Delete all checkpoints in ``folder``.

    Raises:
        SaveError: one cannot be deleted.
    """
    for path in listed(folder)[::-1]:
        try:
            _remove(path)
        except OSError as error:
            raise SaveError(f"{path}: cannot be deleted ({error.strerror}); choose another folder") from None


def copy(checkpoint: Checkpoint, folder: str | Path) -> Path:
    """Copy a checkpoint to another folder, where it is whole or absent too."""
    names = (WEIGHTS_NAME, CONFIG_NAME)

    def adapter(to: Path) -> None:
        write_files(to, {name: (checkpoint.path / name).read_bytes() for name in names})

    return write(folder, checkpoint.step, adapter, checkpoint.tensors(), checkpoint.state)


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _remove(path: Path) -> None:
    """Rename, then delete: half a checkpoint must never have the name of one."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.rename(path, aside)
    remove_tree(aside)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(path)
        return found
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from None
