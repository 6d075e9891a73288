"""The memory of a training step, counted from shapes before it runs.

Activations are the tensors that autograd would keep, found by running the real model on the meta device with a hook on
saved tensors. So the count follows the model's own code, not a formula for its family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from loraloom import tasks
from loraloom.config.lora import LoraConfig
from loraloom.config.names import TASKS
from loraloom.config.train import DTYPES
from loraloom.errors import ConfigError, nearest
from loraloom.lora.model import PeftModel, get_peft_model
from loraloom.lora.targets import Plan, plan
from loraloom.models.activation_checkpointing import repeated
from loraloom.models.load import build_empty, length_within, load_limit
from loraloom.tasks.base import Task
from loraloom.tasks.head_split import Split, Whole, split
from loraloom.tasks.linear_cross_entropy import AT_A_TIME

#: Maximum number of classes of a planned head.
MOST_LABELS = 1_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes. ``activations`` is None if the model's forward cannot run on the meta device."""

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    #: a sentence on how the logits of a causal language model are computed
    logits: str = ""

    @property
    def total(self) -> int:
        return self.base + self.adapter + self.gradients + self.optimizer + (self.activations or 0)


def estimate(
    model: nn.Module, config: LoraConfig, *, rows: int, length: int, dtype: str, recompute: bool = False
) -> tuple[Plan, Memory]:
    """Plan ``config`` on ``model`` (on the meta device; it is changed) and count the memory of a step.

    A forward has ``rows`` × ``length`` tokens; the base is in ``dtype``; AdamW keeps two numbers for each trained one.
    With ``recompute``, layers keep only their inputs, and the activations of one layer exist at a time.
    """
    model = model.to(getattr(torch, dtype))
    task = tasks.get(config.task_type or "seq-cls")
    config = task.adapted(model, config)
    made = plan(model, config)
    peft = get_peft_model(model, config)
    way = split(peft) if task.head_in_loss else None
    return made, Memory(
        base=made.base_bytes,
        adapter=made.bytes,
        gradients=made.bytes,
        optimizer=2 * made.bytes,
        activations=_saved_bytes(peft, task, way, rows, length, recompute),
        logits=str(way or ""),
    )


def forecast(
    model: str,
    task: str,
    config: LoraConfig,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    labels: int = 2,
    dtype: str = "float32",
    gradient_checkpointing: bool = False,
) -> tuple[Plan, Memory, int]:
    """``estimate`` for a model's folder or name, from its config alone; and the row length that it assumes.

    Raises:
        ConfigError: an option out of range.
        ModelError: no such model, or one for other tasks.
    """
    for name, value, known in (("task", task, TASKS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ConfigError(f"{name}: must be one of {', '.join(known)}, found {value!r}{nearest(value, known)}")
    for name, number in (("batch_size", batch_size), ("max_length", max_length), ("labels", labels)):
        if number is not None and number < 1:
            raise ConfigError(f"{name}: must be a whole number of at least 1, found {number}")
    if labels > MOST_LABELS:  # the config holds a name for each
        raise ConfigError(f"labels: must be at most {MOST_LABELS:,}, found {labels:,}")
    if labels != 2 and not tasks.get(task).class_word:
        raise ConfigError(f"labels: does nothing with task={task}, which has no classes; leave it out")
    length = length_within(load_limit(model), max_length, model)
    base = build_empty(model, tasks.get(task), labels)
    made, memory = estimate(
        base,
        config.copy(task_type=TASKS[task]),
        rows=batch_size * tasks.get(task).texts,
        length=length,
        dtype=dtype,
        recompute=gradient_checkpointing,
    )
    return made, memory, length


def _saved_bytes(
    model: PeftModel, task: Task, way: Split | Whole | None, rows: int, length: int, recompute: bool
) -> int | None:
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Held until the end, because the address of a freed storage could be reused.
        if tensor.untyped_storage()._cdata not in weights:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if task.layout == "target" else {})
    inputs: list[int] = []
    for layer in repeated(model) if recompute else ():
        layer.register_forward_hook(lambda module, args, out: inputs.append(args[0].numel() * args[0].element_size()))
    model.eval()  # as in training, where only adapters have dropout, which keeps nothing
    try:
        found = (way.trunk, way.head) if isinstance(way, Split) else None
        part = model.get_base_model() if found is None else found[0]
        with torch.no_grad(), model.base_model.lora_routed(None):
            part(**given)  # the layers learn which inputs they share, as before the first step
        with (
            _FusedAttention(),
            model.base_model.lora_routed(None),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            # Not through ``Objective``: without a cache, transformers reads the values of a mask.
            inputs.clear()
            result = part(**given)
        out: Tensor = task.output(result, {}, model.config) if found is None else result[0]
    except Exception:  # models that read values in their forward cannot run on the meta device
        return None
    if found is None:  # the loss makes a float32 copy of the logits, and its gradient
        extra = 2 * out.numel() * 4
    else:  # the loss keeps the gradient of the hidden states, and computes a chunk of logits at a time
        vocabulary = next(found[1].parameters()).shape[0]
        logits = min(rows * length, max(1, AT_A_TIME["cpu"] // vocabulary)) * vocabulary
        extra = out.numel() * out.element_size() + logits * (4 + out.element_size())
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    if inputs:
        saved = sum(inputs) + saved // len(inputs)
    return int(extra + saved)


class _FusedAttention(TorchFunctionMode):
    """Attention as on a real device, in one kernel; on the meta device torch would decompose it and keep its matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _attention(func, *args, **kwargs)


def _attention(
    plain: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or query.dim() != 4 or query.shape[-1] != value.shape[-1]:  # also decomposed on a CPU
        out: Tensor = plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return out
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]  # type: ignore[no-any-return]
