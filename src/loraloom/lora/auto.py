"""PEFT's functions around a ``PeftModel``: a base found from the adapter's folder, adapters in a plain model."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loraloom.config.lora import LoraConfig, TaskType
from loraloom.errors import AdapterError, ConfigError
from loraloom.lora import checkpoint
from loraloom.lora.adapters import LoraModel
from loraloom.lora.checkpoint import read_tensors
from loraloom.lora.frozen import HALF
from loraloom.lora.injection import unwrapped_state
from loraloom.lora.keys import PREFIX, LoadReport, normalise
from loraloom.lora.model import PeftModel, by_identity
from loraloom.lora.peft_options import check_config, check_options
from loraloom.lora.status import adapted

_ADAPTERS_OWN = ("ephemeral_gpu_offload", "autocast_adapter_dtype", "key_mapping", "strict", "subfolder")
#: Task → the class of transformers that has a model for it.
AUTO_CLASS = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}


class AutoPeftModel:
    """A base and its adapter, both from what the adapter's folder says. The class of the base is that of its task."""

    _task: ClassVar[TaskType | None] = None

    def __init__(self, *args: Any, **options: Any) -> None:
        raise OSError(f"{type(self).__name__} is made by from_pretrained")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> PeftModel:
        """The base that the folder's config names, with the adapter on it.

        Where the adapter carries the base's embeddings, or its folder has a tokenizer with more tokens than the base
        has rows for, the base's embeddings are resized first.

        Args:
            revision: of the base; by default that of the config.
            options: for the base's ``from_pretrained`` (``dtype``, ``device_map``, ...), and those of
                ``PeftModel.load_adapter``.

        Raises:
            ConfigError: the folder does not say which base, or of which class.
            AdapterError: as ``PeftModel.from_pretrained``.
        """
        mine = {name: options.pop(name) for name in _ADAPTERS_OWN if name in options}
        folder = Path(pretrained_model_name_or_path) / (mine.get("subfolder") or "")
        config = LoraConfig.from_pretrained(folder) if config is None else config
        name = config.base_model_name_or_path
        if not name:
            raise ConfigError(
                f"{folder}: base_model_name_or_path: the adapter does not say what base it is of; load the base "
                "yourself and call PeftModel.from_pretrained(base, folder)"
            )
        base = cls._class_of(config, folder).from_pretrained(name, revision=revision or config.revision, **options)
        _resize(base, folder)
        return PeftModel.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config=config, **mine
        )

    @classmethod
    def _class_of(cls, config: LoraConfig, folder: Path) -> Any:
        import transformers

        task = cls._task or config.task_type
        if task is not None:
            return getattr(transformers, AUTO_CLASS[task])
        found = config.auto_mapping or {}
        library, kind = found.get("parent_library"), found.get("base_model_class")
        # The file names code to import: only transformers' own.
        if isinstance(library, str) and library.partition(".")[0] == "transformers" and isinstance(kind, str):
            named = getattr(importlib.import_module(library), kind, None)
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                return named
        raise ConfigError(
            f"{folder}: task_type: the adapter says neither its task nor a model class of transformers; use "
            "AutoPeftModelForCausalLM or one of its sisters, or load the base yourself"
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """``AutoPeftModel`` for this task, even if the folder names another. So are its sisters."""

    _task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """See ``AutoPeftModelForCausalLM``."""

    _task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """See ``AutoPeftModelForCausalLM``."""

    _task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """See ``AutoPeftModelForCausalLM``."""

    _task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """See ``AutoPeftModelForCausalLM``."""

    _task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """See ``AutoPeftModelForCausalLM``."""

    _task = TaskType.FEATURE_EXTRACTION


def _resize(base: Any, folder: Path) -> None:
    """Give ``base`` the rows of embeddings that the adapter was trained with."""
    from loraloom.lora.embeddings import rows_in

    table = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    if table is None or not hasattr(base, "resize_token_embeddings"):
        return
    rows = table.weight.shape[0]
    wanted = rows_in(base, normalise(read_tensors(folder), LoadReport()))
    if wanted is None and (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        # A base may have more rows than tokens on purpose: those stay.
        wanted = max(rows, len(AutoTokenizer.from_pretrained(folder)))
    if wanted not in (None, rows):
        base.resize_token_embeddings(wanted)


def load_peft_weights(model_id: str | Path, device: str | None = None, **options: Any) -> dict[str, Tensor]:
    """The tensors of an adapter folder under PEFT's keys, on ``device`` (the CPU by default).

    Raises:
        AdapterError: no adapter, or a damaged or pickled one.
    """
    subfolder, mapping = options.pop("subfolder", None), options.pop("key_mapping", None)
    check_options(options)
    tensors = normalise(read_tensors(Path(model_id) / (subfolder or "")), LoadReport(), mapping)
    return {key: tensor.to(device or "cpu") for key, tensor in tensors.items()}


def get_peft_config(config_dict: Mapping[str, Any]) -> LoraConfig:
    """A config from a dictionary of its fields."""
    return LoraConfig.from_dict(config_dict)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put a new, active adapter into ``model`` in place, without a ``PeftModel`` around it, and return ``model``.

    ``get_peft_model_state_dict`` and ``set_peft_model_state_dict`` take the result. A second call adds another
    adapter, which is then the active one.
    """
    check_config(peft_config)
    if state_dict is not None:
        raise ConfigError("state_dict: loraloom takes the targets from the config alone; name them in target_modules")
    lora: LoraModel = vars(model).get("_loraloom") or LoraModel(model)
    lora.add_adapter(adapter_name, peft_config)
    # Past torch's registry: a model is no part of itself.
    vars(model).update(_loraloom=lora, peft_config=lora.peft_config)
    lora.set_adapter(adapter_name)
    return model


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Ready a quantised base for an adapter: frozen, what is in half precision in float32, checkpointing on.

    As in PEFT, parameters of float16 and bfloat16 (norms, embeddings, heads) are kept in float32 afterwards, quantised
    or not. Checkpointing is for models of transformers that say they are loaded in 4 or 8 bits, or quantised.
    ``auto_clear_cache`` gives CUDA back the memory of what was cast.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    for parameter in model.parameters():
        if parameter.dtype in HALF and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.to(torch.float32)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the casts let go of
    quantised = any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized"))
    if not (quantised and use_gradient_checkpointing):
        return model
    anything: Any = model
    if not hasattr(anything, "gradient_checkpointing_enable"):
        raise AdapterError(f"use_gradient_checkpointing: {type(model).__name__} has no gradient checkpointing")
    given = dict(gradient_checkpointing_kwargs or {})
    if given.get("use_reentrant", True) and hasattr(anything, "enable_input_require_grads"):
        anything.enable_input_require_grads()
    anything.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": given} if given else {}))
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | str | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """One adapter's tensors under PEFT's keys, detached; they share memory with the model.

    Args:
        model: a ``PeftModel``, compiled or not, or what ``inject_adapter_in_model`` returned, whose keys then lack
            ``base_model.model.``.
        state_dict: take the tensors from here, by the model's names for them, and not from the model. A string is
            taken for ``adapter_name``.
        save_embedding_layers: as for ``PeftModel.save_pretrained``.
    """
    (owner, lora), gathered = adapted(model), None
    if isinstance(state_dict, str):
        adapter_name = state_dict
    elif state_dict is not None:
        gathered = by_identity(owner, state_dict)
    tensors = checkpoint.to_write(lora, adapter_name, gathered, save_embedding_layers)
    start = "" if isinstance(owner, PeftModel) else PREFIX
    return {key.removeprefix(start): tensor.detach() for key, tensor in tensors.items()}


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model under the adapters by their names before any adapter; they share memory with it.

    Args:
        model: as for ``get_peft_model_state_dict``. While adapters are merged their updates are in the tensors.
    """
    state = unwrapped_state(adapted(model)[1].model, persistent=True)
    return {key: tensor.detach() for key, tensor in state.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: bool = True,
) -> LoadReport:
    """Copy tensors under PEFT's keys into an adapter that exists. Raises as ``PeftModel.load_adapter``."""
    check_options({"ignore_mismatched_sizes": ignore_mismatched_sizes})
    return checkpoint.fill(adapted(model)[1], adapter_name, peft_model_state_dict, strict=strict)
