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
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from loraloom.config import peft_file
from loraloom.config.peft_compat import seen_as
from loraloom.config.peft_file import short
from loraloom.errors import ConfigError, nearest

CONFIG_NAME = "adapter_config.json"
#: How peft marks fields that choose another kind of layer. Its get_peft_model, which TRL calls, looks for the mark.
_VARIANT = {"is_lora_variant": True}
#: Beyond this, scale times an update leaves float32 for every weight that means anything.
_MOST_ALPHA = 1e12
_MOST_INTEGER = 2**31 - 1
#: Characters of the longest name of a module, and of the longest regular expression: one that lists every module of a
#: large model has some 100,000.
_LONGEST_NAME = 1000
_LONGEST_PATTERN = 400_000
#: Names in the longest list.
_MOST_NAMES = 100_000
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


class PeftType(str, Enum):
    """PEFT's name for the method of an adapter. loraloom has one of them."""

    LORA = "LORA"


class PeftConfig:
    """What PEFT's configs have in common, for code that reads a folder before it knows what kind of adapter it has."""

    is_prompt_learning = False
    is_adaption_prompt = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **options: Any
    ) -> LoraConfig:
        """Read ``adapter_config.json`` of an adapter folder. Fields among ``options`` take the place of the file's."""
        return LoraConfig._of_folder(Path(pretrained_model_name_or_path) / (subfolder or ""), options)

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **options: Any) -> dict[str, Any]:
        """The fields in a file, as they are there."""
        return peft_file.read_json(Path(path_json_file))

    @classmethod
    def from_peft_type(cls, **fields: Any) -> LoraConfig:
        """A config from its fields, ``peft_type`` among them. Unknown ones that say nothing are left out."""
        return LoraConfig.from_dict(fields)

    def push_to_hub(self, *args: Any, **options: Any) -> None:
        raise ConfigError("push_to_hub: loraloom opens no connection; save_pretrained, and upload the folder with `hf`")


@dataclass
class LoraRuntimeConfig:
    """PEFT's options of a run, which no file keeps. Only DoRA uses the one that there is."""

    ephemeral_gpu_offload: bool = False


@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
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
    init_lora_weights: bool | Literal["gaussian"] = field(default=True, metadata={"lora_variants": ("mica",)})
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
    peft_type: PeftType = PeftType.LORA
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
    use_dora: Any = field(default=False, metadata=_VARIANT)
    velora_config: Any = field(default=None, metadata=_VARIANT)
    alora_invocation_tokens: Any = field(default=None, metadata=_VARIANT)
    use_qalora: Any = field(default=False, metadata=_VARIANT)
    qalora_group_size: Any = 16
    monteclora_config: Any = field(default=None, metadata=_VARIANT)
    layer_replication: Any = None
    runtime_config: Any = field(default_factory=LoraRuntimeConfig)
    lora_bias: Any = False
    use_bdlora: Any = field(default=None, metadata=_VARIANT)
    arrow_config: Any = field(default=None, metadata=_VARIANT)
    kasa_config: Any = field(default=None, metadata=_VARIANT)
    ensure_weight_tying: Any = False

    #: What of a file's fields was left out, and why; not a field.
    notes: ClassVar[tuple[str, ...]] = ()
    # What peft's get_peft_model asks of a config: TRL calls it with ``peft_config=``.
    _custom_modules: ClassVar[None] = None

    def __new__(cls, *args: Any, **kwargs: Any) -> LoraConfig:
        # Before the generated __init__, whose TypeError would not name the nearest field.
        _check_names(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_not_implemented()
        self.r = _integer("r", self.r, low=1)
        self.lora_alpha = _alpha("lora_alpha", self.lora_alpha)
        self.lora_dropout = _number("lora_dropout", self.lora_dropout)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout: must be at least 0 and below 1, found {self.lora_dropout}")
        if self.target_modules == "" and (self.target_parameters or self.modules_to_save):
            self.target_modules = []  # nothing, on purpose
        self.target_modules = _names_or_pattern("target_modules", self.target_modules)
        if self.target_parameters is not None:
            self.target_parameters = _names("target_parameters", self.target_parameters) or None
        self.exclude_modules = _names_or_pattern("exclude_modules", self.exclude_modules)
        self.modules_to_save = None if self.modules_to_save is None else _names("modules_to_save", self.modules_to_save)
        _choice("bias", self.bias, ("none", "all", "lora_only"))
        self.task_type = _task_type(self.task_type)
        for name in ("fan_in_fan_out", "use_rslora", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: must be true or false, found {short(getattr(self, name))}")
        if not isinstance(self.init_lora_weights, bool):
            _choice("init_lora_weights", self.init_lora_weights, (True, False, "gaussian"))
        self.rank_pattern = {
            key: _integer(f"rank_pattern[{short(key)}]", r, low=1)
            for key, r in _pattern("rank_pattern", self.rank_pattern)
        }
        self.alpha_pattern = {
            key: _alpha(f"alpha_pattern[{short(key)}]", alpha)
            for key, alpha in _pattern("alpha_pattern", self.alpha_pattern)
        }
        self._check_layers()
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ConfigError(f"{name}: must be a string, found {short(getattr(self, name))}")
        if not isinstance(self.auto_mapping, dict | None):
            raise ConfigError(f"auto_mapping: must be a mapping or null, found {short(self.auto_mapping)}")
        self.auto_mapping = copy.deepcopy(self.auto_mapping)

    def _check_not_implemented(self) -> None:
        found = getattr(self.peft_type, "value", self.peft_type)  # peft's own is an Enum of the same strings
        if found not in ("LORA", None):
            raise ConfigError(f"peft_type: loraloom reads LORA adapters, found {short(found)}")
        self.peft_type = PeftType.LORA
        run = self.runtime_config
        if (run.get if isinstance(run, Mapping) else partial(getattr, run))("ephemeral_gpu_offload", False):
            raise ConfigError("runtime_config: ephemeral_gpu_offload is for DoRA, which loraloom does not have")
        self.runtime_config = LoraRuntimeConfig()
        for name, default in _not_implemented().items():
            found = getattr(self, name)
            # PEFT writes the same "nothing" as None, {} or False in different releases.
            if found != default and found not in (None, False, {}, [], ""):
                raise ConfigError(
                    f"{name}: not implemented in loraloom yet, so only PEFT's default {default!r} is accepted, "
                    f"found {short(found)}; leave it out"
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
                    f"{short(self.target_modules)}; write the layers into the regular expression instead"
                )
        if self.layers_pattern is not None:
            self.layers_pattern = (
                self.layers_pattern
                if isinstance(self.layers_pattern, str)
                else _names("layers_pattern", self.layers_pattern)
            )
            for pattern in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern:
                _regular_expression("layers_pattern", pattern)
            if self.layers_pattern and self.layers_to_transform is None:
                raise ConfigError("layers_pattern: has no effect without layers_to_transform; set both or neither")

    @property
    def __class__(self) -> type:
        return seen_as(type(self), "peft.tuners.lora.config", "LoraConfig")

    @__class__.setter
    def __class__(self, cls: type) -> None:
        object.__dict__["__class__"].__set__(self, cls)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (type(self),), vars(self)

    def copy(self, **changes: Any) -> LoraConfig:
        """A checked copy that shares nothing with this config, with ``changes`` applied."""
        _check_names(type(self), changes)
        mine = {spec.name: copy.deepcopy(getattr(self, spec.name)) for spec in fields(self)}
        return type(self)(**{**mine, **changes})

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
        """A config from ``adapter_config.json``'s contents; ``source`` (a path) opens the error messages.

        What of an adapter that was trained elsewhere can mean nothing is left out: see ``notes``.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source or 'config'}: must be a JSON object, found {type(values).__name__}")
        try:
            known, notes = peft_file.finished(values, [spec.name for spec in fields(cls)])
            config = cls(**known)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}" if source else str(error)) from None
        vars(config)["notes"] = tuple(notes)
        return config

    @classmethod
    def from_json(cls, text: str, *, source: str = CONFIG_NAME) -> LoraConfig:
        return cls.from_dict(peft_file.parse(text, source=source), source=source)

    @classmethod
    def _of_folder(cls, folder: Path, options: Mapping[str, Any]) -> LoraConfig:
        path = folder / CONFIG_NAME
        own = {spec.name for spec in fields(cls)} - {"revision"}
        for name, value in options.items():
            if name not in own and name not in peft_file.HARMLESS and (value or name not in peft_file.HUB_ONLY):
                raise ConfigError(
                    f"{name}: chooses among files of a hub, and loraloom reads folders alone"
                    if name in peft_file.HUB_ONLY
                    else f"{name}: loraloom has no such option{nearest(name, [*own, *peft_file.HARMLESS])}"
                )
        config = cls.from_dict(peft_file.read_json(path), source=str(path))
        changes = {name: value for name, value in options.items() if name in own}
        return config.copy(**changes) if changes else config

    def save_pretrained(
        self, save_directory: str | Path, auto_mapping_dict: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Write ``adapter_config.json`` into a folder, which is made if need be.

        ``auto_mapping_dict`` takes the place of ``auto_mapping``. Options of the hub have no work to do here.
        """
        if options.get("push_to_hub"):
            self.push_to_hub()
        config = self if auto_mapping_dict is None else self.copy(auto_mapping=dict(auto_mapping_dict))
        path = Path(save_directory) / CONFIG_NAME
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(config.to_json(), encoding="utf-8")
            os.replace(aside, path)  # whole or as it was, and never through a link
        finally:
            aside.unlink(missing_ok=True)


def _not_implemented() -> dict[str, Any]:
    specs = fields(LoraConfig)
    start = next(i for i, spec in enumerate(specs) if spec.name == "megatron_config")
    return {
        spec.name: spec.default if spec.default is not dataclasses.MISSING else {}
        for spec in specs[start:]
        if spec.name != "runtime_config"
    }


def _check_names(cls: type[LoraConfig], given: Iterable[str]) -> None:
    known = [spec.name for spec in fields(cls)]
    for name in given:
        if name not in known:
            raise ConfigError(f"{short(name)[1:-1]}: LoraConfig has no such field{nearest(name[:99], known)}")


def _integer(name: str, value: Any, low: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ConfigError(f"{name}: must be a whole number, found {short(value)}") from None
    if number < low:
        raise ConfigError(f"{name}: must be at least {low}, found {short(number)}")
    if number > _MOST_INTEGER:
        raise ConfigError(f"{name}: {short(number)} is more than any model has")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, str):
        raise ConfigError(f"{name}: must be a number, found {short(value)}")
    return value if isinstance(value, int) else float(value)


def _alpha(name: str, value: Any) -> float:
    number = _number(name, value)
    if isinstance(number, float) and not math.isfinite(number):
        raise ConfigError(f"{name}: must be finite, found {number}")
    if number == 0:
        raise ConfigError(f"{name}: 0 would switch the adapter off; give a number that is not 0")
    if not 1 / _MOST_ALPHA <= abs(number) <= _MOST_ALPHA:
        raise ConfigError(f"{name}: {short(number)} times an update is no number in float32; give one near r")
    return number


def _names(name: str, value: Any) -> list[str]:
    """A copy of a list of names, duplicates removed, order kept."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(
            f"{name}: must be a list of module names, found {short(value)}; write [{short(value)}] for one name"
        )
    for item in value:
        if not isinstance(item, str) or not item:
            raise ConfigError(f"{name}: every entry must be a module's name, found {short(item)}")
        if len(item) > _LONGEST_NAME:
            raise ConfigError(f"{name}: an entry of {len(item):,} characters, {short(item)}, is no module's name")
    names = sorted(value) if isinstance(value, set | frozenset) else list(value)
    if len(names) > _MOST_NAMES:
        raise ConfigError(f"{name}: {len(names):,} names, more than the {_MOST_NAMES:,} that are read")
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
        raise ConfigError(f"{name}: must map module names to numbers, found {short(value)}")
    for key in value:
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{name}: every key must be a module's name or a pattern, found {short(key)}")
        _regular_expression(name, key)
        _regular_expression(name, rf"(.*\.)?({key})$")  # as it is matched: an (?i) at its start would stand inside
    return list(value.items())


def _regular_expression(name: str, pattern: str) -> None:
    if len(pattern) > _LONGEST_PATTERN:
        raise ConfigError(
            f"{name}: a regular expression of {len(pattern):,} characters, more than the {_LONGEST_PATTERN:,} "
            "that are read"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{name}: {short(pattern)} is not a regular expression ({error})") from None


def _choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices or (isinstance(value, int) and not isinstance(value, bool)):
        hint = nearest(value[:99], [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
        raise ConfigError(f"{name}: must be one of {', '.join(map(repr, choices))}, found {short(value)}{hint}")


def _task_type(value: Any) -> TaskType | None:
    if value is None or isinstance(value, TaskType):
        return value
    known = [task.value for task in TaskType]
    text = getattr(value, "value", value)  # peft's own TaskType is an Enum of the same strings
    if text not in known:
        hint = nearest(text[:99].upper(), known) if isinstance(text, str) else ""
        raise ConfigError(f"task_type: must be one of {', '.join(known)}, found {short(value)}{hint}")
    return TaskType(text)
