"""Gradient checkpointing: a layer keeps its input alone and computes the rest again in the backward.

transformers' layers do it when they are asked to and in training mode. The frozen model runs as it does in use, so that
mode is set on those layers alone, which draw no dropout of their own then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from loraloom.errors import ModelError
from loraloom.lora.model import PeftModel


def enable(model: PeftModel) -> None:
    """Let the layers of ``model`` compute again instead of keeping. ``train_adapters`` does its part at each step.

    Raises:
        ModelError: the model's layers cannot.
    """
    base: Any = model.get_base_model()
    # JetMoE's layers are of the kind that could, and transformers refuses the model all the same.
    if not any(repeated(base)) or not getattr(base, "supports_gradient_checkpointing", True):
        raise ModelError(
            f"gradient_checkpointing: the layers of {type(base).__name__} cannot compute again; leave it out"
        )
    # transformers renamed it; both know the same argument.
    switch = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    switch({"use_reentrant": False})
    for layer in repeated(base):
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):  # drawn by a function that looks at the layer's mode
                setattr(layer, name, 0.0)


def recomputed(model: nn.Module) -> list[nn.Module]:
    """The layers for which it is on."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return []
    return [layer for layer in repeated(model) if layer.gradient_checkpointing]


def repeated(model: nn.Module) -> Iterator[Any]:
    """The layers that could."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
