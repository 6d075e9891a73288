"""The interface of LoRA variants: what can differ in the maths. The base class is plain LoRA."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from loraloom.config.lora import LoraConfig
from loraloom.lora.initialize import factors

Shapes = dict[str, tuple[int, ...]]


class Adapted(Protocol):
    """The adapted layer, as far as variants use it."""

    scaling: dict[str, float]

    def tensors(self, slot: str) -> dict[str, nn.Parameter]: ...
    def rows(self) -> Tensor:
        """The frozen weight [out, in, ...], dense."""

    def delta(self, slot: str) -> Tensor:
        """``scale · B A`` [out, in, ...] in at least float32, in new memory."""


class Variant:
    """A slot's tensors, their initial values, and their effect on the layer's output and weight."""

    #: the name in errors
    name = "LoRA"
    #: the kinds of layers that can be adapted; all if empty
    kinds: tuple[str, ...] = ()

    def applies(self, config: LoraConfig) -> bool:
        """Whether ``config`` asks for this variant."""
        return True

    def shapes(self, factors: Shapes) -> Shapes:
        """A slot's tensors by name: ``factors``, A [r, in, ...] and B [out, r, ...], and any others.

        The tensors of a name are ``layer.NAME[slot]`` in memory and ``....NAME`` in a file. Names begin with "lora_".
        """
        return factors

    def start(self, layer: Adapted, shapes: Shapes, config: LoraConfig, r: int, seed: int) -> dict[str, Tensor]:
        """Initial values for ``shapes``, float32 on the CPU, from ``seed`` and the frozen weight of ``layer``."""
        (name_a, a), (name_b, b), *_ = shapes.items()
        embedding = name_a == "lora_embedding_A"
        made = factors(a, b, init=config.init_lora_weights, seed=seed, embedding=embedding, r=r)
        return dict(zip((name_a, name_b), made, strict=True))

    def row_gain(self, layer: Adapted, slot: str) -> Tensor | None:
        """[out]: the slot's rows are ``gain · (W x + scale · B A x) + bias``. None is a gain of 1. Differentiable."""
        return None

    def merged_weight(self, layer: Adapted, slot: str, weight: Tensor) -> Tensor:
        """``weight`` [out, in, ...] with the slot merged, in at least float32: the same map as the forward."""
        merged = layer.delta(slot).add_(weight)
        gain = self.row_gain(layer, slot)
        return merged if gain is None else merged * gain.detach().view(-1, *[1] * (merged.dim() - 1))


PLAIN = Variant()
