"""Gradient checkpointing: a layer stores only its input and recomputes the rest in the backward.

transformers' layers do it only in training mode. The frozen model runs as at inference, so only these layers are put
into training mode, with their own dropout at zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from loraloom.errors import ModelError
from loraloom.lora.model import PeftModel


def enable(model: PeftModel) -> None:
    """Turn gradient checkpointing on in the layers of ``model``. ``train_adapters`` sets their mode at each step.

    Raises:
        ModelError: the model's layers do not support it.
    """
    base: Any = model.get_base_model()
    # JetMoE's layers have the class that supports it, but transformers refuses the model.
    if not any(repeated(base)) or not getattr(base, "supports_gradient_checkpointing", True):
        raise ModelError(f"gradient_checkpointing: the layers of {type(base).__name__} do not support it; leave it out")
    # transformers renamed the method; both take the same argument.
    switch = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    switch({"use_reentrant": False})
    for layer in repeated(base):
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):  # applied by a function that reads the layer's mode
                setattr(layer, name, 0.0)


def recomputed(model: nn.Module) -> list[nn.Module]:
    """The layers with gradient checkpointing turned on."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return []
    return [layer for layer in repeated(model) if layer.gradient_checkpointing]


def repeated(model: nn.Module) -> Iterator[Any]:
    """The layers that support gradient checkpointing."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
