"""What a run resumes from: a checkpoint, or the end of a run that is in its output folder already."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraloom.config.train import TrainConfig
from loraloom.errors import ConfigError, FormatError
from loraloom.files.atomic import interrupted, recover
from loraloom.lora.checkpoint import WEIGHTS_NAME
from loraloom.messages import Message, OnEvent, ignore
from loraloom.training.checkpointing import folders
from loraloom.training.checkpointing.folders import Checkpoint
from loraloom.training.checkpointing.identity import check_options, check_same, differences, identity_in
from loraloom.training.checkpointing.restore import reading
from loraloom.training.output import changed
from loraloom.training.run_record import RUN_NAME
from loraloom.training.run_record import read as read_record

Resume = bool | str | Path | None


@dataclass(frozen=True)
class Found:
    """What there is to resume for a run with the output folder ``folder``."""

    folder: Path
    checkpoint: Checkpoint | None = None
    #: ``run.json`` of a finished run in this folder
    finished: dict[str, Any] | None = None
    #: ``run.json`` of a run in this folder that ended early; its adapter may be replaced
    stopped: dict[str, Any] | None = None

    @property
    def elsewhere(self) -> bool:
        """True for a checkpoint in another folder."""
        return self.checkpoint is not None and self.checkpoint.path.parent.resolve() != self.folder.resolve()

    @property
    def where(self) -> str:
        """Its name in messages."""
        if self.finished:
            return f"the finished run in {self.folder}"
        return str(self.checkpoint.path) if self.checkpoint else f"the run in {self.folder} that ended early"

    @property
    def identity(self) -> dict[str, Any] | None:
        """The identity of the run that was found; None if there is none.

        Raises:
            ConfigError: the checkpoint's state is not what loraloom writes.
        """
        if self.checkpoint and not self.finished:
            return _identity_of(self.checkpoint)
        record = self.finished or self.stopped
        return record and identity_in(record)

    def changes(self, now: Mapping[str, Any]) -> list[str]:
        """What differs from the identity ``now`` and may change the last bits of the result.

        Raises:
            ConfigError: the result would be another one, or the checkpoint's state is not what loraloom writes.
        """
        with reading(self.checkpoint) if self.checkpoint else contextlib.nullcontext():
            return check_same(self.identity, now, self.where) if self.identity else []


def find(options: TrainConfig, resume: Resume, on_event: OnEvent = ignore, *, ended: bool = True) -> Found:
    """Find what a run with ``options`` resumes from. The caller must still compare their identities.

    With the option ``overwrite``, runs of other options are skipped, because they may be replaced.

    Args:
        resume: True for the newest whole checkpoint of the output folder; a path for that checkpoint.
        ended: False to skip runs that ended, and look at checkpoints alone.

    Raises:
        ConfigError: the path is no whole checkpoint, none of the folder can be resumed, or the adapter in the
            folder is not the one that its finished run wrote.
    """
    folder = Path(options.output)
    if resume is None or resume is False:
        return Found(folder)
    if interrupted(folder):
        recover(folder)
    record = _record(folder, on_event) if ended else None
    same = record is not None and not _differ(record["options"], options)
    finished = record if record and record["state"] == "finished" else None
    if resume is not True:
        return Found(folder, _given(Path(resume), options), stopped=record if same and not finished else None)
    if finished and same:
        replaced = changed(folder, finished)
        if not replaced:
            return Found(folder, finished=finished)
        if not options.overwrite:
            raise ConfigError(
                f"resume: {replaced} is not the one that the finished run in {folder} wrote: it was replaced or "
                f"damaged since; move {folder / WEIGHTS_NAME} elsewhere to have the adapter made again, or choose "
                "another folder, or give --overwrite"
            )
    lost: list[str] = []

    def unfit(checkpoint: Checkpoint) -> str:
        if options.overwrite and _differ(_identity_of(checkpoint)["options"], options):
            return "it was trained with other options, and is replaced (overwrite)"
        if reason := _best_is_lost(checkpoint, options):
            lost.append(reason)
        return reason

    checkpoint = folders.newest(folder, on_event, unfit)
    if checkpoint is None and lost:
        raise ConfigError(f"resume: {lost[-1]}; start over, in another folder or with overwrite")
    if checkpoint is None and record and not options.overwrite:
        return Found(folder, finished=finished, stopped=None if finished else record)
    return Found(folder, checkpoint)


def resumes(options: TrainConfig, resume: Resume) -> bool:
    """Whether the output folder holds only what a run with ``options`` resumes from, and may replace.

    Raises:
        ConfigError: as ``find``, or what was found was trained with other options. Nothing is loaded.
    """
    found = find(options, resume)
    if (then := found.identity) is None:
        # Damaged checkpoints may be replaced; an adapter without a record may not.
        return resume is True and not (found.folder / WEIGHTS_NAME).exists()
    check_options(then["options"], _with_open_options(options, then["options"]), found.where)
    unchanged = found.stopped is not None and not changed(found.folder, found.stopped)
    if found.elsewhere:
        return unchanged and not folders.listed(found.folder)
    return unchanged or found.stopped is None


def date_of(options: TrainConfig, resume: Resume) -> str | None:
    """The date of the run that ``options`` resume, if a chat template writes it."""
    then = find(options, resume).identity
    return then["options"].get("date") if then else None


def _differ(then: Mapping[str, Any], options: TrainConfig) -> bool:
    return bool(differences(then, _with_open_options(options, then)))


def _with_open_options(options: TrainConfig, then: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` as they will be once data and model are loaded: what they leave open is as it was."""
    now = options.to_dict()
    return now | {name: then.get(name) for name in ("max_length", "date") if now[name] is None}


def _identity_of(checkpoint: Checkpoint) -> dict[str, Any]:
    with reading(checkpoint):
        found: dict[str, Any] = checkpoint.state["identity"]
        found["options"]["lora"].keys(), found["options"]["max_length"]
        return found


def _given(path: Path, options: TrainConfig) -> Checkpoint:
    try:
        checkpoint = folders.read(path)
    except ConfigError as error:
        inside = folders.listed(path)
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise ConfigError(f"resume: {error}{hint}") from None
    if reason := _best_is_lost(checkpoint, options):
        raise ConfigError(f"resume: {reason}; choose an earlier one, or start over")
    return checkpoint


def _best_is_lost(checkpoint: Checkpoint, options: TrainConfig) -> str:
    """Why ``load_best_model_at_end`` would fail after this checkpoint, or an empty string."""
    found = checkpoint.state.get("best")
    if not options.load_best_model_at_end or not found or found["step"] == checkpoint.step:
        return ""
    name = f"checkpoint-{found['step']}"
    if any(folders.is_whole(folder / name) for folder in (Path(options.output), checkpoint.path.parent)):
        return ""
    return (
        f"{checkpoint.path.parent / name}, the best one so far, is gone or damaged, and load_best_model_at_end needs it"
    )


def _record(folder: Path, on_event: OnEvent) -> dict[str, Any] | None:
    """``run.json`` of the adapter in ``folder``; None if one of the two is missing or damaged."""
    if not (folder / WEIGHTS_NAME).exists():
        return None
    try:
        return read_record(folder / RUN_NAME)
    except FormatError:
        raise
    except ConfigError as error:
        on_event(Message("skipped", what=str(error)))
        return None
