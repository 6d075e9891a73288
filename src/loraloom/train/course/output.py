"""The output folder of a run: whether it can be used, and the adapter with ``run.json`` in it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraloom.errors import ConfigError, SaveError
from loraloom.lora.atomic import write_files
from loraloom.lora.checkpoint import WEIGHTS_NAME
from loraloom.lora.model import PeftModel
from loraloom.train.course import checkpoints
from loraloom.train.course.record import RUN_NAME, as_json
from loraloom.train.settings.options import TrainOptions
from loraloom.train.start.dataset import TEMPLATE_NAME


def check_output(options: TrainOptions, *, going_on: bool = False) -> None:
    """An output that cannot be used is said before training, not after it. Leaves no trace.

    Args:
        going_on: the run is gone on with in this folder, which may therefore hold what it wrote.

    Raises:
        ConfigError: the folder holds something that is not to be replaced, or cannot be written.
    """
    folder = Path(options.output)
    made: list[Path] = []
    try:
        if not going_on and not options.overwrite:
            there = checkpoints.listed(folder)
            hint = f", and {there[0].name}; to go on with that run give --resume, else" if there else ";"
            if (folder / WEIGHTS_NAME).exists():
                raise ConfigError(
                    f"output: {folder} holds an adapter already{hint} choose another folder, or give --overwrite"
                )
            if there:
                raise ConfigError(
                    f"output: {folder} holds {there[0].name} of a run that did not end; to go on with it give "
                    "--resume, else choose another folder, or give --overwrite"
                )
        if (folder / "config.json").exists():
            # With an adapter in it, transformers would load the folder as model and adapter together.
            raise ConfigError(f"output: {folder} holds a model; choose another folder")
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


def save(model: PeftModel, folder: str | Path, record: Mapping[str, Any], template: str | None = None) -> None:
    """Write the adapter and ``run.json``; where the folder cannot be written, into a temporary one.

    ``template`` is the chat template to be kept beside them. That of an earlier run goes with its adapter.

    Raises:
        SaveError: so it was; the message says where the adapter is instead.
    """
    files = {RUN_NAME: as_json(record)} | ({TEMPLATE_NAME: template.encode()} if template is not None else {})

    def write(to: str | Path) -> None:
        stale = template is None and (Path(to) / RUN_NAME).exists()
        model.save_pretrained(to)
        write_files(to, files)
        if stale:
            with contextlib.suppress(OSError):
                (Path(to) / TEMPLATE_NAME).unlink()

    try:
        write(folder)
    except SaveError as error:
        rescue = None
        try:
            rescue = tempfile.mkdtemp(prefix="loraloom-rescued-")
            write(rescue)
        except (SaveError, OSError):
            if rescue:
                shutil.rmtree(rescue, ignore_errors=True)
            raise SaveError(
                f"{error}. The trained adapter could not be saved in {tempfile.gettempdir()} either"
            ) from None
        raise SaveError(f"{error}. The trained adapter is saved in {rescue} instead") from None
