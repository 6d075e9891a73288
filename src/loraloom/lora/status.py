"""Which adapters are where, active, merged, trained, and on which device: PEFT's ``get_layer_status`` and its sum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from loraloom.errors import ConfigError
from loraloom.lora.adapters import LoraModel
from loraloom.lora.injection import Wrapper
from loraloom.lora.layer import LoraLayer
from loraloom.lora.layers import LoraConv, LoraConv1D, LoraLinear
from loraloom.lora.modules_to_save import ModulesToSaveWrapper

Some = bool | Literal["irregular"]  # "irregular": it differs from part to part


@dataclass
class TunerLayerStatus:
    """One adapted layer, or one module of which adapters have copies. Fields are PEFT's."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Some]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The same over all of a model. Fields are PEFT's."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: Some
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, Some]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def get_layer_status(model: Any) -> list[TunerLayerStatus]:
    """A line for each adapted layer, in the order of the model.

    Args:
        model: a ``PeftModel``, or what ``inject_adapter_in_model`` returned.

    Raises:
        ConfigError: it is neither.
    """
    owner, lora = adapted(model)
    out = []
    for name, module in (owner if _is_injected(owner) else lora).named_modules():
        if not isinstance(module, Wrapper):
            continue
        tensors = {slot: module.tensors(slot).values() for slot in module.slots}
        slots = {slot: [t for t in each if isinstance(t, nn.Parameter)] for slot, each in tensors.items()}
        out.append(
            TunerLayerStatus(
                name,
                _type(module, lora),
                lora.lora_enabled,
                lora.active_adapters,
                [slot for slot in lora.merged_adapters if slot in slots],
                {slot: _some(p.requires_grad for p in parameters) for slot, parameters in slots.items()},
                sorted(slots),
                {slot: sorted({p.device.type for p in parameters}) for slot, parameters in slots.items()},
            )
        )
    return out


def get_model_status(model: Any) -> TunerModelStatus:
    """One line for a whole model; takes and raises what ``get_layer_status`` does."""
    owner, lora = adapted(model)
    layers = get_layer_status(model)
    counts = [(p.numel(), p.requires_grad) for p in owner.parameters()]
    names = sorted({slot for layer in layers for slot in layer.available_adapters})
    return TunerModelStatus(
        type(lora.model).__name__,
        "None" if _is_injected(owner) else type(lora).__name__,
        {name: config.peft_type for name, config in lora.peft_config.items()},
        sum(count for count, trainable in counts if trainable),
        sum(count for count, _ in counts),
        len(layers),
        lora.lora_enabled,
        lora.active_adapters,
        lora.merged_adapters,
        {name: _some(layer.requires_grad[name] for layer in layers if name in layer.requires_grad) for name in names},
        names,
        {name: sorted({d for layer in layers for d in layer.devices.get(name, ())}) for name in names},
    )


def adapted(model: Any) -> tuple[nn.Module, LoraModel]:
    """``model`` without what torch.compile, FSDP and DDP put around it, and the holder of its adapters.

    Args:
        model: a ``PeftModel``, or what ``inject_adapter_in_model`` returned.

    Raises:
        ConfigError: it is neither.
    """
    found = model
    while found is not None:
        inside = vars(found).get("_modules", {})
        held = found if isinstance(found, LoraModel) else vars(found).get("_loraloom") or inside.get("base_model")
        if isinstance(held, LoraModel):
            return found, held
        found = inside.get("_orig_mod") or inside.get("_fsdp_wrapped_module") or inside.get("module")
    raise ConfigError(
        f"model: No adapter layers found in the model, a {type(model).__name__}; give the PeftModel, or what "
        "inject_adapter_in_model returned"
    )


def _is_injected(owner: nn.Module) -> bool:
    """Whether its adapters have no ``PeftModel`` around them, and are named by its own modules."""
    return "_loraloom" in vars(owner)


def _some(values: Iterable[Some]) -> Some:
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"


def _type(module: nn.Module, lora: LoraModel) -> str:
    """PEFT's name for it."""
    if isinstance(module, ModulesToSaveWrapper):
        return "ModulesToSaveWrapper"
    assert isinstance(module, LoraLayer)
    if isinstance(module, LoraConv):
        return f"lora.{type(module.base_layer).__name__}"
    if lora.lora_parameter_of(module) is not None:
        return "lora.ParamWrapper"
    return f"lora.{LoraLinear.kind if isinstance(module, LoraConv1D) else module.kind}"
