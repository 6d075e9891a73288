"""``PeftModel`` and ``get_peft_model``: the public face, with PEFT's names, over ``LoraModel`` and ``checkpoint``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loraloom.config.lora import LoraConfig, PeftType, TaskType
from loraloom.config.peft_compat import seen_as
from loraloom.config.peft_file import HARMLESS, HUB_ONLY
from loraloom.errors import AdapterError, ConfigError, nearest
from loraloom.lora import checkpoint, mixed, status, trainer_compat
from loraloom.lora.adapters import EARLIER, LoraModel
from loraloom.lora.file_keys import PREFIX, file_key
from loraloom.lora.loadreport import LoadReport
from loraloom.lora.modules_to_save import unwrapped_state
from loraloom.lora.status import TunerLayerStatus, TunerModelStatus
from loraloom.lora.targets import ALL_LINEAR

#: What PEFT's model has beside this.
NOT_YET = (
    "add_weighted_adapter",
    "create_or_update_model_card",
    "inject_adapter",
    "prepare_model_for_gradient_checkpointing",
    "subtract_mutated_init",
    "supports_lora_conversion",
)
#: Attributes of LoraModel that PEFT's does not have.
NOT_OF_PEFT = ("check_same", "lora_unreadable", "parameters_of", "tensors_of", "thaw")
#: Options of saving that change nothing here: accelerate's and the hub's.
_OF_SAVING = (
    "create_pr", "commit_message", "is_main_process", "max_shard_size", "private", "save_function", "token", "variant"
)  # fmt: skip


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
    check_options(mixed)
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


class PeftModel(nn.Module):
    """A frozen model with adapters. Attributes that it lacks are looked up in the model underneath."""

    #: this class and the model's, of which ``guise`` made the class of this object
    made_of: tuple[type[nn.Module], type[nn.Module]]

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

    # -- what others see: see guise -------------------------------------------------------------------------------

    @property
    def __class__(self) -> type:
        return seen_as(type(self))

    @__class__.setter
    def __class__(self, cls: type) -> None:  # also how FSDP2 marks a module
        object.__dict__["__class__"].__set__(self, cls)

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
    def peft_type(self) -> PeftType:
        return PeftType.LORA

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

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return status.get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        return status.get_model_status(self)

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
        wanted = peft_config.target_modules
        if made.experts.names and isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
            warnings.warn(
                f"target_modules: all-linear leaves {made.experts} as they are, because no layer calls them; "
                f"target_parameters={list(made.experts.names)} adapts them",
                stacklevel=3,
            )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        with self.base_model.disable_adapter():
            yield

    def adapter_parameters(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """Every trainable tensor of one adapter (factors, heads, biases) by its key, tied ones once."""
        return self.base_model.parameters_of(adapter_name)

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
        if path_initial_model_for_weight_conversion:
            raise ConfigError(
                "path_initial_model_for_weight_conversion: loraloom has no start that rewrites the base, so there is "
                "nothing to convert; leave it out"
            )
        for name, value in options.items():
            if name == "push_to_hub" and value:
                raise ConfigError("push_to_hub: loraloom opens no connection; upload the folder with `hf upload`")
            if name not in (*_OF_SAVING, "push_to_hub"):
                raise ConfigError(f"save_pretrained: unknown option {name!r}{nearest(name, _OF_SAVING)}")
        if is_main_process:
            gathered = None if state_dict is None else _by_identity(self, state_dict)
            checkpoint.save(self.base_model, save_directory, selected_adapters, gathered, save_embedding_layers, peft)

    def push_to_hub(self, *args: Any, **options: Any) -> None:
        raise ConfigError("push_to_hub: loraloom opens no connection; save_pretrained, and upload the folder with `hf`")

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        strict: bool = True,
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
        report = peft.load_adapter(
            model_id,
            adapter_name,
            is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            key_mapping=key_mapping,
            config=config,
            strict=strict,
            **options,
        )
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
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
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
        check_options(ephemeral_gpu_offload=ephemeral_gpu_offload, **options)
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
    (owner, lora), gathered = _unwrapped(model), None
    if isinstance(state_dict, str):
        adapter_name = state_dict
    elif state_dict is not None:
        gathered = _by_identity(owner, state_dict)
    tensors = checkpoint.to_write(lora, adapter_name, gathered, save_embedding_layers)
    start = "" if isinstance(owner, PeftModel) else PREFIX
    return {key.removeprefix(start): tensor.detach() for key, tensor in tensors.items()}


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model under the adapters by their names before any adapter; they share memory with it.

    Args:
        model: as for ``get_peft_model_state_dict``. While adapters are merged their updates are in the tensors.
    """
    state = unwrapped_state(_unwrapped(model)[1].model, persistent=True)
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
    check_options(ignore_mismatched_sizes=ignore_mismatched_sizes, low_cpu_mem_usage=low_cpu_mem_usage)
    return checkpoint.fill(_unwrapped(model)[1], adapter_name, peft_model_state_dict, strict=strict)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, LoraModel]:
    """The model whose state dict has the adapters, and what holds them: see ``inject_adapter_in_model``."""
    found: Any = model
    while not isinstance(found, PeftModel) and "_loraloom" not in vars(found):
        inside = found._modules.get("_orig_mod") or found._modules.get("_fsdp_wrapped_module")
        inside = inside or found._modules.get("module")  # DistributedDataParallel, DeepSpeed
        if inside is None:
            break
        found = inside
    lora = found.base_model if isinstance(found, PeftModel) else vars(found).get("_loraloom")
    if not isinstance(lora, LoraModel):
        raise ConfigError(f"model: must be a loraloom.PeftModel, found {type(found).__name__}")
    return found, lora


def _by_identity(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """``id`` of a tensor of ``model`` → the tensor under its name in ``state_dict``, in wrappers of FSDP or not."""
    given = {file_key(name): tensor for name, tensor in state_dict.items()}
    # The method of the class: some put one on the model that calls the function which calls this.
    mine = type(model).state_dict(model, keep_vars=True)
    return {id(tensor): given[key] for name, tensor in mine.items() if (key := file_key(name)) in given}


def check_config(config: object) -> None:
    """Whether it is a config of loraloom."""
    if isinstance(config, LoraConfig):
        return
    kind = type(config)
    if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
        raise ConfigError(
            f"peft_config: must be loraloom's LoraConfig, found {kind.__module__.partition('.')[0]}'s {kind.__name__}; "
            "LoraConfig.from_dict(theirs.to_dict()) makes one of it"
        )
    raise ConfigError(f"peft_config: must be a loraloom.LoraConfig, found {kind.__name__}")


def check_options(mixed: object = False, ephemeral_gpu_offload: object = False, **options: object) -> None:
    """PEFT's options: those that change nothing here pass, the rest are errors."""
    if mixed:
        raise ConfigError("mixed: loraloom has LoRA alone, so there is nothing to mix; leave it out")
    if ephemeral_gpu_offload:
        raise ConfigError("ephemeral_gpu_offload: only DoRA uses it, which loraloom does not have; leave it out")
    for name, value in options.items():
        if name in HUB_ONLY and value:
            raise ConfigError(
                f"{name}: chooses among files of a hub, and loraloom reads folders alone; fetch that one into a folder"
            )
        if name == "ignore_mismatched_sizes" and value:
            raise ConfigError(f"{name}: a tensor of another shape cannot be used; leave it out")
        if name not in {*HUB_ONLY, *HARMLESS, "ignore_mismatched_sizes"}:
            known = ["key_mapping", "subfolder", "strict", "config", *HARMLESS]
            raise ConfigError(f"{name}: loraloom has no such option{nearest(name, known)}")


def _name_of(model: nn.Module) -> str | None:
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None
