"""The output folder of a run: whether it can be used, its run file, and the adapter with ``run.json`` in it."""

from __future__ import annotations

import contextlib
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
from loraloom.training.run_record import RUN_NAME, as_json, sealed

#: The run file with every option resolved: it repeats the run.
RUN_FILE = "run.yaml"
#: What a run writes beside its checkpoints.
FILES = (WEIGHTS_NAME, CONFIG_NAME, RUN_NAME, RUN_FILE, TEMPLATE_NAME, BAD_ROWS, LOCK_NAME, "usage.json", "curves.png")
_TITLE = "The options of this run, with nothing left open."


def check_output(options: TrainConfig, *, resumes: bool = False, files: Sequence[str] = FILES) -> None:
    """Check before training that the output folder can be used. Leaves no trace.

    Args:
        resumes: the run in this folder is resumed, so the folder may hold its files.
        files: the names that will be written.

    Raises:
        ConfigError: the folder cannot be written, or holds something that must not be replaced.
    """
    folder = Path(options.output)
    made: list[Path] = []
    if interrupted(folder):
        recover(folder)
    try:
        if not resumes and not options.overwrite:
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
    """Context of a run whose ``run.yaml`` is written first.

    The file describes the adapter beside it: if this run fails and leaves an earlier run's adapter, that run's file is
    restored.

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
    """Changes if the file is replaced; None if it does not exist."""
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
    """Write the adapter and ``run.json`` in one step, or into a temporary folder if ``folder`` cannot be written.

    ``beside``: further files (``training.usage``). An earlier run's chat template is removed with its adapter.

    Returns:
        What ``run.json`` holds: ``record`` with the hashes of the files beside it.

    Raises:
        SaveError: ``folder`` cannot be written; the message says where the adapter is instead.
    """

    def write(to: Path) -> dict[str, Any]:
        stale = TEMPLATE_NAME not in beside and (to / RUN_NAME).exists()
        files = {**checkpoint.files_of(model.base_model), **beside}
        hashes: dict[str, str] = {}
        hashed: dict[str, Contents] = {name: _hashing(what, name, hashes) for name, what in files.items()}
        if stale:
            hashed[TEMPLATE_NAME] = None
        # Written last: it holds the hashes of the others.
        write_files(to, {**hashed, RUN_NAME: lambda path: _put(path, as_json({**record, "files": hashes}))})
        return sealed({**record, "files": hashes})

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
    """The first file that differs from what the run of ``record`` wrote, or ``""``. Records of 0.1 have no hashes."""
    found = first_changed(Path(folder), record.get("files", {}))
    return "" if found is None else str(found[0])


def _hashing(contents: Contents, name: str, hashes: dict[str, str]) -> Callable[[Path], None]:
    """A writer of ``contents`` that puts the hash of the written file into ``hashes``."""

    def write(path: Path) -> None:
        if callable(contents):
            contents(path)
        else:
            _put(path, contents or b"")
        hashes[name] = file_hash(path)

    return write


def _put(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)
