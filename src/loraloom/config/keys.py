"""The keys of a run file: every option by its dotted key, and the error for an unknown key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraloom.config.lora import LoraConfig
from loraloom.config.options import Option, options_of
from loraloom.config.train import TrainConfig
from loraloom.config.tune import PRESET, SPACE, SearchOptions
from loraloom.errors import ConfigError, nearest

TRAIN = options_of(TrainConfig)
#: Fields of LoraConfig without those that a run sets itself.
ADAPTER = {name: one for name, one in options_of(LoraConfig).items() if name not in ("task_type", "runtime_config")}
_TUNE = {"preset": PRESET, "space": SPACE, **options_of(SearchOptions)}
#: Every key of a run file and its option.
OPTIONS: dict[str, Option] = {one.key: one for group in (TRAIN, ADAPTER, _TUNE) for one in group.values()}
#: A field → its key, such as ``"learning_rate"`` → ``"train.learning_rate"``; ``lora`` is a section.
KEYS = {name: one.key for name, one in TRAIN.items()}
LORA_KEYS = {name: one.key for name, one in ADAPTER.items()}
#: Both; of a name that both have (``revision``) the run's option is meant.
FIELD_KEYS = {**LORA_KEYS, **KEYS}
TUNE_KEYS = {name: one.key for name, one in _TUNE.items()}
#: Sections, each with a key as an example.
EXAMPLES = {
    "model": "name: my-model",
    "data": "train: rows.jsonl",
    "lora": "r: 16",
    "train": "batch_size: 16",
    "eval": "steps: 100",
    "tune": "trials: 16",
}
SECTIONS = tuple(EXAMPLES)
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


def fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as names of fields."""
    return {OPTIONS[key].name: value for key, value in values.items()}


def split(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of ``LoraConfig`` and of ``TrainConfig`` from dotted keys."""
    lora = fields_of({key: value for key, value in values.items() if key.startswith("lora.")})
    return lora, fields_of({key: value for key, value in values.items() if not key.startswith(("lora.", "tune."))})


def check_key(key: str, place: str = "") -> None:
    """That ``key`` names an option; the error names the nearest one, and begins with ``place`` where that is given."""
    if key in OPTIONS or key.startswith("tune.space."):
        return
    before = f"{place}: " if place else ""
    section, _, name = key.rpartition(".")
    if key in SECTIONS:
        example = EXAMPLES[key].replace(": ", "=")
        raise ConfigError(f"{before}{key}: is a section; set one of its keys, such as {key}.{example}")
    if key == "lora.task_type":
        raise ConfigError(f"{before}{key}: follows from task; leave it out")
    raise ConfigError(f"{before}{key}: there is no such key{_hint(section, name)}")


def _hint(section: str, name: str) -> str:
    home = FIELD_KEYS.get(name) or HABITS.get(name)
    if home:
        return f"; did you mean {home!r}?"
    mates = [key for key in OPTIONS if key.rpartition(".")[0] == section]
    close = nearest(name, [key.rpartition(".")[2] for key in mates] if section else [*mates, *SECTIONS])
    if close:
        return close
    if section and section not in SECTIONS:
        return nearest(section, SECTIONS) or f"; the sections are {', '.join(SECTIONS)}"
    return f"; the keys here are {', '.join([*mates, *(() if section else SECTIONS)])}"
