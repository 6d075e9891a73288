"""The interface of a task: all that reading rows, loading a model, the loss, metrics and reports need to know of it.

Each task is one stateless object in its own file; ``tasks.get`` finds it. No other code branches on tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from loraloom.config.lora import LoraConfig
from loraloom.data import batches
from loraloom.data.example import IGNORE, Example
from loraloom.data.records import Record
from loraloom.data.table.store import lengths_of
from loraloom.data.task import RowTask
from loraloom.models.parts import text_only
from loraloom.models.task import ModelTask
from loraloom.tasks.baseline import Constant, Known
from loraloom.tasks.metrics.kinds import Kind
from loraloom.tasks.outputs import EvalRows, Predictions, words_of

Inputs = Mapping[str, Tensor]
Examples = Sequence[Example]
#: ``Task.kept`` of each example's output
Outputs = Sequence[Tensor | None]
OwnLoss = Callable[[Any, Inputs], Tensor]


class Task(RowTask, ModelTask):
    """One task. Members that a task does not set have the defaults below, or those of the base classes."""

    #: options of ``TrainConfig`` that this task reads and others do not, with a description
    options: Mapping[str, str] = MappingProxyType({})

    # -- rows

    def collate(self, examples: Examples, pad_id: int) -> dict[str, Tensor]:
        """The tensors of a batch: see ``data.batches.collate``."""
        return batches.collate(examples, pad_id, self.layout)

    #: texts of an example that are rows of their own in a batch
    texts = 1

    def widest(self, examples: Examples) -> tuple[int, int]:
        """Rows of a batch per example, and tokens of the longest one."""
        return self.texts, max(map(int, lengths_of(examples)))

    def adapted(self, model: Any, config: LoraConfig) -> LoraConfig:
        """``config`` without modules that have no part in the task's output."""
        return text_only(model, config)

    def count(self, example: Example) -> int:
        """Number of predictions in an example's loss: its weight when gradients are accumulated."""
        if self.layout == "row" or self.own_loss is not None or not isinstance(example.labels, list):
            return 1
        return sum(label != IGNORE for label in example.labels[self.shifted :])

    # -- the forward and the loss

    #: the loss applies the head, to labelled tokens only
    head_in_loss = False
    #: each token predicts the next one
    shifted = False
    #: a user's own loss: see ``with_loss``
    own_loss: OwnLoss | None = None

    def with_loss(self, function: OwnLoss) -> Task:
        """The same task with a user's own loss.

        Args:
            function: (the model's output for a slot's rows, these rows with their labels) → [rows] losses. It never
                sees rows of other slots.
        """
        made = copy.copy(self)
        made.own_loss, made.head_in_loss, made.compares_rows = function, False, False
        return made

    def inputs(self, model: Any, inputs: Inputs, labels: Tensor | None) -> Inputs:
        """The model's arguments. ``labels`` give the inputs of a decoder beside an encoder."""
        return inputs

    def output(self, out: Any, inputs: Inputs, config: Any) -> Tensor:
        """[rows, ...] for the loss, from the model's output."""
        logits: Tensor = out.logits
        return logits

    def row_losses(self, out: Tensor, labels: Tensor, groups: Sequence[slice], config: Any) -> Tensor:
        """[rows] of a task with labels by row. ``groups`` are the rows of each slot, which must not mix.

        ``out`` is in at least float32.
        """
        raise NotImplementedError

    def probe_rows(self, batch: Inputs) -> slice:
        """The rows of ``batch`` to test gradients with: the longest."""
        mask = batch.get("attention_mask", batch["input_ids"])
        row = int(mask.ne(0).flatten(1).sum(1).argmax())
        return slice(row, row + 1)

    # -- rows without an answer

    #: the column that a plain text fills; empty if a row needs several columns
    text_column: str = ""

    def answered(self, columns: Mapping[str, Any], labels: Sequence[str], problem: str | None) -> dict[str, Any]:
        """A row's columns with a placeholder for the answer."""
        raise NotImplementedError

    def answers(self, examples: Examples, outputs: Outputs, held_out: EvalRows) -> Predictions:
        """The answers to such rows."""
        return self.predictions(examples, outputs, held_out)

    # -- held-out rows

    #: predictions are generated texts
    generates = False

    #: members of ``EvalRows`` that predictions need
    needs: tuple[str, ...] = ("tokenizer",)
    #: the kinds of metrics that rows may have
    metrics: tuple[Kind, ...]

    def kinds(self, problem: str | None = None) -> tuple[Kind, ...]:
        """The kinds of rows with this problem type."""
        return self.metrics

    def kind(self, problem: str | None = None, labels: Sequence[str] = ()) -> Kind:
        """The kind of rows with these classes."""
        return self.kinds(problem)[0]

    def problem_of(self, examples: Examples) -> str | None:
        """The problem type of these examples."""
        return None

    def own(self, out: Tensor, example: Example) -> Tensor:
        """One row's output without padding."""
        if self.layout == "row" or not isinstance(example.labels, list):
            return out
        return out[: len(example.labels)]

    def kept(self, out: Tensor, examples: int) -> Tensor:
        """[examples, ...]: what ``predictions`` need of a batch's output."""
        return out.float()

    def predictions(self, examples: Examples, outputs: Outputs, held_out: EvalRows) -> Predictions:
        """Predictions and right answers of a task that does not generate. ``outputs``: ``kept`` of each example.

        The prediction of NaN is ``NOTHING``.
        """
        raise NotImplementedError

    #: the loss of a row depends on the other rows of its batch
    compares_rows = False

    def losses(self, examples: Examples, outputs: Outputs, block: int) -> list[float]:
        """Of a task that compares rows: the loss of each example among ``block`` examples, for any batch size."""
        raise NotImplementedError

    def prompt_and_target(self, example: Example) -> tuple[list[int], list[int]]:
        """Of a task that generates: the tokens of the prompt and of the text to write."""
        raise NotImplementedError

    def target_of(self, record: Record) -> str | None:
        """Of a task that generates: the full text to write, if the record has it."""
        return None

    def constant(self, examples: Examples, known: Known) -> Constant | None:
        """The best answer that ignores the row; None if there is none."""
        raise NotImplementedError

    # -- for people

    def shown_input(self, record: Record, example: Example, tokenizer: Any) -> str:
        """A row's input in one line."""
        raise NotImplementedError

    def shown_value(self, record: Record, value: Any, output: Tensor | None = None) -> str:
        """A prediction or a right answer; ``output`` is the prediction's output."""
        return words_of(value)

    def shown_target(self, example: Example, tokenizer: Any, names: Sequence[str]) -> str | None:
        """The target, if it is not part of the row's own tokens."""
        return None

    def usage(self, options: Any, problem: str | None, config: Any) -> dict[str, Any]:
        """Plain JSON for users of the adapter, beside classes and template."""
        return {}


def named_classes(labels: Sequence[str]) -> dict[str, Any]:
    """Config fields of a head for these classes."""
    numbers = {label: number for number, label in enumerate(labels)}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": numbers}
