"""What the result of a run depends on, and whether two runs have it in common. Knows no checkpoints."""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from loraloom.config.lora import LoraConfig
from loraloom.config.options import options_of
from loraloom.config.train import TrainConfig
from loraloom.data.example import Example
from loraloom.errors import ConfigError
from loraloom.files.jsonio import plain
from loraloom.training.run_record import machine, versions
from loraloom.training.setup import TrainJob

#: With one of these, evaluations decide when training ends, or which step's adapter is kept.
_DECIDING = ("load_best_model_at_end", "early_stopping_patience")
#: Of these the bytes are compared, wherever they are: see ``_without_paths``.
_SOURCES = ("data", "eval_split", "test_split")
#: What a ``LoraConfig`` records about itself.
_NOT_COMPARED = ("lora.base_model_name_or_path", "lora.peft_version")
#: Part of the identity → what to say if it differs, after "was trained on".
_OTHERS = {
    "data": "other data: the hashes of the files differ; bring those files back",
    "base": "another model: the weights of {now} differ from those of {then} then; give that model",
    "examples": (
        "other tokens, though the files are the same: the tokenizer, or how rows are read, has changed; resume with "
        "the original model and versions"
    ),
}


def identity(job: TrainJob) -> dict[str, Any]:
    """Everything that a run's result depends on: options, data, examples, model, machine and library versions."""
    return {
        "options": job.options.to_dict(),
        "data": list(job.data.hashes.values()),
        "examples": _hash_of_examples(job.data.train.examples),
        "base": job.weights,
        "machine": versions() | machine(),
    }


def identity_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """The identity of the run that wrote ``run.json``."""
    return {**record["identity"], "options": record["options"], "machine": record["versions"] | record["machine"]}


def _hash_of_examples(examples: Sequence[Example]) -> str:
    """Of the lengths of all examples and the tokens of about a hundred, to detect another tokenizer."""
    lengths = getattr(examples, "lengths", None)
    if lengths is None:
        lengths = [len(example.input_ids) for example in examples]
    found = hashlib.sha256(array.array("q", map(int, lengths)).tobytes())
    some = range(0, len(examples), max(1, len(examples) // 100))
    found.update(json.dumps([[examples[i].input_ids, examples[i].labels] for i in some]).encode())
    return found.hexdigest()


def check_same(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Compare two identities. Returns the differences that may change the last bits of the result.

    Raises:
        ConfigError: the result would be another one. The message names what differs, with both values.
    """
    check_options(then["options"], now["options"], where)
    models = {"then": then["options"]["model"], "now": now["options"]["model"]}
    for part, what in _OTHERS.items():
        if then[part] != now[part]:
            advice = "start over, in another folder or with overwrite"
            raise ConfigError(f"resume: {where} was trained on {what.format(**models)}, or {advice}")
    old, new = then["machine"], now["machine"]
    changes = [f"{name} {old.get(name)} is now {new[name]}" for name in new if old.get(name) != new[name]]
    rounding = [name for name, option in sorted(options_of(TrainConfig).items()) if option.resume == "rounding"]
    before, after = _flat(then["options"]), _flat(now["options"])
    return changes + [f"{n} {before[n]!r} is now {after[n]!r}" for n in rounding if before[n] != after[n]]


def check_options(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        ConfigError: options that change the result differ.
    """
    if found := differences(then, now):
        told = "; ".join(f"{name} is {new!r} and was {old!r}" for name, (old, new) in found.items())
        raise ConfigError(
            f"resume: {where} was trained with other options: {told}. Give the original options to resume, or start "
            "over, in another folder or with overwrite"
        )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options that change the result, by name, with their values then and now."""
    old, new = _flat(then), _flat(now)
    ignored = {"nothing", "rounding"}
    if not any(options[name] for options in (old, new) for name in _DECIDING):
        ignored.add("evaluation")
    names = [name for name, option in options_of(TrainConfig).items() if option.resume not in ignored]
    names += sorted(name for name in old.keys() | new.keys() if name.startswith("lora.") and name not in _NOT_COMPARED)
    values = {name: (old.get(name), new.get(name)) for name in names}
    return {
        name: (before, after)
        for name, (before, after) in values.items()
        if before != after and (name not in _SOURCES or _without_paths(before) != _without_paths(after))
    }


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """All options by name, ``lora.r`` among them. One that the run did not know has its default."""
    defaults = {name: option.default for name, option in options_of(TrainConfig).items()}
    found: dict[str, Any] = plain(defaults | dict(options))
    lora = plain(LoraConfig().to_dict()) | found.pop("lora", {})
    return found | {f"lora.{name}": value for name, value in lora.items()}


def _without_paths(value: Any) -> Any:
    """How much is held out, and how sources are weighted, without the paths of files."""
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    return {**value, "path": ""} if isinstance(value, dict) else "" if isinstance(value, str) else value
