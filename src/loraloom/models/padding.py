"""Classifiers of transformers that read a row by where its batch ends, and the padding with which they read the row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.models.configs import field, has_decoder_and_encoder, token

Inputs = Mapping[str, Tensor]


def for_rows(config: Any) -> Callable[[Inputs], Inputs] | None:
    """What has to be done to a batch that is padded on the right, so that each row is classified as it is alone.

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
    """Rows end side by side, for a model that classifies by the last place. [rows, length] of each tensor."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return inputs
    width = mask.shape[1]
    by = width - mask.sum(1, keepdim=True)
    place = (torch.arange(width, device=mask.device) - by) % width
    return {name: tensor.gather(1, place) if tensor.shape == mask.shape else tensor for name, tensor in inputs.items()}


def one_more(inputs: Inputs, pad: int) -> Inputs:
    """One place of padding behind the longest row, where the decoder would leave out the row's last token."""
    ids = inputs["input_ids"]
    out = dict(inputs)
    out.setdefault("attention_mask", torch.ones_like(ids))
    fillers = {"input_ids": pad}
    return {
        name: F.pad(tensor, (0, 1), value=fillers.get(name, 0)) if tensor.shape == ids.shape else tensor
        for name, tensor in out.items()
    }
