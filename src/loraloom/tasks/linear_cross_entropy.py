"""The cross-entropy of a language model's head, a chunk of tokens at a time: the logits of all tokens never coexist.

Torch's own ``linear_cross_entropy`` (2.13) does the same on a GPU. On a CPU in bfloat16 it took 200 times as long as
the plain loss, and older versions lack it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loraloom.lora import matmul

#: Logits of a chunk: enough rows for a fast matrix product, at 6 bytes a logit in half precision. Not yet measured on a
#: GPU, which needs more rows.
AT_A_TIME = {"cpu": 2**23, "cuda": 2**24}

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Logits:
    """A model's logits from its head's output z: ``scale · z``, or ``cap · tanh(scale · z / cap)``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.scale != 1:
            z = z * self.scale
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap

    def apply_(self, z: Tensor, slope: bool) -> Tensor | None:
        """The same in place. With ``slope``, returns the part of the derivative by z that is not constant."""
        if self.scale != 1:
            z.mul_(self.scale)
        if self.cap is None:
            return None
        z.div_(self.cap).tanh_()
        found = 1 - z.square() if slope else None
        z.mul_(self.cap)
        return found

    def __str__(self) -> str:
        scaled = [f"scaled by {self.scale:g}"] if self.scale != 1 else []
        return ", ".join([*scaled, *([f"capped at {self.cap:g}"] if self.cap is not None else [])])


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: Logits | None = None
) -> Tensor:
    """``cross_entropy(shape(hidden Wᵀ + bias), targets)`` of each token with a frozen head, in at least float32.

    Shapes: hidden [tokens, dim], weight [vocabulary, dim], bias [vocabulary] or None, targets [tokens] (none ignored)
    → [tokens]. The forward computes the gradient by ``hidden``, so that no logits are kept.
    """
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, shape or Logits())  # type: ignore[no-untyped-call]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, shape: Logits
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        losses = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        for rows in _chunks(hidden, weight.shape[0]):
            seen = hidden[rows].to(matmul.compute_dtype(hidden, differentiated=gradient is not None))
            low = matmul.linear(seen, weight, bias)
            logits, wanted = low.to(dtype), targets[rows].unsqueeze(-1)
            slope = shape.apply_(logits, gradient is not None)
            greatest = logits.amax(-1, keepdim=True)
            at_target = logits.gather(-1, wanted)
            # All in place: at these sizes the time is memory-bound.
            shares = logits.sub_(greatest).exp_()
            sums = shares.sum(-1, keepdim=True)
            losses[rows] = (sums.log() + greatest - at_target).squeeze(-1)
            if gradient is not None:
                shares.div_(sums).scatter_add_(-1, wanted, torch.full_like(sums, -1))
                if slope is not None:
                    shares.mul_(slope)
                if shape.scale != 1:
                    shares.mul_(shape.scale)
                gradient[rows] = matmul.matmul_grad_input(low.copy_(shares), weight)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype).unsqueeze(-1), None, None, None, None


def head_cross_entropy(hidden: Tensor, head: Head, vocabulary: int, targets: Tensor) -> Tensor:
    """The same for a head that trains or carries an adapter: the backward recomputes each chunk's logits.

    Shapes: hidden [tokens, dim], ``head(hidden)`` [tokens, vocabulary], targets [tokens] → [tokens].
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).to(dtype), targets, reduction="none")

    parts = [
        checkpoint(part, hidden[rows], targets[rows], use_reentrant=False, preserve_rng_state=False)
        for rows in _chunks(hidden, vocabulary)
    ]
    return torch.cat(parts) if parts else hidden.sum(-1) * 0


def _chunks(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    at_a_time = AT_A_TIME["cpu" if hidden.device.type == "cpu" else "cuda"]
    size = max(1, at_a_time // vocabulary)
    for start in range(0, hidden.shape[0], size):
        yield slice(start, start + size)
