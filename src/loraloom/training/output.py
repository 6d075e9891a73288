"""The output folder of a run: whether it can be used, its run file, and the adapter with ``run.json`` in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraloom.config import runfile
from loraloom.config.lora import CONFIG_NAME
from loraloom.config.train import TrainConfig
from loraloom.data.dataset import BAD_ROWS
from loraloom.data.tokenize.templates import TEMPLATE_NAME
from loraloom.errors import ConfigError, SaveError
from loraloom.files.atomic import Contents, interrupted, recover, write_files
from loraloom.files.hashing import file_hash, first_changed
from loraloom.files.lock import LOCK_NAME
from loraloom.lora import checkpoint
from loraloom.lora.checkpoint import WEIGHTS_NAME
from loraloom.lora.model import PeftModel
from loraloom.training.checkpointing import folders
from loraloom.training.run_record import RUN_NAME, as_json

#: The options of a run, with nothing left open, as a run file that gives the same run again.
RUN_FILE = "run.yaml"
#: What a run writes beside its checkpoints.
FILES = (WEIGHTS_NAME, CONFIG_NAME, RUN_NAME, RUN_FILE, TEMPLATE_NAME, BAD_ROWS, LOCK_NAME, "usage.json", "curves.png")
_TITLE = "The options of this run, with nothing left open."


def check_output(options: TrainConfig, *, going_on: bool = False, files: Sequence[str] = FILES) -> None:
    """An output that cannot be used is said before training, not after it. Leaves no trace.

    Args:
        going_on: the run is gone on with in this folder, which may therefore hold what it wrote.
        files: what will be written into it.

    Raises:
        ConfigError: the folder holds something that is not to be replaced, or cannot be written.
    """
    folder = Path(options.output)
    made: list[Path] = []
    if interrupted(folder):
        recover(folder)
    try:
        if not going_on and not options.overwrite:
            there = folders.listed(folder)
            hint = f", and {there[0].name}; to resume that run give --resume, else" if there else ";"
            if (folder / WEIGHTS_NAME).exists():
                raise ConfigError(
                    f"output: {folder} holds an adapter already{hint} choose another folder, or give --overwrite"
                )
            if there:
                raise ConfigError(
                    f"output: {folder} holds {there[0].name} of a run that did not end; to resume it give "
                    "--resume, else choose another folder, or give --overwrite"
                )
        if (folder / "config.json").exists():
            # With an adapter in it, transformers would load the folder as model and adapter together.
            raise ConfigError(f"output: {folder} holds a model; choose another folder")
        for name in files:
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                raise ConfigError(
                    f"output: {folder / name} is a folder, and a file of this name is to be written; choose another "
                    "folder, or move it away"
                )
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"output: {folder} cannot be written ({error.strerror}); choose another folder") from None
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def described(options: TrainConfig) -> Iterator[None]:
    """The folder with ``run.yaml`` in it from now on, whatever becomes of the run.

    It belongs to the adapter beside it: where that of an earlier run outlives this one, so does that run's file.

    Raises:
        SaveError: the folder cannot be written.
    """
    folder = Path(options.output)
    path, adapter = folder / RUN_FILE, _stamp(folder / WEIGHTS_NAME)
    try:
        before = path.read_bytes() if adapter and path.is_file() else None
    except OSError as error:
        raise SaveError(f"{path}: cannot be read ({error.strerror}), and it is to be replaced; move it away") from None
    runfile.write(replace(options, overwrite=False), path, _TITLE)
    try:
        yield
    except BaseException:
        if before is not None and _stamp(folder / WEIGHTS_NAME) == adapter:
            with contextlib.suppress(SaveError):
                write_files(folder, {RUN_FILE: before})
        raise


def _stamp(path: Path) -> tuple[int, int] | None:
    """By which it is known whether a file was replaced; None where there is none."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_ino, found.st_mtime_ns
    return None


def save(
    model: PeftModel,
    folder: str | Path,
    record: Mapping[str, Any],
    beside: Mapping[str, bytes],
) -> dict[str, Any]:
    """Write the adapter and ``run.json`` in one step; where the folder cannot be written, into a temporary one.

    ``beside``: further files (``training.usage``). The chat template of an earlier run goes with its adapter. Returns
    what ``run.json`` holds: ``record`` with the hashes of the files beside it.

    Raises:
        SaveError: so it was; the message says where the adapter is instead.
    """

    def write(to: Path) -> dict[str, Any]:
        stale = TEMPLATE_NAME not in beside and (to / RUN_NAME).exists()
        files = {**checkpoint.files_of(model.base_model), **beside}
        hashes: dict[str, str] = {}
        hashed: dict[str, Contents] = {name: _hashing(what, name, hashes) for name, what in files.items()}
        if stale:
            hashed[TEMPLATE_NAME] = None
        # The last one written: it says what the others are.
        write_files(to, {**hashed, RUN_NAME: lambda path: _put(path, as_json({**record, "files": hashes}))})
        found: dict[str, Any] = json.loads(as_json({**record, "files": hashes}))
        # The file's keys are sorted; the first metric is the one that is watched, and said first.
        ordered: dict[str, Any] = _in_order(found, record)
        return ordered

    try:
        return write(Path(folder))
    except SaveError as error:
        rescue = None
        try:
            rescue = tempfile.mkdtemp(prefix="loraloom-rescued-")
            write(Path(rescue))
        except (SaveError, OSError):
            if rescue:
                shutil.rmtree(rescue, ignore_errors=True)
            raise SaveError(
                f"{error}. The trained adapter could not be saved in {tempfile.gettempdir()} either"
            ) from None
        raise SaveError(f"{error}. The trained adapter is saved in {rescue} instead") from None


def changed(folder: str | Path, record: Mapping[str, Any]) -> str:
    """The first file that is no longer the one that the run of ``record`` wrote, or nothing.

    A record of an earlier version of loraloom knows no hashes.
    """
    found = first_changed(Path(folder), record.get("files", {}))
    return "" if found is None else str(found[0])


def _hashing(contents: Contents, name: str, hashes: dict[str, str]) -> Callable[[Path], None]:
    """What writes ``contents`` and notes the hash of what was written."""

    def write(path: Path) -> None:
        if callable(contents):
            contents(path)
        else:
            _put(path, contents or b"")
        hashes[name] = file_hash(path)

    return write


def _put(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)


def _in_order(found: Any, as_in: Any) -> Any:
    """``found`` with the keys of all objects in the order that they have in ``as_in``, and those it lacks behind."""
    if isinstance(found, dict) and isinstance(as_in, Mapping):
        keys = [*(key for key in as_in if key in found), *(key for key in found if key not in as_in)]
        return {key: _in_order(found[key], as_in.get(key)) for key in keys}
    if isinstance(found, list) and isinstance(as_in, list):
        return [_in_order(one, other) for one, other in zip(found, as_in, strict=True)]
    return found
