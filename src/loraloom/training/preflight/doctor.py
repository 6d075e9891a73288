"""Checks of a model and its adapter before the first step. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from loraloom.errors import ConfigError
from loraloom.lora import matmul
from loraloom.lora.injection import base_modules
from loraloom.lora.layer import LoraLayer
from loraloom.lora.model import PeftModel
from loraloom.lora.modules_to_save import ModulesToSaveWrapper
from loraloom.lora.parameters import LoraParameter
from loraloom.lora.peft_targets import unadapted
from loraloom.messages import Message, Warn
from loraloom.models.configs import tokens, vocabulary

#: Usual learning rates of LoRA with an adaptive optimizer; about ten times those of full fine-tuning.
RATES = (2e-5, 5e-3)
#: Optimizers whose updates do not scale with the gradient, so that their rates compare.
ADAPTIVE = ("adamw", "AdamW", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop")


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
) -> list[Message]:
    """What may be a mistake, or a surprise.

    Args:
        adapter: the adapter to train; by default the active one.
        rows, batch_size, steps: of the training, if known; ``batch_size`` is that of a step.

    Raises:
        ConfigError: training would do nothing, or not what was asked.
    """
    name = adapter or model.active_adapter
    assert isinstance(name, str)
    base = model.get_base_model()
    _check_trainable(model, name)
    _check_wrapped(base)
    _check_checkpointing(base)
    if tokenizer is not None:
        _check_vocabulary(base, tokenizer)
    return [
        *_experts(model, name),
        *_tied(model),
        *_rate(learning_rate, optim),
        *_dtype(base),
        *(_tokenizer(base, tokenizer) if tokenizer is not None else ()),
        *amount(rows, batch_size, steps),
    ]


def _check_trainable(model: PeftModel, name: str) -> None:
    layers = [layer for layer in model.base_model.lora_layers.values() if name in layer.slots]
    factors = [p for layer in layers for p in layer.tensors(name).values()]
    mine = set(map(id, model.adapter_parameters(name).values()))
    trained = [p for p in model.parameters() if p.requires_grad]
    if not any(id(p) in mine for p in trained):
        raise ConfigError(f"nothing of {name!r} is trainable: call set_adapter({name!r})")
    if frozen := sum(not p.requires_grad for p in factors):
        raise ConfigError(f"{frozen} of {len(factors)} tensors of {name!r} are frozen, and would not train")
    slots = {id(p) for other in model.peft_config for p in model.adapter_parameters(other).values()}
    if loose := sum(p.numel() for p in trained if id(p) not in slots):
        raise ConfigError(f"{loose:,} base-model parameters require gradients; they would be trained but not saved")


def _check_wrapped(base: nn.Module) -> None:
    for name, module in base.named_modules():
        # Wrappers of parameters may enclose each other and the layers of their module.
        around = isinstance(module, LoraLayer) and not isinstance(module, LoraParameter)
        inner = around and [m for m in module.base_layer.modules() if isinstance(m, LoraLayer)]
        if inner or type(module) is PeftModel or _foreign(module):
            raise ConfigError(
                f"{name or 'the model'} carries LoRA already: start from the plain model, or add an adapter to the one "
                "that is there (add_adapter)"
            )


def _experts(model: PeftModel, name: str) -> Iterator[Warn]:
    """Expert weights without an adapter, which are most of a mixture of experts."""
    modules = dict(base_modules(model.get_base_model()))
    mine = [layer.name for layer in model.base_model.lora_layers.values() if name in layer.slots]
    own = {id(p): p.numel() for module in modules.values() for p in module._parameters.values() if p is not None}
    left = unadapted(modules, mine, sum(own.values()))
    if left.weights:
        yield Warn("experts", experts=str(left), names=list(left.names))


def _foreign(module: nn.Module) -> bool:
    """True for a layer of ``peft``."""
    return type(module).__module__.startswith("peft.tuners.")


def _check_checkpointing(base: nn.Module) -> None:
    for module in base.modules():
        how = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if getattr(module, "gradient_checkpointing", False) and how.get("use_reentrant"):
            raise ConfigError(
                "gradient checkpointing is on in its reentrant form, and the inputs of the frozen layers need no "
                'gradient: none would reach the adapter. Give {"use_reentrant": False}, or call '
                "model.enable_input_require_grads()"
            )


def _tied(model: PeftModel) -> Iterator[Warn]:
    base: Any = model.get_base_model()
    try:
        ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return
    inner = [getattr(end, "base_layer", getattr(end, "original_module", end)) for end in ends]
    weights = [getattr(module, "weight", None) for module in inner]
    changed = [isinstance(end, LoraLayer | ModulesToSaveWrapper) for end in ends]
    if weights[0] is not None and weights[0] is weights[1] and changed[0] != changed[1]:
        yield Warn("tied", changed="input" if changed[0] else "output", other="output" if changed[0] else "input")


def _rate(rate: float | None, optim: str) -> Iterator[Warn]:
    if rate is None or optim not in ADAPTIVE or RATES[0] <= rate <= RATES[1]:
        return
    yield Warn("rate", rate=rate, optim=optim, lowest=RATES[0], highest=RATES[1])


def _dtype(base: nn.Module) -> Iterator[Warn]:
    weight = next((p for p in base.parameters() if p.is_floating_point()), None)
    if weight is None or weight.device.type != "cpu":
        return
    if not matmul.native("cpu", weight.dtype):
        kind = str(weight.dtype).removeprefix("torch.")
        yield Warn("dtype", dtype=kind)
    elif weight.dtype is torch.float16:
        yield Warn("overflow")


def _check_vocabulary(base: nn.Module, tokenizer: Any) -> None:
    size = vocabulary(getattr(base, "config", None))
    if size is not None and len(tokenizer) > size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {size}: they do not belong together, or the "
            "model's embeddings were not resized"
        )


def _tokenizer(base: nn.Module, tokenizer: Any) -> Iterator[Message]:
    config: Any = getattr(base, "config", None)
    ends = [*tokens(config, "eos"), *tokens(getattr(base, "generation_config", None), "eos")]
    mine = tokenizer.eos_token_id
    if mine is not None and ends and mine not in ends:
        yield Warn("end", token=mine, name=tokenizer.eos_token, model=list(dict.fromkeys(ends)))
    if mine is not None and tokenizer.pad_token_id == mine:
        yield Message("pad", name=tokenizer.pad_token)


def amount(rows: int | None, batch_size: int, steps: int | None) -> Iterator[Warn]:
    """Very few rows, or steps."""
    if rows is not None and rows < batch_size:
        yield Warn("batch", batch_size=batch_size, rows=rows)
    if steps is not None and steps < 10:
        yield Warn("short", steps=steps)
