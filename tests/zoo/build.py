"""A small model of a type and kind, with numbers large enough that an adapter shows."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from zoo.fields import FIELDS, GAIN
from zoo.inputs import FIRST
from zoo.kinds import class_name
from zoo.shrink import shrunken


def config_of(model_type: str) -> Any:
    from transformers import AutoConfig

    config = shrunken(AutoConfig.for_model(model_type), FIELDS.get(model_type, {}))
    for one in _all_configs(config):
        if getattr(one, "is_encoder_decoder", False) and getattr(one, "decoder_start_token_id", None) is None:
            one.decoder_start_token_id = 0
        if getattr(one, "pad_token_id", None) is None or not 0 <= one.pad_token_id < FIRST:
            one.pad_token_id = 0
    return config


def _all_configs(config: Any) -> list[Any]:
    inner = [v for v in vars(config).values() if hasattr(v, "model_type") and hasattr(v, "to_dict")]
    return [config, *(one for v in inner for one in _all_configs(v))]


def build(model_type: str, kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Always the same numbers for the same type and kind, in eval mode."""
    import transformers

    name = class_name(model_type, kind)
    assert name is not None, (model_type, kind)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls = getattr(transformers, name)
        config = config_of(model_type)
        parts = [one for one in _all_configs(config) if type(one) is cls.config_class]
        if parts:  # the text part of a model of several, as AutoModel does it
            config = parts[0]
        for name in ("is_decoder", "causal"):  # otherwise it sees the tokens that it predicts, and a pack refuses it
            if kind == "causal" and getattr(config, name, None) is False and not config.is_encoder_decoder:
                setattr(config, name, True)
        if dtype is torch.float64:  # the grouped product has no float64
            for one in _all_configs(config):
                one._experts_implementation = "eager"
        model = cls(config)
    if getattr(model, "generation_config", None) is not None and model.generation_config.bos_token_id is None:
        model.generation_config.bos_token_id = 1
    if getattr(model, "generation_config", None) is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = 0
    model = model.to(dtype).eval()
    enlarge(model, GAIN.get(model_type, 1.0))
    return model


def enlarge(model: nn.Module, gain: float = 1.0) -> None:
    """Weights that keep the size of what passes through, biases and norms off 0 and 1, where mistakes would hide."""
    source = torch.Generator().manual_seed(1)
    done: set[int] = set()

    def normal(parameter: torch.Tensor, deviation: float) -> torch.Tensor:
        return (torch.randn(parameter.shape, generator=source, dtype=torch.float64) * deviation).to(parameter.dtype)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or id(parameter) in done or not parameter.is_floating_point():
                    continue
                done.add(id(parameter))
                if isinstance(module, nn.Embedding):
                    if parameter.requires_grad:
                        parameter.copy_(normal(parameter, 1.0))
                        if module.padding_idx is not None:
                            parameter[module.padding_idx] = 0
                elif parameter.dim() == 1 and name in ("weight", "bias"):
                    parameter.add_(normal(parameter, 0.05))
                elif name == "weight" and parameter.dim() >= 2:
                    parameter.copy_(normal(parameter, gain * parameter[0].numel() ** -0.5))
                elif parameter.numel() < 4096 and parameter.abs().max() < 0.01:  # a scale that starts at nothing
                    parameter.add_(normal(parameter, 0.5))
                elif parameter.dim() == 3 and min(parameter.shape[1:]) > 4:  # experts
                    parameter.copy_(normal(parameter, max(parameter.shape[1:]) ** -0.5))
