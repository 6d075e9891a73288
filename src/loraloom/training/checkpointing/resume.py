"""How a run stands in a checkpoint, and resumes from one as if it had never been stopped.

Knows what a run's numbers depend on, and whether two runs are the same in that. Files and hashes are ``checkpoints``'
business, when to save is ``run``'s.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loraloom.config.options import options_of
from loraloom.config.train import TrainConfig
from loraloom.data.example import Example
from loraloom.engine.slot import Slot
from loraloom.engine.slot_state import SlotState, check_names, values_of_format_1
from loraloom.errors import AdapterError, ConfigError, FormatError, LoraloomError
from loraloom.files.atomic import interrupted, recover
from loraloom.files.jsonio import MALFORMED
from loraloom.lora import checkpoint as adapters
from loraloom.lora.checkpoint import WEIGHTS_NAME
from loraloom.lora.model import PeftModel
from loraloom.messages import Message, OnEvent, ignore
from loraloom.training import early_stopping
from loraloom.training.checkpointing import folders
from loraloom.training.checkpointing.folders import Checkpoint
from loraloom.training.output import changed
from loraloom.training.run_record import RUN_NAME, machine, versions
from loraloom.training.run_record import read as read_record
from loraloom.training.setup import TrainJob

#: With one of these, evaluations decide when training ends, or which step's adapter is kept.
_DECIDING = ("load_best_model_at_end", "early_stopping_patience")

Resume = bool | str | Path | None


# -- what a run's numbers depend on -----------------------------------------------------------------------------------


def identity(job: TrainJob) -> dict[str, Any]:
    """All that a run's numbers depend on: its options, data, examples, model, and what computes."""
    data = job.data
    return {
        "options": job.options.to_dict(),
        "data": list(data.hashes.values()),
        "examples": _hash_of_examples(data.train.examples),
        "base": job.weights,
        "machine": versions() | machine(),
    }


def _hash_of_examples(examples: Sequence[Example]) -> str:
    """Of the lengths of all examples and of the numbers of some, so that another tokenizer is noticed."""
    lengths = getattr(examples, "lengths", None)
    if lengths is None:
        lengths = [len(example.input_ids) for example in examples]
    found = hashlib.sha256(array.array("q", map(int, lengths)).tobytes())
    some = range(0, len(examples), max(1, len(examples) // 100))
    found.update(json.dumps([[examples[i].input_ids, examples[i].labels] for i in some]).encode())
    return found.hexdigest()


def identity_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """That of the run that wrote ``run.json``."""
    return {**record["identity"], "options": record["options"], "machine": record["versions"] | record["machine"]}


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Compare two identities. Returns what may change the last bits, in words.

    Raises:
        ConfigError: they are not of one training; what differs is named with both values.
    """
    check_options(then["options"], now["options"], where)
    advice = "start over, in another folder or with overwrite"
    if then["data"] != now["data"]:
        raise ConfigError(
            f"resume: {where} was trained on other data: the hashes of the files differ; bring those files back, or "
            f"{advice}"
        )
    if then["base"] != now["base"]:
        raise ConfigError(
            f"resume: {where} was trained on another model: the weights of {now['options']['model']} differ from those "
            f"of {then['options']['model']} then; give that model or {advice}"
        )
    if then["examples"] != now["examples"]:
        raise ConfigError(
            f"resume: {where} was trained on other tokens, though the files are the same: the tokenizer, or how rows "
            f"are read, has changed; resume with the original model and versions, or {advice}"
        )
    old, new = then["machine"], now["machine"]
    changes = [f"{name} {old.get(name)} is now {new[name]}" for name in new if old.get(name) != new[name]]
    before, after = _plain(then["options"]), _plain(now["options"])
    changes += [
        f"{name} {before.get(name)!r} is now {after.get(name)!r}"
        for name in sorted(_with_effect("rounding"))
        if name in before and before[name] != after.get(name)
    ]
    return changes


def check_options(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        ConfigError: options that change what is learnt differ.
    """
    if found := differences(then, now):
        told = "; ".join(f"{name} is {new!r} and was {old!r}" for name, (old, new) in found.items())
        raise ConfigError(
            f"resume: {where} was trained with other options: {told}. Give the original options to resume, or start "
            "over, in another folder or with overwrite"
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options by name, with their values then and now, as far as they change what a run comes to."""
    old, new = _plain(then), _plain(now)
    ignored = {"nothing", "rounding"}
    if not any(options.get(name) for options in (old, new) for name in _DECIDING):
        ignored.add("evaluation")
    out = {}
    for name, option in options_of(TrainConfig).items():
        values = old.get(name, option.default), new.get(name, option.default)
        if option.resume in ignored or values[0] == values[1]:
            continue
        if _sources(name, values[0]) != _sources(name, values[1]):
            out[name] = values
    lora = old.get("lora", {}), new.get("lora", {})
    for name in sorted(lora[0].keys() | lora[1].keys()):
        if lora[0].get(name) != lora[1].get(name) and name != "base_model_name_or_path":
            out[f"lora.{name}"] = lora[0].get(name), lora[1].get(name)
    return out


def _with_effect(effect: str) -> set[str]:
    return {name for name, option in options_of(TrainConfig).items() if option.resume == effect}


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(options, default=_text, sort_keys=True))
    return found


def _text(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _sources(name: str, value: Any) -> Any:
    """Where data lies says nothing: its bytes are compared. How much of it is held out, and weights, do."""
    if name not in ("data", "eval_split", "test_split"):
        return value, name
    if isinstance(value, list):
        return [_sources(name, entry) for entry in value]
    return {**value, "path": ""} if isinstance(value, dict) else "" if isinstance(value, str) else value


# -- where to go on ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What a run that is to be resumed finds: its own end, or a checkpoint, or neither."""

    checkpoint: Checkpoint | None = None
    #: ``run.json`` of a run that came to its end in this folder
    finished: dict[str, Any] | None = None
    #: that of one that ended early in this folder, whose adapter makes way
    stopped: dict[str, Any] | None = None


def find(options: TrainConfig, resume: Resume, on_event: OnEvent = ignore, *, ended: bool = True) -> Found:
    """Where a run with ``options`` goes on, which has to be compared with it yet.

    Where the options have ``overwrite``, what was trained with other ones is passed over, as it may be replaced.

    Args:
        resume: True for the newest whole checkpoint of the output folder, a path for that checkpoint.
        ended: whether the end of a run counts, or checkpoints alone.

    Raises:
        ConfigError: the path is no whole checkpoint, none of the folder can be resumed, or the adapter in the
            folder is not the one that its finished run wrote.
    """
    if resume is None or resume is False:
        return Found()
    folder = Path(options.output)
    if interrupted(folder):
        recover(folder)
    record = _record(folder, on_event) if ended else None
    finished = record is not None and record["state"] == "finished"
    if resume is not True:
        mine = record is not None and not finished and not _differ(record["options"], options)
        return Found(_given(Path(resume), options), stopped=record if mine else None)
    if record and finished and not _differ(record["options"], options):
        replaced = changed(folder, record)
        if not replaced:
            return Found(finished=record)
        if not options.overwrite:
            raise ConfigError(
                f"resume: {replaced} is not the one that the finished run in {folder} wrote: it was replaced or "
                f"damaged since; move {folder / WEIGHTS_NAME} elsewhere to have the adapter made again, or choose "
                "another folder, or give --overwrite"
            )
    lost: list[str] = []

    def fits(checkpoint: Checkpoint) -> str:
        if options.overwrite and _differ(_options_in(checkpoint), options):
            return "it was trained with other options, and is replaced (overwrite)"
        if reason := _best_is_lost(checkpoint, options):
            lost.append(reason)
        return reason

    checkpoint = folders.newest(folder, on_event, fits)
    if checkpoint is None and lost:
        raise ConfigError(f"resume: {lost[-1]}; start over, in another folder or with overwrite")
    if checkpoint is None and record and not options.overwrite:
        return Found(finished=record) if finished else Found(stopped=record)
    return Found(checkpoint)


def resumes(options: TrainConfig, resume: Resume) -> bool:
    """Whether a run with ``options`` finds something to resume from in its own output folder.

    Raises:
        ConfigError: what it finds was trained with other options, or is no whole checkpoint: as ``find``, and before
            anything is loaded.
    """
    found, folder = find(options, resume), Path(options.output)
    then, where = _then(found, folder)
    if then is None:
        # Checkpoints that are damaged are in nobody's way; an adapter that nobody knows is.
        return resume is True and not (folder / WEIGHTS_NAME).exists()
    check_options(then, _as_then(options, then), where)
    if found.checkpoint and found.checkpoint.path.parent.resolve() != folder.resolve():
        return found.stopped is not None and not changed(folder, found.stopped) and not folders.listed(folder)
    return found.stopped is None or not changed(folder, found.stopped)


def date_of(options: TrainConfig, resume: Resume) -> str | None:
    """The day of the run that ``options`` resume; None where there is none, or no template writes it."""
    then, _ = _then(find(options, resume), Path(options.output))
    return None if then is None else then.get("date")


def _then(found: Found, folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The options of what is resumed, and its name in messages."""
    if found.finished:
        return found.finished["options"], f"the finished run in {folder}"
    if found.checkpoint:
        return _options_in(found.checkpoint), str(found.checkpoint.path)
    if found.stopped:
        return found.stopped["options"], f"the run in {folder} that ended early"
    return None, ""


def _differ(then: Mapping[str, Any], options: TrainConfig) -> bool:
    return bool(differences(then, _as_then(options, then)))


def _options_in(checkpoint: Checkpoint) -> dict[str, Any]:
    """
    Raises:
        ConfigError: its state is not one that ``state_of`` wrote.
    """
    with understood(checkpoint):
        found: dict[str, Any] = checkpoint.state["identity"]["options"]
        found["lora"].keys(), found["max_length"]
        return found


@contextlib.contextmanager
def understood(checkpoint: Checkpoint) -> Iterator[None]:
    """
    Raises:
        ConfigError: what is read of ``checkpoint`` inside is not what was written.
    """
    try:
        yield
    except AdapterError as error:
        raise ConfigError(f"{checkpoint.path}: {error}; choose an earlier one, or start over") from None
    except (LoraloomError, torch.OutOfMemoryError):
        raise
    except (*MALFORMED, RuntimeError) as error:
        raise ConfigError(
            f"{checkpoint.path}: {folders.STATE_NAME} or {folders.TENSORS_NAME} is not what loraloom writes "
            f"({type(error).__name__}: {error}); choose an earlier one, or start over"
        ) from None


def _as_then(options: TrainConfig, then: Mapping[str, Any]) -> dict[str, Any]:
    """The options before anything was loaded: what is left open is what it was."""
    now = options.to_dict()
    return now | {name: then.get(name) for name in ("max_length", "date") if now[name] is None}


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
    """Why the adapter that is to be kept in the end could not be, or nothing."""
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
    """``run.json`` of the adapter in ``folder``; None where one of the two is missing, or damaged."""
    if not (folder / WEIGHTS_NAME).exists():
        return None
    try:
        return read_record(folder / RUN_NAME)
    except FormatError:
        raise
    except ConfigError as error:
        on_event(Message("skipped", what=str(error)))
        return None


# -- the state --------------------------------------------------------------------------------------------------------


def write(slot: Slot, model: PeftModel, options: TrainConfig, run: Mapping[str, Any]) -> Path:
    """Write a checkpoint of ``slot`` to the output folder. ``run`` is what its state holds of the run.

    Raises:
        SaveError: the folder cannot be written.
    """
    saved = slot.state_dict()
    best = early_stopping.best(slot.curve.evaluations, options.metric_for_best_model)
    named = None if best is None else dict(zip(("step", "metric", "value"), best, strict=True))
    tensors = {key: tensor for key, tensor in saved.tensors.items() if not key.startswith("adapter/")}
    # Rows, masks and starts follow from seeds and steps. The generators are for what a user's model draws beside that.
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()

    def adapter(folder: Path) -> None:
        adapters.save(model.base_model, folder, [slot.name])

    return folders.write(options.output, slot.step, adapter, tensors, {"slot": saved.values, "best": named, **run})


def restore(checkpoint: Checkpoint, slot: Slot, model: PeftModel) -> None:
    """Load the checkpoint's state into ``slot`` and its adapter.

    Raises:
        ConfigError: the adapter or the state do not fit this model.
    """
    with understood(checkpoint):
        fill(checkpoint, slot.name, model)
        state, tensors = checkpoint.state, checkpoint.tensors()
        random = {key: tensors.pop(key) for key in list(tensors) if key.startswith("random/")}
        # Of the adapter's tensors, buffers are not the slot's.
        mine = {f"adapter/{name}": p.detach() for name, p in model.adapter_parameters(slot.name).items()}
        if state["format"] == 1:
            values = values_of_format_1(checkpoint.step, state["curve"], state["within"], state["scale"])
        else:
            values = state["slot"]
        slot.load_state_dict(SlotState({**mine, **tensors}, values))
        torch.set_rng_state(random["random/cpu"])
        if "random/cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["random/cuda"])


def fill(checkpoint: Checkpoint, name: str, model: PeftModel) -> None:
    """Copy the checkpoint's adapter to the bit into the adapter ``name`` of ``model``.

    Raises:
        ConfigError: names or shapes differ.
    """
    live, saved = model.base_model.tensors_of(name), checkpoint.adapter()
    try:
        check_names(saved, live, "adapter tensor")
    except AdapterError as error:
        raise ConfigError(f"{checkpoint.path}: {error}") from None
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(saved[key])
