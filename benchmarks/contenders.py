"""The same model under each library, ready to train: what the benchmarks of a step, of memory and of the loss compare.

The floor is the frozen model's own forward and backward, with gradients to its input and to nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import loraloom
from loraloom import tasks
from loraloom.engine.flat_adamw import FlatAdamW
from loraloom.models import activation_checkpointing
from loraloom.tasks.objective import Objective

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAMES = ("floor", "peft", "peft, adapters in the base's dtype", "loraloom")


@dataclass(frozen=True)
class Shape:
    """A Llama and a batch for it."""

    dtype: str
    width: int
    layers: int
    rows: int
    tokens: int
    vocabulary: int = 8192
    dropout: float = 0.0
    r: int = 16
    checkpointing: bool = False
    #: of the model, beside what follows from its width
    more: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        dropped = f", dropout {self.dropout:g}" if self.dropout else ""
        again = ", gradient checkpointing" if self.checkpointing else ""
        return f"{self.dtype}, width {self.width}, {self.layers} layers, {self.rows}×{self.tokens}{dropped}{again}"

    @property
    def config(self) -> transformers.LlamaConfig:
        fields: dict[str, Any] = {
            "hidden_size": self.width,
            "intermediate_size": self.width * 11 // 4,
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(self.width // 64, 1),
            "vocab_size": self.vocabulary,
        }
        return transformers.LlamaConfig(**{**fields, **self.more})

    def base(self, device: str) -> nn.Module:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(self.config).to(device, getattr(torch, self.dtype))

    def batch(self, device: str) -> Tensor:
        make = torch.Generator().manual_seed(0)
        return torch.randint(0, self.vocabulary, (self.rows, self.tokens), generator=make).to(device)


def stepper(name: str, shape: Shape, device: str) -> Callable[[], Any]:
    """A model, and one training step of it: forward, loss, backward and, but for the floor, AdamW (fused)."""
    model, ids = shape.base(device).train(), shape.batch(device)
    if shape.checkpointing and name != "loraloom":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if name == "floor":
        model.requires_grad_(False)
        embed = model.get_input_embeddings()

        def floor() -> None:
            inputs = embed(ids).detach().requires_grad_()
            model(inputs_embeds=inputs, labels=ids).loss.backward()

        return floor

    fields: dict[str, Any] = {"r": shape.r, "lora_alpha": 2 * shape.r, "lora_dropout": shape.dropout}
    fields |= {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if name == "loraloom":
        adapted: Any = loraloom.get_peft_model(model, loraloom.LoraConfig(**fields))
        if shape.checkpointing:
            activation_checkpointing.enable(adapted)
        objective = Objective(adapted, tasks.get("causal-lm"))
        flat = FlatAdamW([(p, 1.0) for p in adapted.parameters() if p.requires_grad], 0.01)

        def ours() -> None:
            with adapted.base_model.lora_routed(["default"] * len(ids)):
                objective.loss(objective.forward({"input_ids": ids}), ids).backward()
            flat.step(1e-4, math.inf)

        return ours
    half = name != "peft"
    adapted = peft.get_peft_model(model, peft.LoraConfig(**fields), autocast_adapter_dtype=not half)

    def loss() -> Tensor:
        return adapted(input_ids=ids, labels=ids).loss

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
