"""The state of a search on disk, whole after any crash.

``search.json`` is the commit point. It names the files with the slots of trials in progress, which are written before
it and deleted once it names others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
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
from loraloom.tuning.race import Race
from loraloom.tuning.sampler import JOURNAL_NAME
from loraloom.tuning.trial import Trial

#: A search in its folder.
STATE_NAME = "search.json"
#: Its options, as a run file.
RUN_FILE = "search.yaml"
#: Of ``search.json``. Files without a number are of loraloom 0.1; a search that began before format 2 resumes under the
#: rule of then.
FORMAT = 2
UNDER_WAY = "under-way"
#: Folder of the adapters of finished trials.
TRIALS = "trials"

#: ``build(values, seed, space)`` are the options of a trial. ``space`` is given if it was proposed in an earlier one.
Build = Callable[..., TrainConfig]


@dataclass
class State:
    """A search as it can be resumed."""

    fingerprint: str
    slots: int
    halving: SuccessiveHalving | Race
    #: the user's options ``slots`` and ``memory`` when the slots were planned
    asked: tuple[int | None, int | None] = (None, None)
    trials: list[Trial] = field(default_factory=list)
    #: trial → the file with its slot, and file → its sha256
    files: dict[int, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    #: tokens that trials trained on, and the positions that were computed for them
    tokens: int = 0
    places: int = 0
    finished: bool = False
    #: trials whose repeats began before they ended themselves; None before the last rung is decided
    leaders: list[int] | None = None
    #: what trials have to beat, once measured
    bar: Bar | None = None
    #: the date that a chat template wrote into the rows
    date: str | None = None
    #: a hash of all that no extension may change; empty in files of 0.2 and before
    fixed: str = ""
    #: what an extension may change, as it is now: ``tuning.extension.extent``
    extent: dict[str, Any] = field(default_factory=dict)
    #: What the clock or the user decided, in order; written before it acts. Each has its ``kind``. "extend": more
    #: trials (how many), the ``extent`` before, and the ``first`` of them; None until they begin.
    #: "stop" and "keep": a ``trial``. "clock": the time is over for all trials but those that ``finish``.
    events: list[dict[str, Any]] = field(default_factory=list)
    #: the figures on the test rows, which are measured once
    tested: dict[str, Any] | None = None
    #: trial → its ``_version`` when last written, and its text: only trials that changed are serialised again
    written: dict[int, tuple[Any, str]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def padding(self) -> float | None:
        """The share of the computed positions that held no token; None if none were counted."""
        return 1 - self.tokens / self.places if self.places else None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    @property
    def over(self) -> bool:
        """Whether the time ran out for the trials that train."""
        return any(event["first"] == self.first for event in self.of_kind("clock"))

    @property
    def begun(self) -> dict[str, Any] | None:
        """The last extension that began."""
        return next((event for event in self.of_kind("extend")[::-1] if event["first"] is not None), None)

    @property
    def first(self) -> int:
        """The number of the first trial of the last extension that began; 0 before any."""
        return 0 if self.begun is None else int(self.begun["first"])


def run_file(folder: str | Path) -> str:
    """The run file that the search in ``folder`` left there.

    Raises:
        ConfigError: there is none.
    """
    path = Path(folder) / RUN_FILE
    if path.is_file():
        return str(path)
    if (Path(folder) / STATE_NAME).exists():
        raise ConfigError(
            f"{folder}: the search there kept no options (loraloom 0.2 and before); give the run file or the options "
            f"that it was started with, and --output {folder}"
        )
    raise ConfigError(f"{folder}: a folder without a search; give a run file, or the folder of a search")


def glance(folder: Path) -> dict[str, Any]:
    """The values in the state of the search in ``folder``, unchecked; empty without one."""
    try:
        found = restored(json.loads((folder / STATE_NAME).read_text(encoding="utf-8")))
    except (OSError, *MALFORMED):
        return {}
    return found if isinstance(found, dict) else {}


def date_of(folder: Path) -> str | None:
    """The date of the search in ``folder``; None without a search, or if no template writes a date."""
    found = glance(folder).get("date")
    return found if isinstance(found, str) else None


def save_state(
    folder: Path, state: State, slots: Mapping[int, SlotState], beside: Mapping[str, bytes] = MappingProxyType({})
) -> None:
    """Write ``state`` together with the ``slots`` of trials that changed, and delete files that it no longer names.

    ``beside``: further files that are replaced with it.

    Raises:
        SaveError: the folder cannot be written; the old files are unchanged.
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
    write_files(folder, {**files, **beside, STATE_NAME: text})
    kept = set(state.files.values())
    for path in (folder / UNDER_WAY).glob("trial-*.safetensors"):
        if f"{UNDER_WAY}/{path.name}" not in kept:
            path.unlink(missing_ok=True)
    if not kept:
        with contextlib.suppress(OSError):
            (folder / UNDER_WAY).rmdir()


def _text(state: State) -> bytes:
    """``search.json``: first all but the trials, then one trial a line, then the hash of everything before it."""
    kept = {spec.name: getattr(state, spec.name) for spec in fields(state) if spec.name not in ("trials", "written")}
    nested = {"halving": asdict(state.halving), "bar": None if state.bar is None else asdict(state.bar)}
    kept = {"format": FORMAT} | kept | nested
    head = json.dumps(exact(kept), indent=1).removesuffix("\n}")
    lines = []
    for trial in state.trials:
        version = _version(trial)
        if state.written.get(trial.number, (None, ""))[0] != version:
            # Not sorted: hyperparameters stay in the order of the space.
            state.written[trial.number] = version, json.dumps(exact(_trial(trial)))
        lines.append(state.written[trial.number][1])
    body = f'{head},\n "trials": [\n' + ",\n".join(lines) + "\n ]"
    return f'{body},\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


def _version(trial: Trial) -> tuple[Any, ...]:
    """Differs once the trial changed. Lengths stand for its lists, which only grow."""
    counts = len(trial.curve.loss), len(trial.curve.evaluations), len(trial.used), len(trial.parts), len(trial.files)
    now = trial.step, trial.state, trial.reason, trial.goal, trial.measure, trial.rows, trial.measured_rows
    return id(trial.curve), *now, trial.seconds, counts


def _whole(text: str) -> bool:
    """Whether the hash at the end is that of the rest."""
    body, separator, digest = text.rpartition(',\n "sha256": "')
    return bool(separator) and digest.removesuffix('"\n}\n') == hashlib.sha256(body.encode()).hexdigest()


def load_state(folder: Path, fingerprint: str, build: Build) -> State | None:
    """The search in ``folder``, or None.

    Raises:
        ConfigError: it is another search, or damaged.
        FormatError: a later version of loraloom wrote it.
    """
    recover(folder)
    path = folder / STATE_NAME
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        found = restored(json.loads(text))
        check_format(found.get("format", 0), FORMAT, f"{path}:")
        if "format" not in found:
            found = _with_numbers(found)
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
            halving=(Race if "shares" in found["halving"] else SuccessiveHalving)(**found["halving"]),
            asked=(found["asked"][0], found["asked"][1]),
            trials=[_read_trial(entry, build, found.get("events", ())) for entry in found["trials"]],
            files={int(number): name for number, name in found["files"].items()},
            hashes=dict(found["hashes"]),
            seconds=found["seconds"],
            tokens=found.get("tokens", 0),
            places=found.get("places", 0),
            finished=found["finished"],
            leaders=found.get("leaders", []),  # a search of 0.2 begins no repeats before all have ended
            bar=found["bar"] and Bar(**found["bar"]),
            date=found.get("date"),
            fixed=found.get("fixed", ""),
            extent=found.get("extent", {}),
            events=found.get("events", []),
            tested=found.get("tested"),
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
    """What is wrong with the ``files`` (name → sha256) of a trial in ``folder``; empty if all are whole."""
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
    """Delete the search in ``folder``, if there is one: its state, its journal, its adapters, its ``results``.

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


def _read_trial(entry: dict[str, Any], build: Build, events: Sequence[Mapping[str, Any]]) -> Trial:
    curve, seed, used = (entry.pop(key) for key in ("curve", "seed", "used"))
    own = entry["number"] if entry.get("repeats") is None else entry["repeats"]
    space = next((e["before"]["space"] for e in events if e["kind"] == "extend" and own < (e["first"] or 0)), None)
    options = build(entry["values"], seed, *([] if space is None else [space]))
    used = {name: tuple(figures) for name, figures in used.items()}
    rungs = {int(step): figures for step, figures in entry.pop("rungs", {}).items()}
    return Trial(**entry, options=options, curve=Curve(**curve), used=used, rungs=rungs)


def _with_numbers(value: Any) -> Any:
    """``value`` of a file of format 0, in which numbers that are not finite are text."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
