"""The run file: one YAML file, the same for ``loraloom train`` and ``loraloom tune``.

    task: causal-lm
    model: {name: my-model, dtype: bfloat16}
    data:  {train: chats.jsonl, validation: 0.05, max_length: 512}
    lora:  {r: 16, lora_alpha: 32, target_modules: all-linear}      # any field of LoraConfig
    train: {learning_rate: 2e-4, batch_size: 16, epochs: 3}          # any other field of TrainConfig
    output: runs/chats
    tune:  {trials: 16}                                              # left to ``loraloom tune``

Elsewhere a key is written with dots: ``lora.r``, ``train.learning_rate``, ``data.max_length``. Paths are as from the
folder in which the command runs. Knows what options there are from their classes alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from loraloom.config import yamltext
from loraloom.config.lora import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.errors import ConfigError, nearest

_ELSEWHERE = {
    "task": "task",
    "output": "output",
    "overwrite": "overwrite",
    "model": "model.name",
    **{name: f"model.{name}" for name in ("revision", "dtype", "attn_implementation", "device")},
    "data": "data.train",
    "eval_split": "data.validation",
    "data_workers": "data.workers",
    **{
        name: f"data.{name}"
        for name in (
            *("format", "columns", "max_length", "overlong", "on_bad_row", "allow_untrained", "chat_template"),
            *("date", "stride", "problem_type"),
        )
    },
    **{name: f"eval.{name.removeprefix('eval_')}" for name in ("eval_strategy", "eval_steps", "eval_minutes")},
    "eval_batch_size": "eval.batch_size",
    **{
        name: f"eval.{name}"
        for name in (
            *("metrics", "metric_for_best_model", "load_best_model_at_end", "early_stopping_patience"),
            *("early_stopping_threshold", "max_new_tokens"),
        )
    },
}
#: A field of TrainConfig → its key, such as ``"learning_rate"`` → ``"train.learning_rate"``; ``lora`` is a section.
KEYS = {s.name: _ELSEWHERE.get(s.name, f"train.{s.name}") for s in fields(TrainConfig) if s.name != "lora"}
#: A field of LoraConfig → its key. Without those that a run sets itself.
LORA_KEYS = {s.name: f"lora.{s.name}" for s in fields(LoraConfig) if s.name not in ("task_type", "runtime_config")}
_FIELDS = {key: name for name, key in (*KEYS.items(), *LORA_KEYS.items())}
_SECTIONS = ("model", "data", "lora", "train", "eval", "tune")
_NEEDED = ("model", "data", "task", "output")
#: What people write from habit.
HABITS = {
    "lr": "train.learning_rate",
    "validation": "data.validation",
    "alpha": "lora.lora_alpha",
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "lora_r": "lora.r",
    "dropout": "lora.lora_dropout",
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
    """What a run file and what was set beside it say. ``tune`` is that section as it was read, unchecked."""

    options: TrainConfig
    tune: dict[str, Any] = field(default_factory=dict)
    #: dotted key → where it was given: ``"run.yaml:7"``, ``"--set lora.r"``, or ``""`` for a command's own option
    places: dict[str, str] = field(default_factory=dict)

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
    path: str | Path | None, overrides: Mapping[str, Any] | Sequence[str] = (), given: Mapping[str, Any] | None = None
) -> RunFile:
    """Read and check a run file; with None for ``path``, what is set beside it is all there is.

    Args:
        overrides: dotted keys and values, or ``"key=value"`` with the value in YAML; they win over the file.
        given: dotted keys from a command's own options. They win over all, and errors begin with the field's name.

    Raises:
        ConfigError: the file cannot be read; an unknown key, with the nearest known one; a value that the options
            refuse. The message begins with the file and the line, or ``--set`` and the key.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    tune: dict[str, Any] = {}
    if path is not None:
        _read_file(Path(path), values, tune, places)
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else [_setting(text) for text in overrides]
    for key, value in pairs:
        places[key] = f"--set {key}"
        if key.startswith("tune."):
            _set_tune(tune, key.split(".")[1:], value)
        else:
            check_key(key, places[key])
            values[key] = value
    for key, value in (given or {}).items():
        places[key] = ""
        if key.startswith("tune."):
            _set_tune(tune, key.split(".")[1:], value)
        else:
            check_key(key)
            values[key] = value
    _check_complete(values, path)
    try:
        return RunFile(_build(values), tune, places)
    except ConfigError as error:
        raise _placed(error, {key: f"{place}: " for key, place in places.items() if place}) from None


def with_values(options: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """``options`` with the dotted keys of ``values`` replaced, checked as a whole.

    Raises:
        ConfigError: an unknown key, or a value that the options refuse; begins with the dotted key.
    """
    for key in values:
        check_key(key)
    lora, rest = _split(values)
    try:
        return replace(options, lora=options.lora.copy(**lora), **rest)
    except ConfigError as error:
        raise _placed(error, dict.fromkeys(values, "")) from None


def split_names(name: str, text: str) -> list[str] | str:
    """Names with commas between are a list; what holds other signs is an expression, and "all-linear" is itself.

    Raises:
        ConfigError: there is no name in it. Begins with ``name``.
    """
    if text.lower() == "all-linear" or not re.fullmatch(r"[\w.,\- ]+", text):
        return text
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise ConfigError(f"{name}: holds no name, found {text!r}; give names with commas between, or leave it out")
    return names


# -- reading ------------------------------------------------------------------------------------------------------


def _read_file(path: Path, values: dict[str, Any], tune: dict[str, Any], places: dict[str, str]) -> None:
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
        if name == "tune":
            tune.update(content)
            continue
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
        listed = key in ("lora.target_modules", "lora.exclude_modules", "lora.modules_to_save")
        return key, split_names(f"--set {key}", found) if listed and isinstance(found, str) else found
    except ConfigError as error:
        raise ConfigError(str(error).replace(":1: ", ": ", 1)) from None  # an option has no lines


def _set_tune(tune: dict[str, Any], parts: list[str], value: Any) -> None:
    if parts[0] == "space" and len(parts) > 1:
        space = tune.setdefault("space", {})
        if isinstance(space, dict):
            space[".".join(parts[1:])] = value
    else:
        tune[".".join(parts)] = value


def check_key(key: str, place: str = "") -> None:
    """That ``key`` names an option; the error names the nearest one, and begins with ``place`` where that is given."""
    if key in _FIELDS:
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
    mates = [key for key in _FIELDS if key.rpartition(".")[0] == section]
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
    for name in _NEEDED:
        if KEYS[name] not in values:
            raise ConfigError(
                f"Missing option '--{name}'."
                if path is None
                else f"{path}: {KEYS[name]}: not given, and a run needs it; add it to the file, or give --{name}"
            )


def _split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    lora = {_FIELDS[key]: value for key, value in values.items() if key.startswith("lora.")}
    return lora, {_FIELDS[key]: value for key, value in values.items() if not key.startswith("lora.")}


def _build(values: Mapping[str, Any]) -> TrainConfig:
    lora, rest = _split(values)
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

_COMMENTS = {
    "data.validation": "rows to validate on: a share, a count, or a file",
    "data.max_length": "tokens; longer rows are cut",
    "lora.r": "rank of the update",
    "lora.lora_alpha": "the update is scaled by alpha / r, with use_rslora by alpha / sqrt(r)",
    "lora.lora_dropout": "on the adapter's input, while training",
    "train.loraplus_lr_ratio": "the rate of B over that of A",
    "train.lr_scheduler_type": "after the warmup",
    "train.warmup_ratio": "share of the steps in which the rate rises",
}
_SHOWN = ("r", "lora_alpha", "lora_dropout", "use_rslora")


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
        comment = f"  # {_COMMENTS[key]}" if key in _COMMENTS else ""
        lines.append(f"{'  ' if above else ''}{name}: {yamltext.write(value)}{comment}")
    write_files(path.parent, {path.name: ("\n".join(lines) + "\n").encode()})


def _written(options: TrainConfig) -> Iterable[tuple[str, Any]]:
    """Keys and values, section by section: every option that is not None, and the adapter's that say something."""
    train = {key: getattr(options, name) for name, key in KEYS.items()}
    lora = {}
    for spec in fields(LoraConfig):
        value = getattr(options.lora, spec.name)
        default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
        if spec.name in LORA_KEYS and (spec.name in _SHOWN or value != default):
            lora[LORA_KEYS[spec.name]] = value
    values = {key: value for key, value in train.items() if value is not None} | lora
    if not options.overwrite:
        del values["overwrite"]
    order = ["task", "model", "data", "lora", "train", "eval", "output", "overwrite"]
    return sorted(values.items(), key=lambda item: order.index(item[0].partition(".")[0]))
