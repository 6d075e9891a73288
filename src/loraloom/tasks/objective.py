"""From a batch to losses: one forward for all slots, then the loss of each slot, or of each row.

A causal language model runs up to its head, and the head only for labelled tokens (``tasks.linear_cross_entropy``).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from loraloom.data.example import IGNORE
from loraloom.errors import ConfigError
from loraloom.lora import mixed
from loraloom.lora.frozen import HALF
from loraloom.lora.model import PeftModel
from loraloom.models.configs import segments, without_cache
from loraloom.tasks.base import Task
from loraloom.tasks.head_split import Split, split
from loraloom.tasks.linear_cross_entropy import Logits, head_cross_entropy, linear_cross_entropy

#: Maximum row length with which plain attention is faster in half precision on a CPU.
PLAIN_ATTENTION = 128


class Objective:
    """The forward and the loss of ``task`` on ``model``, whose structure is inspected once, here."""

    def __init__(self, model: PeftModel, task: Task) -> None:
        self._task = task
        self._lora = model.base_model
        self._model = model.get_base_model()
        self._config = getattr(self._model, "config", None)
        self._dtype = next(p.dtype for p in self._model.parameters() if p.is_floating_point())
        self._head: nn.Module | None = None
        #: how a causal language model computes its logits
        self.way = split(model) if task.head_in_loss else None
        self._logits = Logits()
        if isinstance(self.way, Split):
            self._model, self._head, self._logits = self.way.trunk, self.way.head, self.way.logits
        arguments = inspect.signature(self._model.forward).parameters
        #: for forwards that read it only from their arguments; see ``forward`` for the others
        self._options = {"use_cache": False} if "use_cache" in arguments else {}
        #: a tokenizer may distinguish segments that the model does not
        self._segments = "token_type_ids" in arguments and segments(self._config) > 1

    def forward(self, inputs: Mapping[str, Tensor], labels: Tensor | None = None) -> Any:
        """[rows, ...] for ``losses`` and ``row_losses``: hidden states if the head is applied later, else logits.

        For a user's own loss, all that the model returns. Only seq2seq-lm reads ``labels``, as decoder inputs.
        """
        if not self._segments:
            inputs = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
        inputs = self._task.inputs(self._model, inputs, labels)
        # A cache of keys and values is for generation; filling it costs time and memory in every step.
        with self.attention(inputs["input_ids"]), without_cache(self._config):
            out = self._model(**inputs, **self._options)
        if self._task.own_loss is not None:
            return Returned(out, inputs)
        return self._task.output(out, inputs, self._config) if self._head is None else out[0]

    def outputs(self, out: Any) -> Tensor:
        """[rows, ...] for predictions, from the result of ``forward``."""
        found: Tensor = self._task.output(out.out, out.inputs, self._config) if isinstance(out, Returned) else out
        return found

    def attention(self, ids: Tensor) -> AbstractContextManager[None]:
        """Context for attention on ``ids`` [rows, length]; a backward that recomputes a layer needs it too."""
        return _attention(ids.shape[-1], self._dtype, ids.device)

    def loss(self, out: Any, labels: Tensor) -> Tensor:
        """The mean over all rows, or all labelled tokens, if all rows go through the same adapters."""
        return self.losses(out, labels, {"": slice(None)})[""]

    def losses(self, out: Any, labels: Tensor, rows: Mapping[str, slice]) -> dict[str, Tensor]:
        """Each slot's mean over its rows or, if tokens are labelled, over its labelled tokens.

        ``rows`` tile the batch in its order.
        """
        return {name: each.mean() for name, each in self._each(out, labels, rows).items()}

    def row_losses(self, out: Any, labels: Tensor, rows: Mapping[str, slice]) -> Tensor:
        """[rows] of the batch, float64 on the CPU: the sum of each row's losses, which has ``Task.count`` terms."""
        each = torch.cat([*self._each(out, labels, rows).values()]).detach().cpu().double()
        if isinstance(out, Returned) or self._task.layout == "row":
            return each
        labelled = self._labelled(labels).cpu()
        return torch.zeros(labelled.shape, dtype=torch.float64).masked_scatter_(labelled, each).sum(-1)

    def _each(self, out: Any, labels: Tensor, rows: Mapping[str, slice]) -> dict[str, Tensor]:
        """The losses of each slot's rows, or of its labelled tokens, in order."""
        if isinstance(out, Returned):
            return {name: self._own(out, labels, own) for name, own in rows.items()}
        if self._task.layout == "row":
            each = self._task.row_losses(_wide(out), labels, list(rows.values()), self._config)
            return {name: each[own] for name, own in rows.items()}
        if self._head is not None and not _frozen(self._head):
            return {name: self._through_head(name, out[own], labels[own]) for name, own in rows.items()}
        found, targets = self._predictions(out, labels)
        if self._head is None:
            each = F.cross_entropy(found, targets, reduction="none")
        else:
            each = linear_cross_entropy(found, *_numbers(self._head), targets, self._logits)
        counts = self._labelled(labels).sum(-1).tolist()  # of all rows at once: each transfer waits for the device
        return dict(zip(rows, torch.split(each, [sum(counts[own]) for own in rows.values()]), strict=True))

    def prove(self, site: str, inputs: Mapping[str, Tensor], labels: Tensor) -> bool:
        """Find out by frozen forwards which rows the layers' inputs hold; True if that is known at ``site`` then."""

        def forward(labels: Tensor, **inputs: Tensor) -> Tensor:
            return self.outputs(self.forward(inputs, labels))

        return mixed.prove(self._lora, forward, (labels,), inputs, len(labels), site)

    def _through_head(self, name: str, out: Tensor, labels: Tensor) -> Tensor:
        """[labelled tokens] of one slot, whose head is its own or carries its adapter."""
        dispatcher, route = self._lora.lora_dispatcher, self._lora.lora_dispatcher.route
        alone = route.alone(name) if route.blocks else route
        module: Any = self._head

        def head(hidden: Tensor) -> Tensor:  # also called in the backward
            with dispatcher.with_route(alone):
                found: Tensor = module(hidden)
            return self._logits(found)

        hidden, targets = self._predictions(out, labels)
        return head_cross_entropy(hidden, head, len(module.weight), targets)

    def _own(self, out: Returned, labels: Tensor, rows: slice) -> Tensor:
        """[rows] losses by the user's own function, which sees these rows alone.

        Raises:
            ConfigError: the function returns something else.
        """
        assert self._task.own_loss is not None
        count = len(labels)
        batch = {name: _rows_of(tensor, rows, count) for name, tensor in {**out.inputs, "labels": labels}.items()}
        found = self._task.own_loss(_rows_of(out.out, rows, count), batch)
        wanted = (len(batch["labels"]),)
        if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
            shape = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"loss: must return one value for each row, a tensor of shape {wanted}, found {shape}")
        return found

    def _labelled(self, labels: Tensor) -> Tensor:
        """[rows, ...] of booleans: the positions whose prediction has a label."""
        return (labels[:, 1:] if self._task.shifted else labels) != IGNORE

    def _predictions(self, out: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of labelled positions: hidden states [n, dim] or logits [n, classes] in at least float32, and targets [n]."""
        kept = self._labelled(labels).flatten().nonzero().squeeze(-1)
        if self._task.shifted:
            out, labels = out[:, :-1], labels[:, 1:]
        out, labels = out.flatten(0, 1).index_select(0, kept), labels.flatten().index_select(0, kept)
        return (out if self._head is not None else _wide(out)), labels


@dataclass(frozen=True)
class Returned:
    """The model's output for these inputs, for a user's own loss."""

    out: Any
    inputs: Mapping[str, Tensor]


def _rows_of(value: Any, rows: slice, count: int) -> Any:
    """``value`` with only these ``rows`` in every tensor whose first dimension is the batch's ``count`` rows."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == count else value
    if isinstance(value, Mapping):  # including transformers' outputs, which keep their class
        return type(value)(**{name: _rows_of(item, rows, count) for name, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(item, rows, count) for item in value)
    return value


def _wide(logits: Tensor) -> Tensor:
    """In at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _attention(length: int, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Plain attention for short rows in half precision on a CPU, where the fused one takes up to three times as long.

    Measured forward and backward on 32 to 1024 tokens (benchmarks/attention.py). Without a backward, fused is faster.
    """
    if device.type == "cpu" and dtype in HALF and length <= PLAIN_ATTENTION and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _frozen(head: nn.Module) -> bool:
    parameters = [head._parameters.get(name) for name in ("weight", "bias")]
    return type(head) is nn.Linear and not any(p is not None and p.requires_grad for p in parameters)


def _numbers(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear head."""
    weight = head._parameters["weight"]
    assert weight is not None
    return weight, head._parameters.get("bias")
