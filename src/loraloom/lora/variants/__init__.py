"""The variants of LoRA: one small file each. A new one is listed here and chosen by a field of ``LoraConfig``."""

from __future__ import annotations

from loraloom.config.lora import LoraConfig
from loraloom.lora.variants.base import PLAIN, Variant

VARIANTS: list[Variant] = []


def variant_of(config: LoraConfig) -> Variant:
    """The variant that ``config`` asks for, plain LoRA if none."""
    return next((variant for variant in VARIANTS if variant.applies(config)), PLAIN)
