"""From a batch to losses: one forward for all slots, then each slot's own loss, or scores, on its own rows.

A causal language model is run up to its head, and the head only for tokens that carry a label (``train.loss``).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from loraloom.config.lora import TaskType
from loraloom.data.example import IGNORE
from loraloom.errors import ModelError
from loraloom.lora.frozen import HALF
from loraloom.lora.model import PeftModel
from loraloom.models import padding
from loraloom.models.configs import segments, without_cache
from loraloom.tasks.head_split import Split, split
from loraloom.tasks.linear_cross_entropy import (
    Logits,
    frozen_head,
    head_cross_entropy,
    head_scores,
    linear_cross_entropy,
)
from loraloom.tasks.metrics.registry import Scores

#: Tokens in a row up to which plain attention is the faster in half precision on a CPU.
PLAIN_ATTENTION = 128


class Objective:
    """What ``task`` asks of ``model``, whose structure is looked at once, here."""

    def __init__(self, model: PeftModel, task: TaskType) -> None:
        self._task = task
        self._router = model.base_model.lora_router
        self._model = model.get_base_model()
        self._config = getattr(self._model, "config", None)
        self._dtype = next(p.dtype for p in self._model.parameters() if p.is_floating_point())
        self._head: nn.Module | None = None
        #: how a causal language model comes to its logits
        self.way = split(model) if task is TaskType.CAUSAL_LM else None
        self._logits = Logits()
        if isinstance(self.way, Split):
            self._model, self._head, self._logits = self.way.trunk, self.way.head, self.way.logits
        arguments = inspect.signature(self._model.forward).parameters
        #: For forwards that read it from their arguments alone; see ``forward`` for the others.
        self._options = {"use_cache": False} if "use_cache" in arguments else {}
        #: Tokenizers may tell segments apart that the model does not.
        self._arranged = padding.for_rows(self._config) if task is TaskType.SEQ_CLS else None
        self._segments = "token_type_ids" in arguments and segments(self._config) > 1

    def forward(self, inputs: Mapping[str, Tensor], labels: Tensor | None = None) -> Tensor:
        """[rows, ...] for ``losses`` and ``score``: hidden states where the head is applied later, else logits.

        For question-answering [rows, length, 2]: each token as the start and as the end of the answer. ``labels`` are
        read by models alone whose decoder begins from them (seq2seq-lm).
        """
        if self._task is TaskType.SEQ_2_SEQ_LM and labels is not None and "decoder_input_ids" not in inputs:
            inputs = {**inputs, "decoder_input_ids": decoder_inputs(self._model, labels)}
        if not self._segments:
            inputs = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
        if self._arranged is not None:
            inputs = self._arranged(inputs)
        # A cache of keys and values is for generation; filling it costs time and memory in every step.
        with self.attention(inputs["input_ids"]), without_cache(self._config):
            out = self._model(**inputs, **self._options)
        if self._task is TaskType.QUESTION_ANS:
            return _spans(out, inputs.get("attention_mask"))
        found: Tensor = out.logits if self._head is None else out[0]
        return found

    def attention(self, ids: Tensor) -> AbstractContextManager[None]:
        """How attention is computed on ``ids`` [rows, length]; a backward that runs a layer again needs it as well."""
        return _attention(ids.shape[-1], self._dtype, ids.device)

    def loss(self, out: Tensor, labels: Tensor) -> Tensor:
        """``losses`` where all rows go through the same adapters."""
        return self.losses(out, labels, {"": slice(None)})[""]

    def losses(self, out: Tensor, labels: Tensor, rows: Mapping[str, slice]) -> dict[str, Tensor]:
        """Each slot's mean over its rows or, where labels are [rows, length], over its labelled tokens.

        By rows go seq-cls (labels [rows], whole numbers or measured ones, or [rows, classes] of 0 and 1) and
        question-answering (labels [rows, 2], the first and the last token of the answer). For causal-lm each position
        predicts the next. ``rows`` tile the batch in its order.
        """
        if self._by_rows(labels):
            each = self._row_losses(_wide(out), labels)
            return {name: each[own].mean() for name, own in rows.items()}
        if self._head is not None and not _frozen(self._head):
            return {name: self._through_head(name, out[own], labels[own]).mean() for name, own in rows.items()}
        found, targets = self._predictions(out, labels)
        if self._head is None:
            each = F.cross_entropy(found, targets, reduction="none")
        else:
            each = linear_cross_entropy(found, *_numbers(self._head), targets, self._logits)
        counts = self._asked(labels).sum(-1).tolist()  # of all rows at once: each asking waits for the device
        sizes = [sum(counts[own]) for own in rows.values()]
        return {name: part.mean() for name, part in zip(rows, torch.split(each, sizes), strict=True)}

    def _through_head(self, name: str, out: Tensor, labels: Tensor) -> Tensor:
        """[labelled tokens] of one slot, whose head is its own or carries its adapter."""
        router, route = self._router, self._router.route
        alone = route.alone(name) if route.blocks else route

        def head(hidden: Tensor) -> Tensor:  # also called in the backward
            assert self._head is not None
            with router.using(alone):
                found: Tensor = self._head(hidden)
            return self._logits(found)

        hidden, targets = self._predictions(out, labels)
        return head_cross_entropy(hidden, head, self._vocabulary, targets)

    def score(self, out: Tensor, labels: Tensor) -> Scores:
        if self._by_rows(labels):
            return Scores(float(self._row_losses(_wide(out), labels).sum()), len(labels))
        found, targets = self._predictions(out, labels)
        if self._head is None:
            return Scores(float(F.cross_entropy(found, targets, reduction="sum")), targets.numel())
        head = frozen_head(*_numbers(self._head), self._logits) if _frozen(self._head) else self._whole_head
        total, _ = head_scores(found, head, self._vocabulary, targets)
        return Scores(total, targets.numel())

    def _whole_head(self, hidden: Tensor) -> Tensor:
        assert self._head is not None
        return self._logits(self._head(hidden))

    @property
    def _vocabulary(self) -> int:
        assert self._head is not None
        weight = self._head.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0]

    def _by_rows(self, labels: Tensor) -> bool:
        return self._task in (TaskType.SEQ_CLS, TaskType.QUESTION_ANS) or labels.dim() == 1

    def _row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[rows]. Which loss a classifier has follows from its config or, as in transformers, from its labels."""
        if self._task is TaskType.QUESTION_ANS:
            return F.cross_entropy(logits, labels, reduction="none").mean(-1)
        kind = getattr(self._config, "problem_type", None)
        if kind == "regression" or (kind is None and logits.shape[-1] == 1):
            wanted = labels.to(logits.dtype).view(logits.shape)
            return F.mse_loss(logits, wanted, reduction="none").mean(-1)
        if kind == "multi_label_classification" or labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)
        return F.cross_entropy(logits, labels, reduction="none")

    def _asked(self, labels: Tensor) -> Tensor:
        """Which positions a prediction is asked for: [rows, ...] of truth values."""
        return (labels[:, 1:] if self._task is TaskType.CAUSAL_LM else labels) != IGNORE

    def _predictions(self, out: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What is asked for: hidden states [n, dim] or logits [n, classes] in at least float32, and targets [n]."""
        kept = self._asked(labels).flatten().nonzero().squeeze(-1)
        if self._task is TaskType.CAUSAL_LM:
            out, labels = out[:, :-1], labels[:, 1:]
        out, labels = out.flatten(0, 1).index_select(0, kept), labels.flatten().index_select(0, kept)
        return (out if self._head is not None else _wide(out)), labels


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """What a decoder begins from to say ``labels``, both [rows, length]: a start token, then all labels but the last.

    Raises:
        ModelError: the model has no decoder beside an encoder, or its config no start token.
    """
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        found: Tensor = shift(labels=labels)
        return found
    config: Any = getattr(model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"task: seq2seq-lm is for an encoder and a decoder, and {type(model).__name__} is a decoder alone; "
            "train its text as causal-lm"
        )
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ModelError(f"model: the config of {type(model).__name__} has no decoder_start_token_id; set it there")
    padding = getattr(config, "pad_token_id", None) or 0  # as M2M100 and its kin do inside their forward
    before = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, padding)
    return torch.cat([torch.full_like(labels[:, :1], start), before], 1)


def _wide(logits: Tensor) -> Tensor:
    """In at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _spans(out: Any, mask: Tensor | None) -> Tensor:
    """[rows, length, 2], with no weight on padding: a row's loss is not to depend on the length of other rows."""
    both = torch.stack([out.start_logits, out.end_logits], -1)
    return both if mask is None else both.masked_fill((mask == 0).unsqueeze(-1), -torch.inf)


def _attention(length: int, dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Short rows in half precision on a CPU: there torch's fused attention takes up to three times as long as plain.

    Measured forward and backward on 32 to 1024 tokens (benchmarks/attention.py); without a backward the fused one wins.
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
