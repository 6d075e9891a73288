"""Classifiers of transformers whose result depends on the end of the batch, and the padding that makes them correct."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.models.configs import field, has_decoder_and_encoder, token

Inputs = Mapping[str, Tensor]


def for_rows(config: Any) -> Callable[[Inputs], Inputs] | None:
    """How to change a right-padded batch so that each row is classified as in a batch of its own.

    None for nearly all models, which find a row's last token by themselves.
    """
    kind = field(config, "model_type", "")
    if kind == "xlnet" and field(config, "summary_type") == "last":
        return to_the_right
    if kind in ("t5gemma", "t5gemma2") and has_decoder_and_encoder(config):
        pad = token(config, "pad") or 0
        return lambda inputs: one_more(inputs, pad)
    return None


def to_the_right(inputs: Inputs) -> Inputs:
    """Left padding, for a model that classifies by the last position. Each tensor is [rows, length]."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs
    width = mask.shape[1]
    by = width - mask.sum(1, keepdim=True)
    place = (torch.arange(width, device=mask.device) - by) % width
    return {name: tensor.gather(1, place) if tensor.shape == mask.shape else tensor for name, tensor in inputs.items()}


def one_more(inputs: Inputs, pad: int) -> Inputs:
    """One position of padding after the longest row, for a decoder that would otherwise drop the row's last token."""
    ids = inputs["input_ids"]
    out = dict(inputs)
    out.setdefault("attention_mask", torch.ones_like(ids))
    fillers = {"input_ids": pad}
    return {
        name: F.pad(tensor, (0, 1), value=fillers.get(name, 0)) if tensor.shape == ids.shape else tensor
        for name, tensor in out.items()
    }
