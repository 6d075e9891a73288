"""A model as it was before any adapter: its modules by name, its type, its heads, and what errors say of them."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from functools import cached_property

from torch import nn

from loraloom.config.lora import TASK_HEADS, LoraConfig
from loraloom.lora.injection import base_modules, unwrap
from loraloom.lora.layers import LoraConv1D, LoraLinear, layer_class
from loraloom.lora.matching import matches_any
from loraloom.lora.presets import preset


class Base:
    """``model`` and its ``modules``, which never change while adapters come and go."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(base_modules(model))
        config = getattr(model, "config", None)
        found = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
        #: transformers' name for the architecture
        self.type: str | None = found if isinstance(found, str) else None

    @cached_property
    def linear(self) -> list[str]:
        """The names of the linear layers that can be adapted."""
        return [name for name, m in self.modules.items() if layer_class(m) in (LoraLinear, LoraConv1D)]

    @property
    def usual(self) -> list[str] | str | None:
        """The default targets of the model's type, if they match something in this model."""
        usual = preset(self.type)
        if usual is None or not any(matches_any(usual, name) for name in self.modules):
            return None
        return usual if isinstance(usual, str) else list(usual)

    @property
    def no_default(self) -> str:
        return f"model type {self.type!r} has no preset" if self.type else "this model has no model type"

    def output_heads(self, config: LoraConfig) -> set[str]:
        """The output layer that "all-linear" leaves out: the language-model head, or the classifier."""
        get = getattr(self.model, "get_output_embeddings", None)
        head = unwrap(out) if get is not None and (out := get()) is not None else None
        if head is not None:
            return {name for name, module in self.modules.items() if module is head}
        return {name for name in self.modules if name in task_heads(config)}

    def closest(self, pattern: str, names: Iterable[str] | None = None, what: str = "module") -> str:
        """``"; did you mean 'q_proj' (22 modules)?"``, by the last part of names; "" if none is close."""
        leaves = [name.rpartition(".")[2] for name in (self.modules if names is None else names)]
        counts = Counter(leaf for leaf in leaves if not leaf.isdigit())
        close = difflib.get_close_matches(pattern.rpartition(".")[2], list(counts), n=1, cutoff=0.5)
        if not close:
            return ""
        count = counts[close[0]]
        return f"; did you mean {close[0]!r} ({count} {what}{'s' if count > 1 else ''})?"

    @property
    def offer(self) -> str:
        """The names that could be targeted, with counts."""
        counts = Counter(name.rpartition(".")[2] for name, module in self.modules.items() if layer_class(module))
        listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common(30))
        return f"modules that can be adapted: {listed}" if listed else "this model has no module that LoRA can wrap"


def task_heads(config: LoraConfig) -> tuple[str, ...]:
    return TASK_HEADS.get(config.task_type, ()) if config.task_type else ()
