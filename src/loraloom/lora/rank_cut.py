"""A trained adapter of a smaller rank: the singular directions of each update that matter most, the others dropped.

Of all updates of the smaller rank this is the nearest one (Eckart and Young 1936). Nothing is trained, and no
[out, in] product is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraloom.config.lora import LoraConfig
from loraloom.errors import AdapterError
from loraloom.lora.layer import LoraLayer
from loraloom.lora.model import PeftModel
from loraloom.lora.parameters import LoraParameter


def truncated(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The ``r`` largest singular directions of ``B A``, as factors of equal norm, float64.

    Shapes: a [R, in, ...], b [out, R, ...] → [r, in, ...], [out, r, ...]. Zeros fill up what the update does not have.
    """
    q_a, r_a = torch.linalg.qr(a.detach().double().flatten(1).T)
    q_b, r_b = torch.linalg.qr(b.detach().double().flatten(1))
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root, kept = values[:r].sqrt(), min(r, len(values))
    new_a, new_b = (
        a.new_zeros(r, *a.shape[1:], dtype=torch.float64),
        b.new_zeros(b.shape[0], r, *b.shape[2:], dtype=torch.float64),
    )
    new_a.flatten(1)[:kept] = root[:, None] * (v[:kept] @ q_a.T)
    new_b.flatten(1)[:, :kept] = (q_b @ u[:, :kept]) * root
    return new_a, new_b


def cut_rank(model: PeftModel, adapter: str, new: str, r: int) -> LoraConfig:
    """Add ``new``: ``adapter`` with ranks of at most ``r``; heads and biases are copied. Returns its config.

    Raises:
        AdapterError: there is no such adapter, its rank is not above ``r``, or an update is not one plain product.
    """
    if adapter not in model.peft_config:
        raise AdapterError(f"there is no adapter {adapter!r}; there are {', '.join(sorted(model.peft_config))}")
    old = model.peft_config[adapter]
    layers = {name: one for name, one in model.base_model.lora_layers.items() if adapter in one.slots}
    for name, layer in layers.items():
        if why := _obstacle(layer, adapter):
            raise AdapterError(f"{adapter}: cannot be cut to a smaller rank: {name} is {why}")
    if not 1 <= r < max((layer.r[adapter] for layer in layers.values()), default=0):
        raise AdapterError(f"r: must be at least 1 and below the ranks of {adapter!r}, found {r}")
    alpha = old.lora_alpha * (r / old.r) ** (0.5 if old.use_rslora else 1.0)
    ranks = {pattern: min(rank, r) for pattern, rank in old.rank_pattern.items()}
    config = old.copy(r=min(old.r, r), lora_alpha=alpha if old.r > r else old.lora_alpha, rank_pattern=ranks)
    model.add_adapter(new, config)
    with torch.no_grad():
        own = model.base_model.parameters_of(new)
        for key, tensor in model.base_model.parameters_of(adapter).items():
            if key in own and own[key].shape == tensor.shape:
                own[key].copy_(tensor)
        for layer in layers.values():
            a, b = truncated(*layer.factors(adapter), layer.r[new])
            new_a, new_b = layer.factors(new)
            new_a.copy_(a)
            new_b.copy_(b * (layer.scaling[adapter] / layer.scaling[new]))
    return config


def _obstacle(layer: LoraLayer, adapter: str) -> str:
    a, b = layer.factors(adapter)
    if isinstance(layer, LoraParameter) and layer.experts > 1:
        return "a stack of experts"
    if adapter in layer.variants:
        return f"adapted by {layer.variants[adapter].name}"
    return "a grouped convolution" if b.shape[1] != a.shape[0] else ""
