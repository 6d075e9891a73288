"""Where a search stands, on disk: whole after any crash, and all that is needed to resume.

``search.json`` is the one file that counts. It names the files with the numbers of trials under way, which are written
before it and deleted once it names others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.engine.slot_state import SlotState, values_of_format_1
from loraloom.errors import ConfigError, FormatError, SaveError
from loraloom.files.atomic import recover, write_files
from loraloom.files.hashing import file_hash, first_changed
from loraloom.files.jsonio import MALFORMED, check_format, exact, restored
from loraloom.tuning.asha import SuccessiveHalving
from loraloom.tuning.bar import Bar
from loraloom.tuning.sampler import JOURNAL_NAME
from loraloom.tuning.trial import Trial

STATE_NAME = "search.json"
#: Of that file. Files without a number are of loraloom 0.1.
FORMAT = 1
UNDER_WAY = "under-way"
#: Folder of the adapters of trials that came to their end.
TRIALS = "trials"

Build = Callable[[Mapping[str, Any], int], TrainConfig]


@dataclass
class State:
    """A search at a moment at which it could be taken up."""

    fingerprint: str
    slots: int
    halving: SuccessiveHalving
    #: the slots and the memory that the user gave when they were planned
    asked: tuple[int | None, int | None] = (None, None)
    trials: list[Trial] = field(default_factory=list)
    #: trial → the file with its numbers, and file → its sha256
    files: dict[int, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    finished: bool = False
    #: what trials have to beat, once it was measured
    bar: Bar | None = None
    #: the day that the rows were written with, where a chat template writes one
    date: str | None = None
    #: trial → what it was when last written, and as which text: only what changed is written out again
    written: dict[int, tuple[Any, str]] = field(default_factory=dict, repr=False, compare=False)


def date_of(folder: Path) -> str | None:
    """The day of the search in ``folder``; None where there is no search, or nothing writes the date."""
    try:
        found = json.loads((folder / STATE_NAME).read_text())["date"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def save_state(folder: Path, state: State, slots: Mapping[int, SlotState]) -> None:
    """Write ``state`` together with the ``slots`` of trials that changed, and delete files that it no longer names.

    Raises:
        SaveError: the folder cannot be written. What was there is as it was.
    """
    files: dict[str, bytes] = {}
    trials = {trial.number: trial for trial in state.trials}
    for number, slot in slots.items():
        name = f"{UNDER_WAY}/trial-{number}-step-{trials[number].step}.safetensors"
        files[name] = slot.to_bytes()
        state.files[number], state.hashes[name] = name, hashlib.sha256(files[name]).hexdigest()
    live = {trial.number for trial in state.trials if trial.state in ("running", "waiting")}
    state.files = {number: name for number, name in state.files.items() if number in live}
    state.hashes = {name: state.hashes[name] for name in state.files.values()}
    text = _text(state)
    write_files(folder, {**files, STATE_NAME: text})
    kept = set(state.files.values())
    for path in (folder / UNDER_WAY).glob("trial-*.safetensors"):
        if f"{UNDER_WAY}/{path.name}" not in kept:
            path.unlink(missing_ok=True)
    if not kept:
        with contextlib.suppress(OSError):
            (folder / UNDER_WAY).rmdir()


def _text(state: State) -> bytes:
    """The file: first all but the trials, then a trial a line, and in the end the hash of what is before."""
    kept = {spec.name: getattr(state, spec.name) for spec in fields(state) if spec.name not in ("trials", "written")}
    kept |= {"halving": asdict(state.halving), "bar": None if state.bar is None else asdict(state.bar)}
    kept = {"format": FORMAT} | kept
    head = json.dumps(exact(kept), indent=1).removesuffix("\n}")
    lines = []
    for trial in state.trials:
        mark = _mark(trial)
        if state.written.get(trial.number, (None, ""))[0] != mark:
            # Knobs stay in the order of the space.
            state.written[trial.number] = mark, json.dumps(exact(_trial(trial)))
        lines.append(state.written[trial.number][1])
    body = f'{head},\n "trials": [\n' + ",\n".join(lines) + "\n ]"
    return f'{body},\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


def _mark(trial: Trial) -> tuple[Any, ...]:
    """By which a trial that changed is known, without a look at its curve: losses come with steps."""
    counts = len(trial.curve.loss), len(trial.curve.evaluations), len(trial.used), len(trial.parts), len(trial.files)
    return id(trial.curve), trial.step, trial.state, trial.reason, trial.goal, trial.measure, trial.seconds, counts


def _whole(text: str) -> bool:
    """Whether the file is as it was written."""
    body, mark, digest = text.rpartition(',\n "sha256": "')
    return bool(mark) and digest.removesuffix('"\n}\n') == hashlib.sha256(body.encode()).hexdigest()


def load_state(folder: Path, fingerprint: str, build: Build) -> State | None:
    """The search in ``folder``, or None where there is none. ``build(values, seed)`` are the options of a trial.

    Raises:
        ConfigError: it is that of another search, or no longer whole.
    """
    recover(folder)
    path = folder / STATE_NAME
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        found = restored(json.loads(text))
        check_format(found.get("format", 0), FORMAT, f"{path}:")
        other = found["fingerprint"] != fingerprint
        if not other and not _whole(text):
            raise ValueError("its hash is another one")
    except FormatError:
        raise
    except (OSError, *MALFORMED) as error:
        raise _damaged(path, error) from None
    if other:
        raise ConfigError(
            f"output: {folder} holds another search, of other options, space or data; choose another folder, or give "
            "--overwrite to start over"
        )
    try:
        return State(
            fingerprint=found["fingerprint"],
            slots=found["slots"],
            halving=SuccessiveHalving(**found["halving"]),
            asked=(found["asked"][0], found["asked"][1]),
            trials=[_read_trial(entry, build) for entry in found["trials"]],
            files={int(number): name for number, name in found["files"].items()},
            hashes=dict(found["hashes"]),
            seconds=found["seconds"],
            finished=found["finished"],
            bar=_read_bar(found["bar"]),
            date=found.get("date"),
        )
    except MALFORMED as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path}: not what a search writes ({type(error).__name__}: {error}); give --overwrite to start over"
    )


def load_slot(folder: Path, state: State, number: int) -> SlotState | None:
    """The state of one trial's slot; None for a trial that had not begun.

    Raises:
        SaveError: the file is gone or damaged.
    """
    name = state.files.get(number)
    if name is None:
        return None
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise SaveError(f"{folder / name}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != state.hashes[name]:
        raise SaveError(f"{folder / name}: is damaged (it is not what the search wrote)")
    found = SlotState.from_bytes(data)
    if found.values:
        return found
    trial = next(trial for trial in state.trials if trial.number == number)
    more = {key: tuple(found.tensors.pop(key).tolist()) for key in ("within", "scale") if key in found.tensors}
    return SlotState(found.tensors, values_of_format_1(trial.step, asdict(trial.curve), **more))


def hashes_of(folder: Path) -> dict[str, str]:
    """File → sha256 of what is in ``folder``."""
    return {path.name: file_hash(path) for path in sorted(folder.glob("*")) if path.is_file()}


def damaged(folder: Path, files: Mapping[str, str]) -> str:
    """What is wrong with the ``files`` (name → sha256) that were written to ``folder``; empty where all are whole."""
    if not files:
        return f"{folder} was written by no trial"
    found = first_changed(folder, files)
    if found is None:
        return ""
    path, error = found
    return (
        f"{path} is damaged (it is not what the search wrote)"
        if error is None
        else (f"{path} cannot be read ({error.strerror})")
    )


def clear(folder: Path, *results: str) -> None:
    """Forget the search in ``folder``, if there is one: where it stands, its journal, its adapters, its ``results``.

    Raises:
        SaveError: the folder cannot be written.
    """
    if not (folder / STATE_NAME).exists():
        return
    try:
        for path in [folder / JOURNAL_NAME, *(folder / UNDER_WAY).glob("trial-*.safetensors")]:
            path.unlink(missing_ok=True)
        for path in [*(folder / TRIALS).glob("trial-*"), *(folder / name for name in results)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (folder / STATE_NAME).unlink()
    except OSError as error:
        raise SaveError(f"{error.filename or folder}: cannot be deleted ({error.strerror})") from None


def _trial(trial: Trial) -> dict[str, Any]:
    entry = {key: getattr(trial, key) for key in trial.__dataclass_fields__ if key not in ("options", "curve", "used")}
    own = {"seed": trial.options.seed}
    return {**entry, **own, "curve": asdict(trial.curve), "used": {k: list(v) for k, v in trial.used.items()}}


def _read_trial(entry: dict[str, Any], build: Build) -> Trial:
    curve, seed, used, parts = (entry.pop(key) for key in ("curve", "seed", "used", "parts"))
    evaluations = [{key: _number(value) for key, value in one.items()} for one in curve["evaluations"]]
    return Trial(
        **entry,
        options=build(entry["values"], seed),
        curve=Curve(_numbers(curve["loss"]), _numbers(curve["learning_rate"]), evaluations),
        used={name: (r, directions, _number(norm)) for name, (r, directions, norm) in used.items()},
        parts={name: _numbers(values) for name, values in parts.items()},
    )


def _read_bar(entry: dict[str, Any] | None) -> Bar | None:
    if entry is None:
        return None
    answers = entry["answers"]
    read = {words: {name: _numbers(values) for name, values in one.items()} for words, one in answers.items()}
    return Bar(entry["rows"], _number(entry["base"]), entry["begins"], read)


def _numbers(values: Sequence[Any]) -> list[float]:
    return [_number(value) for value in values]


def _number(value: Any) -> Any:
    """Earlier versions wrote what is not finite as text."""
    return float(value) if isinstance(value, str) else value
