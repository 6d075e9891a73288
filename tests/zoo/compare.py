"""What models answer, and how far two answers, gradients or sets of weights lie apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Differs(AssertionError):
    """The two do not agree."""


def peft_tensors(model: Any) -> dict[str, Tensor]:
    import peft

    found: dict[str, Tensor] = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


FIRST = ("logits", "prediction_logits", "start_logits", "last_hidden_state", "text_embeds", "image_embeds",
         "logits_per_image", "pooler_output", "feature_maps", "reconstruction")  # fmt: skip


def output_of(out: Any) -> Tensor:
    """[rows, ...]: what a model answers."""
    if isinstance(out, Tensor):
        return out
    for name in FIRST:
        if name in out and out[name] is not None:
            found = out[name]
            if name == "start_logits" and "end_logits" in out and found.shape == out["end_logits"].shape:
                return torch.stack([found, out["end_logits"]], -1)
            return found[0] if isinstance(found, (list, tuple)) else found
    return next(v for v in out.values() if isinstance(v, Tensor) and v.is_floating_point())


def outputs(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(3)  # for those that draw which patches they see
    with torch.no_grad():
        return output_of(model(**batch, **options)).detach()


def loss_of(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Tensor:
    """A number that every answer has a say in: each with a weight of its own."""
    torch.manual_seed(3)
    out = output_of(model(**batch, **options))
    out = torch.where(out.isfinite(), out, torch.zeros_like(out)).clamp(-1e6, 1e6)
    source = torch.Generator().manual_seed(7)
    return (out * torch.randn(out.shape, generator=source, dtype=torch.float64).to(out.dtype)).mean()


def distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference as a share of the largest figure; places that are infinite must be so in both."""
    if found.shape != wanted.shape:
        raise Differs(f"shapes {tuple(found.shape)} and {tuple(wanted.shape)}")
    found, wanted = found.double(), wanted.double()
    odd = ~wanted.isfinite() | (wanted.abs() > 1e30)
    if not torch.equal(odd, ~found.isfinite() | (found.abs() > 1e30)):
        raise Differs("not finite at other places")
    found, wanted = found.masked_fill(odd, 0), wanted.masked_fill(odd, 0)
    if not wanted.numel():
        return 0.0
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def same(what: str, found: Tensor, wanted: Tensor, tolerance: float) -> float:
    far = distance(found, wanted)
    if not far <= tolerance:
        raise Differs(f"{what}: {far:.1e} of {tolerance:.0e}")
    return far


def gradients(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.zeros_like(t) if t.grad is None else t.grad.clone() for k, t in tensors.items()}


def same_all(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> float:
    """Every tensor, measured by the largest number among them all: a gradient that is rounding alone has no say."""
    if found.keys() != wanted.keys():
        raise Differs(f"{what}: other names: {sorted(found.keys() ^ wanted.keys())[:3]}")
    largest = max((float(t.abs().max()) for t in wanted.values() if t.numel()), default=0.0)
    if not largest > 0:
        raise Differs(f"{what}: all zero")
    worst = 0.0
    for key, tensor in wanted.items():
        far = float((found[key].double() - tensor.double()).abs().max()) / largest
        worst = max(worst, far)
        if not far <= tolerance:
            raise Differs(f"{what}: {key} {far:.1e} of {tolerance:.0e}")
    return worst


def live(model: Any, name: str = "default") -> dict[str, Tensor]:
    """Our adapter's trainable tensors under PEFT's keys."""
    return dict(model.adapter_parameters(name))


def live_theirs(model: Any) -> dict[str, Tensor]:
    """Their trainable tensors under the keys of the file, but for those that do nothing.

    peft adapts the last projection of torch's MultiheadAttention, which reads its weight and never calls it
    (torch/nn/modules/activation.py:1405).
    """
    idle = {
        id(parameter)
        for module in model.modules()
        if isinstance(getattr(module, "base_layer", None), nn.modules.linear.NonDynamicallyQuantizableLinear)
        for parameter in module.parameters()
    }
    by_pointer = {t.data_ptr(): key for key, t in peft_tensors(model).items()}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in idle:
            found[by_pointer.get(parameter.data_ptr(), name)] = parameter
    return found
