"""The run file: one YAML file, the same for ``loraloom train`` and ``loraloom tune``.

    task: causal-lm
    model: {name: my-model, dtype: bfloat16}
    data:  {train: chats.jsonl, validation: 0.05, max_length: 512}
    lora:  {r: 16, lora_alpha: 32, target_modules: all-linear}      # any field of LoraConfig
    train: {learning_rate: 2e-4, batch_size: 16, epochs: 3}
    output: runs/chats
    tune:  {trials: 16}                                              # for ``loraloom tune`` alone

Elsewhere a key is written with dots: ``lora.r``, ``train.learning_rate``, ``data.max_length``. Paths are as from the
folder in which the command runs. Knows what options there are from their classes alone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from loraloom.config import yamltext
from loraloom.config.lora import LoraConfig
from loraloom.config.lora_checks import MODULES, MODULES_OR_PATTERN, split_names
from loraloom.config.options import NEEDED, Option, options_of
from loraloom.config.train import TrainConfig
from loraloom.config.tune import PRESET, SPACE, SearchOptions
from loraloom.errors import ConfigError, nearest

#: The name of the run file that a run leaves in its output folder.
RUN_FILE = "run.yaml"

_TRAIN = options_of(TrainConfig)
#: Fields of LoraConfig without those that a run sets itself.
_LORA = {name: one for name, one in options_of(LoraConfig).items() if name not in ("task_type", "runtime_config")}
_TUNE = {"preset": PRESET, "space": SPACE, **options_of(SearchOptions)}
#: Every key of a run file and its option.
OPTIONS: dict[str, Option] = {one.key: one for group in (_TRAIN, _LORA, _TUNE) for one in group.values()}
#: A field → its key, such as ``"learning_rate"`` → ``"train.learning_rate"``; ``lora`` is a section.
KEYS = {name: one.key for name, one in _TRAIN.items()}
LORA_KEYS = {name: one.key for name, one in _LORA.items()}
TUNE_KEYS = {name: one.key for name, one in _TUNE.items()}
_SECTIONS = ("model", "data", "lora", "train", "eval", "tune")
_NEEDED = [one for one in _TRAIN.values() if one.default is NEEDED]
#: What people write from habit.
HABITS = {
    "lr": "train.learning_rate",
    "validation": "data.validation",
    "alpha": "lora.lora_alpha",
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "lora_r": "lora.r",
    "dropout": "lora.lora_dropout",
    "lora_target": "lora.target_modules",
    "num_train_epochs": "train.epochs",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "eval.batch_size",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "dataset": "data.train",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}


@dataclass(frozen=True)
class RunFile:
    """What a run file and what was set beside it say. ``tune`` holds that section's values, which ``tune/`` checks."""

    options: TrainConfig
    tune: dict[str, Any] = field(default_factory=dict)
    #: dotted key → where it was given: ``"run.yaml:7"``, ``"--set lora.r"``, or ``""`` for a command's own option
    places: dict[str, str] = field(default_factory=dict)
    #: What was taken from elsewhere, for people.
    notes: list[str] = field(default_factory=list)
    #: What is resumed: nothing, the newest checkpoint of the output folder (True), or the checkpoint in this place.
    resume: bool | str | Path | None = None

    def line(self, key: str) -> int | None:
        """The line of the file that gave ``key``, from 1; None where the file did not."""
        found = re.search(r":(\d+)$", self.places.get(key, ""))
        return int(found[1]) if found else None

    def fail(self, error: ConfigError, section: str) -> NoReturn:
        """Raise ``error``, which begins with a name of ``section``, with the place where that was given."""
        key = f"{section}.{_name(error)}"
        while key not in self.places and "." in key:
            key = key.rpartition(".")[0]
        place = self.places.get(key, section)
        raise type(error)(f"{place}: {section}.{error}" if place else str(error)) from None


def read(
    path: str | Path | None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
    check: Callable[[TrainConfig], None] = lambda options: None,
    *,
    resume: bool | str | Path | None = None,
) -> RunFile:
    """Read and check a run file; with None for ``path``, what is set beside it is all there is.

    Without a file, what is not set of the adapter is as in a starter file; a file's missing keys have the defaults of
    ``LoraConfig``.

    Args:
        overrides: dotted keys and values, or ``"key=value"`` with the value in YAML; they win over the file.
        given: dotted keys from a command's own options. They win over all, and errors begin with the field's name.
        check: raises ``ConfigError`` for options that do not fit: ``tasks.check``.
        resume: True, or a checkpoint or output folder: every value that is not given is that of the run file which
            the earlier run left in its folder.

    Raises:
        ConfigError: the file cannot be read; an unknown key, with the nearest known one; a value that the options
            refuse. The message begins with the file and the line, or ``--set`` and the key.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    notes: list[str] = []
    if path is not None:
        _read_file(Path(path), values, places)
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else [_setting(text) for text in overrides]
    for key, value in pairs:
        _put(values, key, value, places, f"--set {key}")
    for key, value in (given or {}).items():
        _put(values, key, value, places, "")
    if earlier := _earlier(values.get("output"), resume):
        values = _over(earlier, values, places)
        notes.append(f"what is not given is as in {earlier}")
    elif path is None:
        values = with_starter(values, notes)
    _check_complete(values, path)
    tune = {_leaf(key): value for key, value in values.items() if key.startswith("tune.")}
    try:
        options = _build(values)
        check(options)
    except ConfigError as error:
        raise _placed(error, {key: f"{place}: " for key, place in places.items() if place}) from None
    whole = earlier is not None and isinstance(resume, str | Path) and _same(resume, options.output)
    return RunFile(options, tune, places, notes, True if whole else resume)


def _same(one: str | Path, other: str | Path) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _put(values: dict[str, Any], key: str, value: Any, places: dict[str, str], place: str) -> None:
    check_key(key, place)
    places[key] = place
    if key.startswith("tune.space."):
        space = values.get("tune.space", {})
        if isinstance(space, dict):
            values["tune.space"] = {**space, key.removeprefix("tune.space."): value}
    else:
        values[key] = value


def with_starter(values: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """``values`` with what starter files have of the adapter, where they say nothing of it.

    A rank alone, or ranks alone that a search varies, get the ``lora_alpha`` that scales the update by 2, as starter
    files do; ``notes`` says so.
    """
    found = {one.key: one.starter for one in _LORA.values() if one.starter is not None}
    if any(values.get(f"lora.{name}") is not None for name in ("target_parameters", "layers_to_transform")):
        del found["lora.target_modules"]  # these are for targets of their own, or a list of names
    found |= values
    if "lora.lora_alpha" in values:
        return found
    r, rslora, space = found["lora.r"], values.get("lora.use_rslora") is True, values.get("tune.space")
    if (rslora or "lora.r" in values) and isinstance(r, int) and r > 0:
        found["lora.lora_alpha"] = alpha = 2 * math.sqrt(r) if rslora else 2 * r
        how = "2 * sqrt(r), with use_rslora" if rslora else "2 * r"
        notes.append(f"lora_alpha is {alpha:g} ({how}); --lora-alpha sets another")
    elif not rslora and isinstance(space, Mapping) and "lora.r" in space and "lora.lora_alpha" not in space:
        found["tune.space"] = {**space, "lora.lora_alpha": "2r"}
        notes.append("lora_alpha is 2 * r in each trial; lora.lora_alpha in tune.space sets another")
    return found


def _earlier(output: Any, resume: bool | str | Path | None) -> Path | None:
    """The run file of the run that is resumed, if there is one: in the output folder, or beside the checkpoint."""
    folders = [Path(str(output))] if output else []
    if isinstance(resume, str | Path) and str(resume):
        place = Path(resume)
        folders.append(place.resolve().parent if place.name.startswith("checkpoint-") else place)
    found = (folder / RUN_FILE for folder in folders if resume)
    return next((path for path in found if path.is_file()), None)


def _over(earlier: Path, values: Mapping[str, Any], places: dict[str, str]) -> dict[str, Any]:
    """What the earlier run's file says, in its folder, but for ``values``."""
    then: dict[str, Any] = {}
    there: dict[str, str] = {}
    _read_file(earlier, then, there)
    for what in ("eval", "train.save"):  # when to evaluate and to save is one choice of three
        sign = "." if what == "eval" else "_"
        moment = {f"{what}{sign}{unit}" for unit in ("strategy", "steps", "minutes")}
        if moment & values.keys():
            then = {key: value for key, value in then.items() if key not in moment}
    for key in then.keys() - values.keys():
        places[key] = there[key]
    return {**then, "output": str(earlier.parent), **values}


def with_values(options: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """``options`` with the dotted keys of ``values`` replaced, checked as a whole.

    Raises:
        ConfigError: an unknown key, or a value that the options refuse; begins with the dotted key.
    """
    for key in values:
        check_key(key)
    lora, rest = split(values)
    try:
        return replace(options, lora=options.lora.copy(**lora), **rest)
    except ConfigError as error:
        raise _placed(error, dict.fromkeys(values, "")) from None


# -- reading ------------------------------------------------------------------------------------------------------


def _read_file(path: Path, values: dict[str, Any], places: dict[str, str]) -> None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = os.listdir(path.parent) if os.access(path.parent, os.R_OK) else []
        raise ConfigError(f"{path}: no such run file{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a run file ({error.strerror})") from None
    found, lines = yamltext.parse(text, str(path))
    if not isinstance(found, dict):
        what = "is empty" if found is None else "holds no keys"
        raise ConfigError(f"{path}: {what}; a run file begins with keys such as task: seq-cls")
    places.update({key: f"{path}:{number}" for key, number in lines.items()})
    for name, content in found.items():
        if name not in _SECTIONS:
            check_key(name, places[name])
            if "." in name:
                section, _, key = name.partition(".")
                raise ConfigError(f"{places[name]}: {name}: write it below its section: {section}: {{{key}: ...}}")
            values[name] = content
            continue
        content = {} if content is None else content  # a section whose keys are all commented out
        if not isinstance(content, dict):
            raise ConfigError(
                f"{places[name]}: {name}: must be a section such as {name}: {{{_example(name)}}}, found {content!r}"
            )
        for key, value in content.items():
            check_key(f"{name}.{key}", places[f"{name}.{key}"])
            values[f"{name}.{key}"] = value


def _setting(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    key = key.strip()
    if not sign or not key:
        raise ConfigError(f"--set: must be key=value, such as lora.r=16, found {text!r}")
    try:
        found = yamltext.parse(value, f"--set {key}")[0]
        listed = key in OPTIONS and OPTIONS[key].check in (MODULES, MODULES_OR_PATTERN)
        return key, split_names(f"--set {key}", found) if listed and isinstance(found, str) else found
    except ConfigError as error:
        raise ConfigError(str(error).replace(":1: ", ": ", 1)) from None  # an option has no lines


def check_key(key: str, place: str = "") -> None:
    """That ``key`` names an option; the error names the nearest one, and begins with ``place`` where that is given."""
    if key in OPTIONS or key.startswith("tune.space."):
        return
    before = f"{place}: " if place else ""
    section, _, name = key.rpartition(".")
    if key in _SECTIONS:
        raise ConfigError(f"{before}{key}: is a section; set one of its keys, such as {key}.{_example(key, '=')}")
    if key == "lora.task_type":
        raise ConfigError(f"{before}{key}: follows from task; leave it out")
    raise ConfigError(f"{before}{key}: there is no such key{_hint(section, name)}")


def _hint(section: str, name: str) -> str:
    home = KEYS.get(name) or LORA_KEYS.get(name) or HABITS.get(name)
    if home:
        return f"; did you mean {home!r}?"
    mates = [key for key in OPTIONS if key.rpartition(".")[0] == section]
    close = nearest(name, [key.rpartition(".")[2] for key in mates] if section else [*mates, *_SECTIONS])
    if close:
        return close
    if section and section not in _SECTIONS:
        return nearest(section, _SECTIONS) or f"; the sections are {', '.join(_SECTIONS)}"
    return f"; the keys here are {', '.join([*mates, *(() if section else _SECTIONS)])}"


def _example(section: str, sign: str = ": ") -> str:
    keys = {"model": "name", "data": "train", "lora": "r", "train": "batch_size", "eval": "steps", "tune": "trials"}
    values = {"model": "my-model", "data": "rows.jsonl", "lora": "16", "train": "16", "eval": "100", "tune": "16"}
    return f"{keys[section]}{sign}{values[section]}"


def _check_complete(values: Mapping[str, Any], path: str | Path | None) -> None:
    missing = [one for one in _NEEDED if one.key not in values]
    if not missing:
        return
    flags = [one.flags[0] for one in missing]
    if path is None:
        advice = "" if len(flags) == 1 else "; give them, or a run file, which loraloom init writes"
        raise ConfigError(f"{missing_options(flags)}{advice}")
    it = "it" if len(missing) == 1 else "them"
    keys = ", ".join(one.key for one in missing)
    raise ConfigError(
        f"{path}: {keys}: not given, and a run needs {it}; add {it} to the file, or give {', '.join(flags)}"
    )


def missing_options(flags: Sequence[str]) -> str:
    """What is said where a command lacks ``flags``: all of them at once."""
    return f"Missing option '{flags[0]}'." if len(flags) == 1 else f"Missing options {', '.join(flags)}"


def _leaf(key: str) -> str:
    return key.partition(".")[2]


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as names of fields."""
    return {OPTIONS[key].name: value for key, value in values.items()}


def split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of ``LoraConfig`` and of ``TrainConfig`` from dotted keys."""
    lora = fields_of({key: value for key, value in values.items() if key.startswith("lora.")})
    return lora, fields_of({key: value for key, value in values.items() if not key.startswith(("lora.", "tune."))})


def _build(values: Mapping[str, Any]) -> TrainConfig:
    lora, rest = split(values)
    options = TrainConfig(lora=LoraConfig(**lora), **rest)
    # Not in TrainConfig itself: of a search's trials one may have another schedule than the others.
    if options.lr_scheduler_type != "warmup_stable_decay" and options.decay_ratio != TrainConfig.decay_ratio:
        raise ConfigError(
            f"decay_ratio: does nothing with lr_scheduler_type={options.lr_scheduler_type}; it is of "
            "warmup_stable_decay; leave it out"
        )
    return options


def _name(error: ConfigError) -> str:
    """The field or key that an error begins with."""
    found = re.match(r"[\w.\-]+", str(error))
    return found[0] if found else ""


def _placed(error: ConfigError, places: Mapping[str, str]) -> ConfigError:
    """The error with the key of the field that it begins with, and where that was given."""
    name = _name(error)
    key = KEYS.get(name) or LORA_KEYS.get(name, name)
    return type(error)(f"{places[key]}{key}{str(error)[len(name) :]}") if key in places else error


# -- writing ------------------------------------------------------------------------------------------------------


def write(options: TrainConfig, path: str | Path, title: str = "") -> None:
    """Write ``options`` as a run file that ``read`` gives back as equal options, with comments for people.

    ``title`` opens it: lines about where the values come from.

    Raises:
        SaveError: the file cannot be written; what was there is unchanged.
    """
    from loraloom.files.atomic import write_files

    path = Path(path)
    lines = [f"# {line}" for line in title.splitlines()]
    lines += [f"# Train it with: loraloom train {path.name}; --set lora.r=8 changes one value.", ""]
    section = ""
    for key, value in _written(options):
        above, _, name = key.rpartition(".")
        if above != section and above:
            lines.append(f"{above}:")
        section = above
        comment = f"  # {OPTIONS[key].summary}" if OPTIONS[key].help else ""
        lines.append(f"{'  ' if above else ''}{name}: {yamltext.write(value)}{comment}")
    write_files(path.parent, {path.name: ("\n".join(lines) + "\n").encode()})


def _written(options: TrainConfig) -> Iterable[tuple[str, Any]]:
    """Keys and values, section by section: every option that is not None, and the adapter's that say something."""
    values = {
        one.key: getattr(options, name) for name, one in _TRAIN.items() if name != "overwrite" or options.overwrite
    }
    for name, one in _LORA.items():
        value = getattr(options.lora, name)
        if value != one.default or one.starter is not None:
            values[one.key] = value
    order = ["task", "model", "data", "lora", "train", "eval", "output", "overwrite"]
    written = ((key, value) for key, value in values.items() if value is not None)
    return sorted(written, key=lambda item: order.index(item[0].partition(".")[0]))
