"""``LoraConfig``: the fields of one adapter, their checks, and PEFT's JSON.

Knows names, types, ranges and combinations. Knows nothing of models: whether a pattern matches a module is
for ``lora.targets`` to say. Names and defaults are those of ``peft.LoraConfig`` 0.21.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from loraloom.config import lora_checks as may
from loraloom.config import peft_file
from loraloom.config.checks import Check, as_it_is, choice, flag, kind_of, refuse
from loraloom.config.options import Options, option
from loraloom.config.peft_compat import SeenAsPeft
from loraloom.errors import ConfigError, nearest, short
from loraloom.files.atomic import write_files

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


# -- checks of single fields ------------------------------------------------------------------------------------------


def _task_type(name: str, value: Any) -> TaskType:
    known = [task.value for task in TaskType]
    text = getattr(value, "value", value)  # peft's own TaskType is an Enum of the same strings
    if text not in known:
        hint = nearest(text[:99].upper(), known) if isinstance(text, str) else ""
        refuse(name, f"one of {', '.join(known)}", value, hint)
    return TaskType(text)


def _peft_type(name: str, value: Any) -> PeftType:
    found = getattr(value, "value", value)  # peft's own is an Enum of the same strings
    if found not in ("LORA", None):
        raise ConfigError(f"{name}: loraloom reads LORA adapters, found {short(found)}")
    return PeftType.LORA


def _runtime(name: str, value: Any) -> LoraRuntimeConfig:
    get = value.get if isinstance(value, Mapping) else partial(getattr, value)
    if get("ephemeral_gpu_offload", False):
        raise ConfigError(f"{name}: ephemeral_gpu_offload is for DoRA, which loraloom does not have")
    return LoraRuntimeConfig()


_field = partial(option, section="lora")
_adapter = partial(_field, group="Adapter", search="varies")
_STRING = kind_of(str, "a string", {"type": "string"})


def _unsupported(default: Any, variant: bool = False) -> Any:
    """A field of PEFT's that loraloom does not implement: accepted at PEFT's default, refused otherwise.

    PEFT marks fields that choose another kind of layer; its get_peft_model, which TRL calls, looks for the mark.
    """

    def test(name: str, value: Any) -> Any:
        # PEFT writes the same "nothing" as None, {} or False in different releases.
        if value != default and value not in (None, False, {}, [], ""):
            raise ConfigError(
                f"{name}: not implemented in loraloom yet, so only PEFT's default {default!r} is accepted, "
                f"found {short(value)}; leave it out"
            )
        return copy.copy(default)

    mark = {"supported": False, **({"is_lora_variant": True} if variant else {})}
    nothing: list[Any] = [None, False, {}, [], ""]
    check = Check(test, {"enum": nothing if default in nothing else [default, *nothing]})
    return _field(default, check, metadata=mark)


@dataclass(kw_only=True)
class LoraConfig(SeenAsPeft, Options, PeftConfig):
    """The settings of one LoRA adapter, checked when made.

    The update of a module is ``scale · B A x`` with ``A: [r, in]``, ``B: [out, r]`` and ``scale`` equal to
    ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora`` (Hu et al. 2021; Kalajdzievski 2023).

    Raises:
        ConfigError: an unknown field, a wrong type, a value out of range, or fields that contradict.
    """

    unknown = "LoraConfig has no such field"

    r: int = _adapter(8, may.RANK, "Rank of the update", starter=16, flags=("--lora-r", "--rank", "--r"))
    lora_alpha: float = _adapter(8, may.ALPHA, "The update is scaled by alpha / r", starter=32)
    lora_dropout: float = _adapter(0.0, may.DROPOUT, "Dropout on the adapter's input while training", starter=0.05)
    target_modules: list[str] | str | None = _adapter(
        None, may.MODULES_OR_PATTERN, "Modules to adapt: names, a regular expression for whole names, or all-linear",
        unset="by model type", starter="all-linear",
    )  # fmt: skip
    target_parameters: list[str] | None = _adapter(
        None, may.MODULES, "Parameters to adapt that no layer calls, such as stacked weights of experts", search="same"
    )
    exclude_modules: list[str] | str | None = _adapter(
        None, may.MODULES_OR_PATTERN, "Modules that are never adapted: names or a regular expression"
    )
    bias: Literal["none", "all", "lora_only"] = _adapter(
        "none", choice("none", "all", "lora_only"), "Biases of the base that the adapter trains a copy of"
    )
    task_type: TaskType | None = _field(None, Check(_task_type, {"enum": [task.value for task in TaskType]}))
    modules_to_save: list[str] | None = _adapter(
        None, may.MODULES, "Modules trained in full and saved with the adapter"
    )
    #: Weight stored as [in, out]. Conv1D is recognised without it.
    fan_in_fan_out: bool = _field(False, flag())
    #: True: A uniform (Kaiming), B zero. "gaussian": A normal with deviation 1/r, B zero. False: both random.
    init_lora_weights: bool | Literal["gaussian"] = _adapter(
        True, choice(True, False, "gaussian"), "Start of A: true (Kaiming) or gaussian, B is zero; false: both random",
        metadata={"lora_variants": ("mica",)},
    )  # fmt: skip
    use_rslora: bool = _adapter(False, flag(), "Scale the update by alpha / sqrt(r), which keeps high ranks learning")
    rank_pattern: dict[str, int] = _adapter(
        {}, may.RANKS, "Ranks by name or regular expression; the first match counts"
    )
    alpha_pattern: dict[str, float] = _adapter({}, may.ALPHAS, "lora_alpha by name or regular expression")
    layers_to_transform: list[int] | int | None = _adapter(
        None, may.LAYERS, "Adapt these layers alone, by index; needs target_modules as names", unset="all"
    )
    layers_pattern: list[str] | str | None = _adapter(
        None, may.LAYER_LISTS, "Name of the list of layers in which layers_to_transform counts"
    )
    #: Made for inference: the adapter is frozen.
    inference_mode: bool = _field(False, flag())
    base_model_name_or_path: str | None = _field(None, _STRING)
    revision: str | None = _field(None, _STRING)

    # What PEFT records of itself.
    peft_type: PeftType = _field(PeftType.LORA, Check(_peft_type, {"enum": ["LORA", None]}))
    peft_version: str = _field(PEFT_FORMAT, Check(as_it_is, {}))
    auto_mapping: dict[str, Any] | None = _field(None, kind_of(dict, "a mapping or null", {"type": "object"}))
    #: PEFT's options of a run, which no file keeps.
    runtime_config: Any = _field(LoraRuntimeConfig(), Check(_runtime, {}))

    megatron_config: Any = _unsupported(None)
    megatron_core: Any = _unsupported("megatron.core")
    trainable_token_indices: Any = _unsupported(None)
    loftq_config: Any = _unsupported({})
    eva_config: Any = _unsupported(None)
    corda_config: Any = _unsupported(None)
    lora_ga_config: Any = _unsupported(None)
    use_dora: Any = _unsupported(False, variant=True)
    velora_config: Any = _unsupported(None, variant=True)
    alora_invocation_tokens: Any = _unsupported(None, variant=True)
    use_qalora: Any = _unsupported(False, variant=True)
    qalora_group_size: Any = _unsupported(16)
    monteclora_config: Any = _unsupported(None, variant=True)
    layer_replication: Any = _unsupported(None)
    lora_bias: Any = _unsupported(False)
    use_bdlora: Any = _unsupported(None, variant=True)
    arrow_config: Any = _unsupported(None, variant=True)
    kasa_config: Any = _unsupported(None, variant=True)
    ensure_weight_tying: Any = _unsupported(False)

    #: What of a file's fields was left out, and why; not a field.
    notes: ClassVar[tuple[str, ...]] = ()
    peft_class: ClassVar[tuple[str, str]] = ("peft.tuners.lora.config", "LoraConfig")
    # What peft's get_peft_model asks of a config: TRL calls it with ``peft_config=``.
    _custom_modules: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.target_modules == "" and (self.target_parameters or self.modules_to_save):
            self.target_modules = []  # nothing, on purpose
        self.check_fields()
        self.target_parameters = self.target_parameters or None
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ConfigError(
                "layers_to_transform: needs target_modules as a list of names, found the string "
                f"{short(self.target_modules)}; write the layers into the regular expression instead"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern: has no effect without layers_to_transform; set both or neither")

    def copy(self, **changes: Any) -> LoraConfig:
        """A checked copy that shares nothing with this config, with ``changes`` applied."""
        self.check_names(changes)
        mine = {spec.name: copy.deepcopy(getattr(self, spec.name)) for spec in fields(self)}
        return type(self)(**{**mine, **changes})

    def scale(self, r: int, alpha: float) -> float:
        """The factor of ``B A x`` for rank ``r`` and ``alpha``."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def to_dict(self) -> dict[str, Any]:
        """The 41 keys that PEFT writes: plain JSON values, lists sorted, so equal configs give equal bytes."""
        out = {spec.name: copy.deepcopy(getattr(self, spec.name)) for spec in fields(self)}
        del out["runtime_config"]  # PEFT never saves it
        for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            out[name] = sorted(out[name]) if isinstance(out[name], list) else out[name]
        return {name: value.value if isinstance(value, Enum) else value for name, value in out.items()}

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
        write_files(save_directory, {CONFIG_NAME: config.to_json().encode()})
