"""``PeftModel`` and ``get_peft_model``: the public face, with PEFT's names, over ``LoraModel`` and ``checkpoint``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import Tensor, nn

from loraloom.config.lora import LoraConfig, PeftType, TaskType
from loraloom.config.peft_compat import SeenAsPeft
from loraloom.errors import AdapterError, ConfigError
from loraloom.lora import checkpoint, mixed, status, trainer_compat
from loraloom.lora.adapters import LoraModel
from loraloom.lora.keys import LoadReport, file_key
from loraloom.lora.peft_options import SAVING, check_config, check_options
from loraloom.lora.routed import EARLIER
from loraloom.lora.selection import is_all_linear

P = ParamSpec("P")
R = TypeVar("R")
#: What PEFT's model has beside this.
NOT_YET = (
    *("add_weighted_adapter", "create_or_update_model_card", "inject_adapter", "subtract_mutated_init"),
    *("prepare_model_for_gradient_checkpointing", "supports_lora_conversion"),
)
#: Attributes of LoraModel that PEFT's does not have.
NOT_OF_PEFT = ("check_same", "following", "lora_unreadable", "parameters_of", "tensors_of", "thaw")


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    seed: int | None = None,
    strict: bool = True,
) -> PeftModel:
    """Freeze ``model``, put a new adapter on it, and make that adapter active.

    ``model`` is wrapped in place and not copied; ``peft_config`` is copied and never changed.

    Args:
        model: any ``torch.nn.Module``.
        seed: of the initialisation; by default it follows from ``adapter_name``, never from the global generator.
        strict: a pattern that matches nothing is an error.
        autocast_adapter_dtype: keep factors in float32 where the base is float16 or bfloat16.
        revision: of the base model, recorded in the config.
        low_cpu_mem_usage, mixed: PEFT's; the first has no work to do here, and the second must be False.

    Raises:
        ConfigError: ``model`` carries adapters already; ``peft_config`` is no ``LoraConfig``, or of another revision.
        TargetError: a pattern matches nothing; the message names the closest. ``model`` is as it was.
    """
    if isinstance(model, PeftModel):
        raise ConfigError("model: it is a PeftModel already; call add_adapter on it")
    check_options({"mixed": mixed})
    check_config(peft_config)
    if revision is not None:
        if peft_config.revision not in (None, revision):
            raise ConfigError(
                f"revision: the config says {peft_config.revision!r}, found {revision!r}; give one of them"
            )
        peft_config = peft_config.copy(revision=revision)
    peft = class_for_task(peft_config.task_type)(model)
    peft.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype, seed=seed, strict=strict)
    peft.set_adapter(adapter_name)
    return peft


def _delegated(method: Callable[Concatenate[LoraModel, P], R]) -> Callable[Concatenate[PeftModel, P], R]:
    """A method of ``LoraModel`` as one of ``PeftModel``."""

    def call(self: PeftModel, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(self.base_model, *args, **kwargs)

    return update_wrapper(call, method)


class PeftModel(SeenAsPeft, nn.Module):
    """A frozen model with adapters. Attributes that it lacks are looked up in the model underneath."""

    #: this class and the model's, of which ``trainer_compat`` made the class of this object
    made_of: tuple[type[nn.Module], type[nn.Module]]
    peft_type = PeftType.LORA
    peft_class = ("peft", "")  # the one for its task

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """``get_peft_model`` is this and more checks. Without a config the model has no adapter yet."""
        super().__init__()
        self.base_model = LoraModel(model)
        self.training = model.training
        self.__class__ = trainer_compat.class_for(type(self), type(model))
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
            self.set_adapter(adapter_name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (trainer_compat.blank, self.made_of, *super().__reduce_ex__(max(protocol, 2))[2:])

    def _get_name(self) -> str:
        return type(self.get_base_model()).__name__  # by which the Trainer knows whose labels to shift

    def __repr__(self) -> str:
        return self.made_of[0].__name__ + super().__repr__().removeprefix(self._get_name())

    # -- calling --------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own forward. ``adapter_names`` gives one adapter for each row, ``"__base__"`` for none."""
        if adapter_names is not None:
            return mixed.call(self.base_model, self.base_model, adapter_names, args, kwargs)
        with self.base_model.lora_routed(None):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        generate: Any = self.get_base_model().generate
        if adapter_names is not None:
            return mixed.generate(self.base_model, generate, adapter_names, args, kwargs)
        with self.base_model.lora_routed(None):
            return generate(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """The model underneath, with the adapters still in it; ``unload()`` takes them out."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
        if name in NOT_YET:  # some of which the model underneath has too, for itself
            raise AttributeError(f"PeftModel has no {name!r} yet; docs/coming-from-peft.md says what to do without it")
        try:
            return getattr(self._looked_up_in(name), name)
        except AttributeError:
            inside = type(self.get_base_model()).__name__
            raise AttributeError(f"PeftModel has no attribute {name!r}, nor has its {inside}") from None

    def _looked_up_in(self, name: str) -> nn.Module:
        """LoraModel for what PEFT's has too. What is ours alone hides nothing of the model underneath."""
        inside = self.get_base_model()
        ours = name.startswith("_") or name in NOT_OF_PEFT
        return inside if name in EARLIER or (ours and hasattr(inside, name)) else self.base_model

    # -- the life of adapters: see LoraModel ----------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        return self.base_model.peft_config

    @property
    def active_adapter(self) -> str | list[str]:
        return self.base_model.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the first active adapter."""
        if not self.active_adapters:
            raise AdapterError("active_peft_config: no adapter is active; call set_adapter first")
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self.base_model.lora_enabled and bool(self.active_adapters)

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names under which adapters train modules in full."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> Any:
        """What the model underneath calls its dtype."""
        return getattr(self.get_base_model(), "dtype", None)

    get_layer_status, get_model_status = status.get_layer_status, status.get_model_status
    set_adapter = _delegated(LoraModel.set_adapter)
    delete_adapter = _delegated(LoraModel.delete_adapter)
    set_requires_grad = _delegated(LoraModel.set_requires_grad)
    disable_adapter = _delegated(LoraModel.disable_adapter)
    adapter_parameters = _delegated(LoraModel.parameters_of)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        seed: int | None = None,
        strict: bool = True,
    ) -> None:
        """Add a new adapter beside the others; it is trainable, and inactive until ``set_adapter``.

        The options are those of ``get_peft_model``.
        """
        check_config(peft_config)
        if peft_config.base_model_name_or_path is None:
            peft_config = peft_config.copy(base_model_name_or_path=_name_of(self.get_base_model()))
        made = self.base_model.add_adapter(
            adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype, seed=seed, strict=strict
        )
        if made.experts.names and is_all_linear(peft_config.target_modules):
            warnings.warn(
                f"target_modules: all-linear leaves {made.experts} as they are, because no layer calls them; "
                f"target_parameters={list(made.experts.names)} adapts them",
                stacklevel=3,
            )

    # -- counting -------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(parameters that require gradients, all parameters), each counted once."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # -- files: see checkpoint ------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        peft: bool = True,
        **options: Any,
    ) -> None:
        """Write adapters as PEFT does: "default" at the top of the folder, others in folders of their names.

        Atomic: after a crash or on a full disk the folder holds the adapters from before, or the new ones.

        Args:
            save_embedding_layers: True adds the base's input and output embeddings to the file, which loading puts
                into the base. "auto" does so where the vocabulary has another size than that of the base on disk.
            state_dict: the tensors under this model's names where they were gathered from several devices.
            peft: False writes also what PEFT would read otherwise, into a folder that loraloom alone reads.
            options: those of transformers' and accelerate's saving that change nothing here, such as
                ``save_function``.

        Raises:
            SaveError: the folder cannot be written, or PEFT would read it otherwise. What was there is still there.
            ConfigError: an option that cannot be honoured; ``safe_serialization=False`` (pickle) among them.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization: loraloom writes no pickle; leave it at True")
        asked = {"path_initial_model_for_weight_conversion": path_initial_model_for_weight_conversion, **options}
        check_options(asked, SAVING)
        if is_main_process:
            gathered = None if state_dict is None else by_identity(self, state_dict)
            checkpoint.save(self.base_model, save_directory, selected_adapters, gathered, save_embedding_layers, peft)

    def push_to_hub(self, *args: Any, **options: Any) -> None:
        check_options({"push_to_hub": True})

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        **options: Any,
    ) -> PeftModel:
        """Put the adapter of a folder on ``model`` and make it active.

        Made for inference: the adapter is frozen unless ``is_trainable``. ``model``'s train or eval mode stays.
        The report of what was loaded is ``load_report`` of the result. Options are those of ``load_adapter``.

        Raises:
            AdapterError: as ``load_adapter``. ``model`` is as it was.
        """
        if isinstance(model, PeftModel):
            raise ConfigError("model: it is a PeftModel already; call load_adapter on it")
        peft = cls(model)
        report = peft.load_adapter(model_id, adapter_name, is_trainable, config=config, **options)
        peft.set_adapter(adapter_name)
        if cls is PeftModel:  # which class it is the folder says
            peft.__class__ = trainer_compat.class_for(class_for_task(peft.active_peft_config.task_type), type(model))
        object.__setattr__(peft, "load_report", report)
        return peft

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        *,
        key_mapping: Mapping[str, str] | None = None,
        config: LoraConfig | None = None,
        strict: bool = True,
        subfolder: str | None = None,
        **options: Any,
    ) -> LoadReport:
        """Load an adapter folder beside the others and say what was loaded. It is inactive until ``set_adapter``.

        Where ``adapter_name`` exists already, its tensors take the folder's numbers and stay the same objects; the
        folder must hold an adapter of the same targets, ranks and scales. ``requires_grad`` and dropout stay.

        Args:
            key_mapping: regular expression → replacement for keys of the file without ``base_model.model.``; the first
                that matches counts.
            subfolder: of ``model_id``, where the adapter lies.
            options: PEFT's other options. What it only needs to download or to save memory (``torch_device``,
                ``low_cpu_mem_usage``, ``token``, ...) has no work to do here: factors lie where their layer lies.

        Raises:
            ConfigError: an option that cannot be honoured.
            AdapterError: the folder is no adapter, is damaged or pickled, or does not fit this model: a tensor is
                missing, unexpected, of another shape or not finite. Nothing was changed. With ``strict=False``
                missing tensors are initialised, unexpected ones left out, and the report tells.
        """
        check_options(options)
        if config is not None:
            check_config(config)
        return checkpoint.load(
            self.base_model,
            Path(model_id) / (subfolder or ""),
            adapter_name,
            key_mapping=key_mapping,
            config=config,
            is_trainable=is_trainable,
            strict=strict,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )


class PeftModelForCausalLM(PeftModel):
    """PEFT's name for a model of this task. It does what every ``PeftModel`` does, as do its sisters."""


class PeftModelForSeq2SeqLM(PeftModel):
    """See ``PeftModelForCausalLM``."""


class PeftModelForSequenceClassification(PeftModel):
    """See ``PeftModelForCausalLM``."""


class PeftModelForTokenClassification(PeftModel):
    """See ``PeftModelForCausalLM``."""


class PeftModelForQuestionAnswering(PeftModel):
    """See ``PeftModelForCausalLM``."""


class PeftModelForFeatureExtraction(PeftModel):
    """See ``PeftModelForCausalLM``."""


_CLASSES: dict[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def class_for_task(task_type: TaskType | None) -> type[PeftModel]:
    """The class that PEFT gives a model of this task."""
    return PeftModel if task_type is None else _CLASSES[task_type]


def by_identity(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """``id`` of a tensor of ``model`` → the tensor under its name in ``state_dict``, in wrappers of FSDP or not."""
    given = {file_key(name): tensor for name, tensor in state_dict.items()}
    # The method of the class: some put one on the model that calls the function which calls this.
    mine = type(model).state_dict(model, keep_vars=True)
    return {id(tensor): given[key] for name, tensor in mine.items() if (key := file_key(name)) in given}


def _name_of(model: nn.Module) -> str | None:
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None
