"""What would go wrong with a training, looked for before its first step. Looks at models and figures, changes none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraloom.lora import matmul
from loraloom.lora.base import base_modules
from loraloom.lora.experts import unadapted
from loraloom.lora.layer import LoraLayer
from loraloom.lora.model import PeftModel
from loraloom.lora.modules_to_save import ModulesToSaveWrapper
from loraloom.lora.parameters import LoraParameter
from loraloom.models.configs import tokens, vocabulary

#: Learning rates at which LoRA is trained with Adam and its like; about ten times those of full fine-tuning.
RATES = (2e-5, 5e-3)
#: Their updates do not scale with the gradient, so that their rates compare.
ADAPTIVE = ("adamw", "AdamW", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop")


@dataclass(frozen=True)
class Finding:
    """``stops``: training would do nothing, or not what was asked. Otherwise it is for the user to judge."""

    kind: str
    text: str
    stops: bool = False


def examine(
    model: PeftModel,
    adapter: str | None = None,
    *,
    tokenizer: Any = None,
    learning_rate: float | None = None,
    optim: str = "adamw",
    rows: int | None = None,
    batch_size: int = 1,
    steps: int | None = None,
) -> list[Finding]:
    """Everything there is to say, what stops first.

    Args:
        adapter: the one that is to train; by default the active one.
        rows, batch_size, steps: of the training, where they are known; ``batch_size`` is that of a step.
    """
    name = adapter or model.active_adapter
    assert isinstance(name, str)
    base = model.get_base_model()
    found = [
        *_trainable(model, name),
        *_wrapped(base),
        *_experts(model, name),
        *_checkpointing(base),
        *_tied(model),
        *_rate(learning_rate, optim),
        *_dtype(base),
        *(_tokenizer(base, tokenizer) if tokenizer is not None else ()),
        *amount(rows, batch_size, steps),
    ]
    return sorted(found, key=lambda finding: not finding.stops)


def _trainable(model: PeftModel, name: str) -> Iterator[Finding]:
    layers = [layer for layer in model.base_model.lora_layers.values() if name in layer.slots]
    factors = [p for layer in layers for p in layer.tensors(name).values()]
    mine = set(map(id, model.adapter_parameters(name).values()))
    trained = [p for p in model.parameters() if p.requires_grad]
    if not any(id(p) in mine for p in trained):
        yield Finding("nothing", f"nothing of {name!r} is trainable: call set_adapter({name!r})", stops=True)
    elif frozen := sum(not p.requires_grad for p in factors):
        yield Finding(
            "frozen", f"{frozen} of {len(factors)} tensors of {name!r} are frozen, and would not train", stops=True
        )
    slots = {id(p) for other in model.peft_config for p in model.adapter_parameters(other).values()}
    if loose := sum(p.numel() for p in trained if id(p) not in slots):
        yield Finding(
            "thawed",
            f"{loose:,} numbers of the frozen model are trainable: they would be, and not be saved",
            stops=True,
        )


def _wrapped(base: nn.Module) -> Iterator[Finding]:
    for name, module in base.named_modules():
        # Wrappers of parameters lie around each other, and around what their module holds.
        around = isinstance(module, LoraLayer) and not isinstance(module, LoraParameter)
        inner = around and [m for m in module.base_layer.modules() if isinstance(m, LoraLayer)]
        if inner or type(module) is PeftModel or _foreign(module):
            yield Finding(
                "twice", f"{name or 'the model'} carries LoRA already: begin from the plain model, or add an adapter "
                "to the one that there is (add_adapter)", stops=True,
            )  # fmt: skip
            return


def _experts(model: PeftModel, name: str) -> Iterator[Finding]:
    """Expert weights that the adapter leaves as they are: most of a model of experts, and easily forgotten."""
    modules = dict(base_modules(model.get_base_model()))
    mine = [layer.name for layer in model.base_model.lora_layers.values() if name in layer.slots]
    own = {id(p): p.numel() for module in modules.values() for p in module._parameters.values() if p is not None}
    left = unadapted(modules, mine, sum(own.values()))
    if left.weights:
        hint = f": target_parameters={list(left.names)} would adapt them" if left.names else ""
        yield Finding("experts", f"{left} are not adapted{hint}")


def _foreign(module: nn.Module) -> bool:
    """Whether it is a layer of ``peft``'s."""
    return type(module).__module__.startswith("peft.tuners.")


def _checkpointing(base: nn.Module) -> Iterator[Finding]:
    for module in base.modules():
        how = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and how.get("use_reentrant"):
            yield Finding(
                "reentrant",
                "gradient checkpointing is on in its reentrant form, and the inputs of the frozen layers need no "
                'gradient: none would reach the adapter. Give {"use_reentrant": False}, or call '
                "model.enable_input_require_grads()",
                stops=True,
            )
            return


def _tied(model: PeftModel) -> Iterator[Finding]:
    base: Any = model.get_base_model()
    try:
        ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return
    weights = []
    for end in ends:
        inner = (
            end.base_layer
            if isinstance(end, LoraLayer)
            else end.original_module
            if isinstance(end, ModulesToSaveWrapper)
            else end
        )
        weights.append(getattr(inner, "weight", None))
    changed = [isinstance(end, LoraLayer | ModulesToSaveWrapper) for end in ends]
    if weights[0] is not None and weights[0] is weights[1] and changed[0] != changed[1]:
        one, other = ("input", "output") if changed[0] else ("output", "input")
        yield Finding(
            "tied",
            f"the adapter changes the {one} embeddings alone, whose weight is tied to the {other} embeddings: merged, "
            "they would no longer be one weight. To train both as one, name both in modules_to_save",
        )


def _rate(rate: float | None, optim: str) -> Iterator[Finding]:
    if rate is None or optim not in ADAPTIVE or RATES[0] <= rate <= RATES[1]:
        return
    how, what = ("low", "it will hardly move") if rate < RATES[0] else ("high", "it may not hold together")
    yield Finding(
        "rate",
        f"a learning rate of {rate:g} is {how} for LoRA with {optim} (usual are {RATES[0]:g} to {RATES[1]:g}): {what}",
    )


def _dtype(base: nn.Module) -> Iterator[Finding]:
    weight = next((p for p in base.parameters() if p.is_floating_point()), None)
    if weight is None or weight.device.type != "cpu":
        return
    if not matmul.native("cpu", weight.dtype):
        kind = str(weight.dtype).removeprefix("torch.")
        yield Finding(
            "dtype",
            f"this processor has no instructions for {kind}: layers with an adapter are computed in float32, all "
            "others crawl. Use dtype float32 if there is the memory, else target_modules all-linear",
        )
    elif weight.dtype is torch.float16:
        yield Finding("dtype", "float16 on a CPU overflows early: use bfloat16 or float32")


def _tokenizer(base: nn.Module, tokenizer: Any) -> Iterator[Finding]:
    config: Any = getattr(base, "config", None)
    size = vocabulary(config)
    if size is not None and len(tokenizer) > size:
        yield Finding(
            "vocabulary",
            f"the tokenizer has {len(tokenizer)} tokens and the model {size}: they do not belong together, or the "
            "model's embeddings were not resized",
            stops=True,
        )
    ends = [*tokens(config, "eos"), *tokens(getattr(base, "generation_config", None), "eos")]
    mine = tokenizer.eos_token_id
    if mine is not None and ends and mine not in ends:
        yield Finding(
            "end",
            f"the tokenizer ends a text with token {mine} ({tokenizer.eos_token!r}), and the model's config names "
            f"{', '.join(map(str, dict.fromkeys(ends)))}: generation may not stop where training did",
        )
    if mine is not None and tokenizer.pad_token_id == mine:
        yield Finding(
            "pad",
            f"the pad token is the end token ({tokenizer.pad_token!r}). Here padding is known by its place, so the end "
            "is learnt all the same; tools that mask every pad token would never teach it",
        )


def amount(rows: int | None, batch_size: int, steps: int | None) -> Iterator[Finding]:
    """What is to be said of very few rows, or steps."""
    if rows is not None and rows < batch_size:
        yield Finding("batch", f"a step takes {batch_size} rows, and there are {rows}: every step is the same rows")
    if steps is not None and steps < 10:
        yield Finding(
            "short", f"{steps} step{'' if steps == 1 else 's'} in all: an adapter hardly begins to learn in so few"
        )
