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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from loraloom.config import yamltext
from loraloom.config.keys import ADAPTER, EXAMPLES, FIELD_KEYS, KEYS, OPTIONS, SECTIONS, TRAIN, check_key, split
from loraloom.config.lora import LoraConfig
from loraloom.config.lora_checks import MODULES, MODULES_OR_PATTERN, split_names
from loraloom.config.options import NEEDED, Option
from loraloom.config.train import TrainConfig
from loraloom.errors import ConfigError, nearest
from loraloom.files.atomic import write_files

#: The name of the run file that a run leaves in its output folder.
RUN_FILE = "run.yaml"

_ORDER = ("task", "model", "data", "lora", "train", "eval", "output", "overwrite")


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
    tune = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("tune.")}
    try:
        options = _build(values)
        check(options)
    except ConfigError as error:
        raise _placed(error, {key: f"{place}: " for key, place in places.items() if place}) from None
    if earlier and isinstance(resume, str | Path) and Path(resume).resolve() == Path(options.output).resolve():
        resume = True
    return RunFile(options, tune, places, notes, resume)


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
    found = {one.key: one.starter for one in ADAPTER.values() if one.starter is not None}
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
    for what in ("eval", "save"):  # when to evaluate and to save is one choice of three
        moment = {KEYS[f"{what}_{unit}"] for unit in ("strategy", "steps", "minutes")}
        if moment & values.keys():
            then = {key: value for key, value in then.items() if key not in moment}
    places.update({key: there[key] for key in then.keys() - values.keys()})
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
        if name not in SECTIONS:
            check_key(name, places[name])
            if "." in name:
                section, _, key = name.partition(".")
                raise ConfigError(f"{places[name]}: {name}: write it below its section: {section}: {{{key}: ...}}")
            values[name] = content
            continue
        content = {} if content is None else content  # a section whose keys are all commented out
        if not isinstance(content, dict):
            raise ConfigError(
                f"{places[name]}: {name}: must be a section such as {name}: {{{EXAMPLES[name]}}}, found {content!r}"
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


def _check_complete(values: Mapping[str, Any], path: str | Path | None) -> None:
    missing = [one for one in TRAIN.values() if one.default is NEEDED and one.key not in values]
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
    """The message for a command that lacks ``flags``: all of them at once."""
    return f"Missing option '{flags[0]}'." if len(flags) == 1 else f"Missing options {', '.join(flags)}"


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
    key = FIELD_KEYS.get(name, name)
    return type(error)(f"{places[key]}{key}{str(error)[len(name) :]}") if key in places else error


# -- writing ------------------------------------------------------------------------------------------------------


def write(options: TrainConfig, path: str | Path, title: str = "") -> None:
    """Write ``options`` as a run file that ``read`` gives back as equal options, with comments for people.

    ``title`` opens it: lines about where the values come from.

    Raises:
        SaveError: the file cannot be written; what was there is unchanged.
    """
    path = Path(path)
    lines = [f"# {line}" for line in title.splitlines()]
    lines += [f"# Train it with: loraloom train {path.name}; --set lora.r=8 changes one value.", ""]
    write_files(path.parent, {path.name: "\n".join([*lines, text(options)]).encode()})


def text(options: TrainConfig) -> str:
    """The text of a run file that ``read`` gives back as equal ``options``."""

    def said(option: Option, value: Any) -> bool:
        needless = (option.section == "lora" and option.starter is None) or option.name == "overwrite"
        return value is not None and not (needless and value == option.default)

    return render(options, said)


def render(
    options: TrainConfig,
    said: Callable[[Option, Any], bool],
    examples: Mapping[str, Any] = MappingProxyType({}),
    comments: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """A run file's text, section by section, each key with the option's help.

    Args:
        said: whether an option with its value is written.
        examples: key → a value, which is written as a comment where the option's own is not.
        comments: key → a comment in place of the help.
    """
    blocks: dict[str, list[str]] = {top: [] for top in _ORDER}
    for key, one in OPTIONS.items():
        if (top := one.section or key) not in blocks:
            continue
        value = getattr(options.lora if top == "lora" else options, one.name)
        if not (shown := said(one, value)) and key not in examples:
            continue
        line = f"{one.leaf}: {yamltext.write(value)}" if shown else f"# {one.leaf}: {yamltext.write(examples[key])}"
        comment = comments.get(key, one.summary)
        blocks[top].append("  " * bool(one.section) + line + (f"  # {comment}" if comment else ""))
    heads = {top: f"{top}:\n" if top in SECTIONS else "" for top in _ORDER}
    return "\n\n".join(heads[top] + "\n".join(lines) for top, lines in blocks.items() if lines) + "\n"
