"""``PeftModel`` and ``get_peft_model``: the public face, with PEFT's names, over ``LoraModel`` and ``checkpoint``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loraloom.config import LoraConfig
from loraloom.errors import AdapterError, ConfigError
from loraloom.lora import checkpoint, guise
from loraloom.lora.adapters import LoraModel
from loraloom.lora.checkpoint import LoadReport


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
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

    Raises:
        ConfigError: ``model`` carries adapters already, or ``peft_config`` is no ``LoraConfig``.
        TargetError: a pattern matches nothing; the message names the closest. ``model`` is as it was.
    """
    if isinstance(model, PeftModel):
        raise ConfigError("model: it is a PeftModel already; call add_adapter on it")
    peft = PeftModel(model)
    try:
        peft.add_adapter(
            adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype, seed=seed, strict=strict
        )
    except Exception:
        peft.base_model.thaw()
        raise
    peft.set_adapter(adapter_name)
    return peft


class PeftModel(nn.Module):
    """A frozen model with adapters. Attributes that it lacks are looked up in the model underneath."""

    #: this class and the model's, of which ``guise`` made the class of this object
    made_of: tuple[type[nn.Module], type[nn.Module]]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = LoraModel(model)
        self.training = model.training
        self.__class__ = guise.class_for(type(self), type(model))

    # -- what others see: see guise -------------------------------------------------------------------------------

    @property
    def __class__(self) -> type:
        return guise.seen_as(type(self))

    @__class__.setter
    def __class__(self, cls: type) -> None:  # also how FSDP2 marks a module
        object.__dict__["__class__"].__set__(self, cls)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return (guise.blank, self.made_of, *super().__reduce_ex__(max(protocol, 2))[2:])

    def _get_name(self) -> str:
        return type(self.get_base_model()).__name__  # by which the Trainer knows whose labels to shift

    def __repr__(self) -> str:
        return PeftModel.__name__ + super().__repr__().removeprefix(self._get_name())

    # -- calling --------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own forward. ``adapter_names`` gives one adapter for each row, ``"__base__"`` for none."""
        with self.base_model.routed(adapter_names):
            if adapter_names is not None:
                _check_rows(len(adapter_names), (*args, *kwargs.values()))
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        with self.base_model.routed(adapter_names):
            if adapter_names is not None:
                _check_rows(len(adapter_names), (*args, *kwargs.values()))
            return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def get_base_model(self) -> nn.Module:
        """The model underneath, with the adapters still in it; ``unload()`` takes them out."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

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
        return self.peft_config[self.active_adapters[0]]

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig, **options: Any) -> None:
        """Add a new adapter beside the others; it is trainable, and inactive until ``set_adapter``.

        ``options``: ``seed``, ``strict``, ``autocast_adapter_dtype`` as in ``get_peft_model``.
        """
        if not isinstance(peft_config, LoraConfig):
            raise ConfigError(f"peft_config: must be a loraloom.LoraConfig, found {type(peft_config).__name__}")
        if peft_config.base_model_name_or_path is None:
            peft_config = peft_config.copy(base_model_name_or_path=_name_of(self.get_base_model()))
        self.base_model.add_adapter(adapter_name, peft_config, **options)

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
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **unused: Any,
    ) -> None:
        """Write adapters as PEFT does: "default" at the top of the folder, others in folders of their names.

        Atomic: after a crash or on a full disk the folder holds the adapters from before, or the new ones.
        ``state_dict`` holds the tensors under this model's names where they were gathered from several devices.

        Raises:
            SaveError: the folder cannot be written. What was there is still there.
            ConfigError: an option that loraloom does not have; ``safe_serialization=False`` (pickle) among them.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization: loraloom writes no pickle; leave it at True")
        # PEFT's knobs about copies of the base's embeddings, which an adapter of ours never needs.
        unknown = set(unused) - {"save_embedding_layers", "path_initial_model_for_weight_conversion"}
        if unknown or unused.get("path_initial_model_for_weight_conversion"):
            raise ConfigError(f"save_pretrained: unknown option {sorted(unknown or unused)[0]!r}")
        if is_main_process:
            gathered = None if state_dict is None else self._by_identity(state_dict)
            checkpoint.save(self.base_model, save_directory, selected_adapters, gathered)

    def _by_identity(self, state_dict: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """``id`` of a tensor of this model → the tensor under its name in ``state_dict``."""
        mine = self.state_dict(keep_vars=True)
        return {id(tensor): state_dict[name] for name, tensor in mine.items() if name in state_dict}

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        *,
        strict: bool = True,
        autocast_adapter_dtype: bool = True,
    ) -> PeftModel:
        """Put the adapter of a folder on ``model`` and make it active.

        Made for inference: the adapter is frozen unless ``is_trainable``. ``model``'s train or eval mode stays.
        The report of what was loaded is ``load_report`` of the result.

        Raises:
            AdapterError: as ``load_adapter``. ``model`` is as it was.
        """
        if isinstance(model, PeftModel):
            raise ConfigError("model: it is a PeftModel already; call load_adapter on it")
        peft = cls(model)
        try:
            report = peft.load_adapter(
                model_id,
                adapter_name,
                is_trainable,
                config=config,
                strict=strict,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
        except Exception:
            peft.base_model.thaw()
            raise
        peft.set_adapter(adapter_name)
        object.__setattr__(peft, "load_report", report)
        return peft

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        config: LoraConfig | None = None,
        strict: bool = True,
        autocast_adapter_dtype: bool = True,
    ) -> LoadReport:
        """Load an adapter folder beside the others and say what was loaded. It is inactive until ``set_adapter``.

        Where ``adapter_name`` exists already, its tensors take the folder's numbers and stay the same objects; the
        folder must hold an adapter of the same targets, ranks and scales. ``requires_grad`` and dropout stay.

        Raises:
            AdapterError: the folder is no adapter, is damaged or pickled, or does not fit this model: a tensor is
                missing, unexpected, of another shape or not finite. Nothing was changed. With ``strict=False``
                missing tensors are initialised, unexpected ones left out, and the report tells.
        """
        return checkpoint.load(
            self.base_model,
            model_id,
            adapter_name,
            config=config,
            is_trainable=is_trainable,
            strict=strict,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )


def get_peft_model_state_dict(model: PeftModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """One adapter's tensors under PEFT's keys, detached; they share memory with the model."""
    return {key: tensor.detach() for key, tensor in model.base_model.tensors_of(adapter_name).items()}


def set_peft_model_state_dict(
    model: PeftModel, state_dict: Mapping[str, Tensor], adapter_name: str = "default", *, strict: bool = True
) -> LoadReport:
    """Copy tensors under PEFT's keys into an adapter that exists. Raises as ``PeftModel.load_adapter``."""
    return checkpoint.fill(model.base_model, adapter_name, state_dict, strict=strict)


def _check_rows(names: int, inputs: Iterable[Any]) -> None:
    """One input at least must have a row, or some consecutive ones, for each name.

    Others may be broadcast over the batch, like position ids. Layers check again what they see, but only where rows
    differ.
    """
    rows = [tensor.shape[0] for tensor in inputs if isinstance(tensor, Tensor) and tensor.dim()]
    if rows and not any(count and count % names == 0 for count in rows):
        raise AdapterError(f"adapter_names: {names} names for a batch of {rows[0]} rows; give one name for each row")


def _name_of(model: nn.Module) -> str | None:
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None
