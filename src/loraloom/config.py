"""``LoraConfig``: the fields of one adapter, their checks, and PEFT's JSON.

Knows names, types, ranges and combinations. Knows nothing of models: whether a pattern matches a module is
for ``lora.targets`` to say. Names and defaults are those of ``peft.LoraConfig`` 0.21.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import operator
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from loraloom.errors import ConfigError, nearest

CONFIG_NAME = "adapter_config.json"
PEFT_FORMAT = "0.21.2"  # the version of PEFT whose files we read and write


class TaskType(str, Enum):
    """What the base model is for; decides which heads are trained beside the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


#: Heads that a task trains and saves in full when the model has them.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


@dataclass(kw_only=True)
class LoraConfig:
    """The settings of one LoRA adapter, checked when made.

    The update of a module is ``scale · B A x`` with ``A: [r, in]``, ``B: [out, r]`` and ``scale`` equal to
    ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora`` (Hu et al. 2021; Kalajdzievski 2023).

    Raises:
        ConfigError: an unknown field, a wrong type, a value out of range, or fields that contradict.
    """

    #: Rank of the update, at least 1.
    r: int = 8
    #: Numerator of the scale; finite and not 0.
    lora_alpha: float = 8
    #: Probability in ``[0, 1)`` of dropping an input of ``A`` while training.
    lora_dropout: float = 0.0
    #: Names or name suffixes; a regular expression over whole names; "all-linear"; or None: by model type.
    target_modules: list[str] | str | None = None
    #: Parameters that no layer calls, such as the stacked weights of experts: names or name suffixes.
    target_parameters: list[str] | None = None
    #: Modules that are never adapted; a list or a regular expression as above.
    exclude_modules: list[str] | str | None = None
    #: Which biases of the base this adapter trains a copy of.
    bias: Literal["none", "all", "lora_only"] = "none"
    task_type: TaskType | None = None
    #: Modules trained in full, as the adapter's own copy, and saved with it.
    modules_to_save: list[str] | None = None
    #: Weight stored as [in, out]. Conv1D is recognised whatever this says.
    fan_in_fan_out: bool = False
    #: True: A uniform (Kaiming), B zero. "gaussian": A normal with deviation 1/r, B zero. False: both random.
    init_lora_weights: bool | Literal["gaussian"] = True
    #: Scale by alpha/sqrt(r), which keeps high ranks learning.
    use_rslora: bool = False
    #: Name or regular expression → r for the modules it matches; the first hit wins.
    rank_pattern: dict[str, int] = field(default_factory=dict)
    #: The same for lora_alpha.
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    #: Only layers with these indices; needs a list of targets.
    layers_to_transform: list[int] | int | None = None
    #: Name of the list of layers that the index counts in.
    layers_pattern: list[str] | str | None = None
    #: Made for inference: the adapter is frozen.
    inference_mode: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None

    # What PEFT records of itself.
    peft_type: str = "LORA"
    peft_version: str = PEFT_FORMAT
    auto_mapping: dict[str, Any] | None = None

    # PEFT's fields that loraloom does not implement: accepted at PEFT's default, refused otherwise.
    megatron_config: Any = None
    megatron_core: Any = "megatron.core"
    trainable_token_indices: Any = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: Any = False
    velora_config: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: Any = False
    qalora_group_size: Any = 16
    monteclora_config: Any = None
    layer_replication: Any = None
    runtime_config: Any = None
    lora_bias: Any = False
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: Any = False

    def __new__(cls, *args: Any, **kwargs: Any) -> LoraConfig:
        # Before the generated __init__, whose TypeError would not name the nearest field.
        _check_names(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_not_implemented()
        self.r = _integer("r", self.r, low=1)
        self.lora_alpha = _finite("lora_alpha", self.lora_alpha)
        self.lora_dropout = _number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: must be at least 0 and below 1, found {self.lora_dropout}")
        self.target_modules = _names_or_pattern("target_modules", self.target_modules)
        if self.target_parameters is not None:
            self.target_parameters = _names("target_parameters", self.target_parameters) or None
        self.exclude_modules = _names_or_pattern("exclude_modules", self.exclude_modules)
        self.modules_to_save = None if self.modules_to_save is None else _names("modules_to_save", self.modules_to_save)
        _choice("bias", self.bias, ("none", "all", "lora_only"))
        self.task_type = _task_type(self.task_type)
        for name in ("fan_in_fan_out", "use_rslora", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: must be true or false, found {getattr(self, name)!r}")
        if not isinstance(self.init_lora_weights, bool):
            _choice("init_lora_weights", self.init_lora_weights, (True, False, "gaussian"))
        self.rank_pattern = {
            key: _integer(f"rank_pattern[{key!r}]", r, low=1) for key, r in _pattern("rank_pattern", self.rank_pattern)
        }
        self.alpha_pattern = {
            key: _finite(f"alpha_pattern[{key!r}]", alpha)
            for key, alpha in _pattern("alpha_pattern", self.alpha_pattern)
        }
        self._check_layers()
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name}: must be a string, found {getattr(self, name)!r}")
        if not isinstance(self.auto_mapping, dict | None):
            raise ConfigError(f"auto_mapping: must be a mapping or null, found {self.auto_mapping!r}")
        self.auto_mapping = copy.deepcopy(self.auto_mapping)

    def _check_not_implemented(self) -> None:
        if self.peft_type != "LORA":
            raise ConfigError(f"peft_type: loraloom reads LORA adapters, found {self.peft_type!r}")
        for name, default in _not_implemented().items():
            found = getattr(self, name)
            # PEFT writes the same "nothing" as None, {} or False in different releases.
            if found != default and not (not default and not found):
                raise ConfigError(
                    f"{name}: not implemented in loraloom yet, so only PEFT's default {default!r} is accepted, "
                    f"found {found!r}; leave it out"
                )
            setattr(self, name, copy.copy(default))

    def _check_layers(self) -> None:
        if self.layers_to_transform is not None:
            if isinstance(self.layers_to_transform, Iterable) and not isinstance(self.layers_to_transform, str):
                self.layers_to_transform = [
                    _integer("layers_to_transform", index, low=0) for index in self.layers_to_transform
                ]
                if not self.layers_to_transform:
                    raise ConfigError("layers_to_transform: the list is empty, so no layer would be adapted")
            else:
                self.layers_to_transform = _integer("layers_to_transform", self.layers_to_transform, low=0)
            if isinstance(self.target_modules, str):
                raise ConfigError(
                    "layers_to_transform: needs target_modules as a list of names, found the string "
                    f"{self.target_modules!r}; write the layers into the regular expression instead"
                )
        if self.layers_pattern is not None:
            self.layers_pattern = (
                self.layers_pattern
                if isinstance(self.layers_pattern, str)
                else _names("layers_pattern", self.layers_pattern)
            )
            if self.layers_pattern and self.layers_to_transform is None:
                raise ConfigError("layers_pattern: has no effect without layers_to_transform; set both or neither")

    def copy(self, **changes: Any) -> LoraConfig:
        """A checked copy that shares nothing with this config, with ``changes`` applied."""
        _check_names(type(self), changes)
        return dataclasses.replace(copy.deepcopy(self), **changes)

    def scale(self, r: int, alpha: float) -> float:
        """The factor of ``B A x`` for rank ``r`` and ``alpha``."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def to_dict(self) -> dict[str, Any]:
        """The 41 keys that PEFT writes: plain JSON values, lists sorted, so equal configs give equal bytes."""
        out: dict[str, Any] = {}
        for spec in fields(self):
            if spec.name == "runtime_config":  # PEFT never saves it
                continue
            value = copy.deepcopy(getattr(self, spec.name))
            if spec.name in (
                "target_modules",
                "target_parameters",
                "exclude_modules",
                "modules_to_save",
            ) and isinstance(value, list):
                value = sorted(value)
            out[spec.name] = value.value if isinstance(value, Enum) else value
        return out

    def to_json(self) -> str:
        """PEFT's ``adapter_config.json``: two spaces, sorted keys."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "") -> LoraConfig:
        """A config from ``adapter_config.json``'s contents; ``source`` (a path) opens the error messages."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source or 'config'}: must be a JSON object, found {type(values).__name__}")
        try:
            return cls(**dict(values))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}" if source else str(error)) from None

    @classmethod
    def from_json(cls, text: str, *, source: str = CONFIG_NAME) -> LoraConfig:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{source}, line {error.lineno}: not valid JSON ({error.msg})") from None
        return cls.from_dict(values, source=source)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LoraConfig:
        """Read ``adapter_config.json`` of an adapter folder."""
        path = Path(folder) / CONFIG_NAME
        try:
            return cls.from_json(path.read_text(encoding="utf-8"), source=str(path))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); is this an adapter folder?") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``adapter_config.json`` into ``folder``, which is made if need be."""
        path = Path(folder) / CONFIG_NAME
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(self.to_json(), encoding="utf-8")
            os.replace(aside, path)  # whole or as it was, and never through a link
        finally:
            aside.unlink(missing_ok=True)


def _not_implemented() -> dict[str, Any]:
    specs = fields(LoraConfig)
    start = next(i for i, spec in enumerate(specs) if spec.name == "megatron_config")
    return {spec.name: spec.default if spec.default is not dataclasses.MISSING else {} for spec in specs[start:]}


def _check_names(cls: type[LoraConfig], given: Iterable[str]) -> None:
    known = [spec.name for spec in fields(cls)]
    for name in given:
        if name not in known:
            raise ConfigError(f"{name}: LoraConfig has no such field{nearest(name, known)}")


def _integer(name: str, value: Any, low: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name}: must be a whole number, found {value!r}") from None
    if number < low:
        raise ConfigError(f"{name}: must be at least {low}, found {number}")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, str):
        raise ConfigError(f"{name}: must be a number, found {value!r}")
    return value if isinstance(value, int) else float(value)


def _finite(name: str, value: Any) -> float:
    number = _number(name, value)
    if not math.isfinite(number):
        raise ConfigError(f"{name}: must be finite, found {number}")
    if number == 0:
        raise ConfigError(f"{name}: 0 would switch the adapter off; give a number that is not 0")
    return number


def _names(name: str, value: Any) -> list[str]:
    """A copy of a list of names, duplicates removed, order kept."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(f"{name}: must be a list of module names, found {value!r}; write [{value!r}] for one name")
    names = sorted(value) if isinstance(value, set | frozenset) else list(value)
    for item in names:
        if not isinstance(item, str) or not item:
            raise ConfigError(f"{name}: every entry must be a module's name, found {item!r}")
    return list(dict.fromkeys(names))


def _names_or_pattern(name: str, value: Any) -> list[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if not value:
            raise ConfigError(f"{name}: an empty string matches nothing; give names, a pattern, or leave it out")
        _regular_expression(name, value)
        return value
    return _names(name, value)


def _pattern(name: str, value: Any) -> list[tuple[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name}: must map module names to numbers, found {value!r}")
    for key in value:
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{name}: every key must be a module's name or a pattern, found {key!r}")
        _regular_expression(name, key)
    return list(value.items())


def _regular_expression(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{name}: {pattern!r} is not a regular expression ({error})") from None


def _choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices or (isinstance(value, int) and not isinstance(value, bool)):
        hint = nearest(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
        raise ConfigError(f"{name}: must be one of {', '.join(map(repr, choices))}, found {value!r}{hint}")


def _task_type(value: Any) -> TaskType | None:
    if value is None or isinstance(value, TaskType):
        return value
    known = [task.value for task in TaskType]
    text = getattr(value, "value", value)  # peft's own TaskType is an Enum of the same strings
    if text not in known:
        hint = nearest(text.upper(), known) if isinstance(text, str) else ""
        raise ConfigError(f"task_type: must be one of {', '.join(known)}, found {value!r}{hint}")
    return TaskType(text)
