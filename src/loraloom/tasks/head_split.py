"""Whether a causal language model can be split into trunk and head, so that logits are computed for some tokens only.

Found by running two tokens with marks in place of the head's output. Behind the head, a factor and a cap from the
model's config are recognised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.lora.model import PeftModel
from loraloom.models.configs import field, levels
from loraloom.tasks.linear_cross_entropy import Logits

#: Config fields with a factor of the logits; some models multiply and some divide, which the marks show.
_FACTORS = (
    *("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier", "logits_mup_width_multiplier"),
    "output_multiplier_scale",
)
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

PLAIN = Logits()


@dataclass(frozen=True)
class Split:
    """The model is ``logits(head(trunk(...)[0]))``."""

    trunk: nn.Module
    head: nn.Module
    logits: Logits = PLAIN

    def __str__(self) -> str:
        more = f" ({self.logits})" if str(self.logits) else ""
        return f"logits are computed for a part of the labelled tokens at a time{more}"


@dataclass(frozen=True)
class Whole:
    """The model runs as a whole, with the logits of all tokens, and ``why``."""

    why: str

    def __str__(self) -> str:
        return f"logits of all tokens are computed and kept, which takes memory: {self.why}"


def split(model: PeftModel) -> Split | Whole:
    """How ``model`` computes its logits. Changes nothing."""
    base: Any = model.get_base_model()
    seen: dict[str, Tensor] = {}
    hidden: dict[nn.Module, Tensor] = {}
    hooks = []
    training = base.training

    def note(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        hidden[module] = out[0]

    def mark(module: nn.Module, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        seen["read"] = inputs[0]
        seen["marks"] = torch.linspace(-1e3, 1e3, out.numel(), device=out.device).view(out.shape).to(out.dtype)
        return seen["marks"]

    try:
        head = base.get_output_embeddings()
        trunks = [getattr(base, base.base_model_prefix), base.get_decoder()]
        hooks = [trunk.register_forward_hook(note) for trunk in trunks if trunk is not base]
        hooks.append(head.register_forward_hook(mark))
        base.eval()
        with torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=next(base.parameters()).device)
            logits = base(input_ids=ids).logits
    except Exception as error:  # a model that cannot run like this is not split
        return Whole(f"its head cannot be looked at ({type(error).__name__})")
    finally:
        base.train(training)
        for hook in hooks:
            hook.remove()
    marks, linear = seen["marks"], getattr(head, "bias", None) is None
    for trunk, found in hidden.items():
        # On the meta device there are no values to compare; an estimate of memory needs none.
        if logits.is_meta:
            return Split(trunk, head)
        for before in _factors(base.config) if found.shape == seen["read"].shape else ():
            if (before == 1 or linear) and _alike(found * before if before != 1 else found, seen["read"], before == 1):
                for after in _logits(base.config, before):
                    own = Logits(after.scale / before, after.cap)
                    if logits.shape == marks.shape and _alike(own(marks.float()), logits.float(), own == PLAIN):
                        return Split(trunk, head, after)
                return Whole("its logits are not those of its head, nor these scaled or capped by what its config says")
    return Whole("something comes between its layers and its head")


def _alike(one: Tensor, other: Tensor, exact: bool) -> bool:
    if exact:
        return torch.equal(one.to(other), other)
    low = other.dtype in (torch.float16, torch.bfloat16) or bool((other == other.bfloat16()).all())
    return torch.allclose(one.float(), other.float(), rtol=2e-2 if low else 1e-5, atol=1e-6)


def _numbers(config: Any, names: tuple[str, ...]) -> Iterator[float]:
    for one in levels(config):
        for name in names:
            found = field(one, name)
            if isinstance(found, int | float) and not isinstance(found, bool) and found > 0:
                yield float(found)


def _factors(config: Any) -> list[float]:
    """Factors that a model may apply, 1 first."""
    found = [1.0]
    for value in _numbers(config, _FACTORS):
        found += [value, 1 / value]
    return list(dict.fromkeys(found))


def _logits(config: Any, before: float) -> Iterator[Logits]:
    """What a model may do to its head's output; ``before`` was applied to the hidden states already."""
    for scale in _factors(config):
        for cap in (None, *dict.fromkeys(_numbers(config, _CAPS))):
            yield Logits(scale * before, cap)
