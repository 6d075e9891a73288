"""What a task is: everything that reading rows, loading a model, the loss, figures and reports ask about it.

One object without state for each task, in a file of its own; ``tasks.get`` finds it. Nothing else branches on tasks.
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
#: of each example, what ``Task.kept`` left of it
Outputs = Sequence[Tensor | None]
OwnLoss = Callable[[Any, Inputs], Tensor]


class Task(RowTask, ModelTask):
    """One task. Members that a task does not set have the values below, or those of the classes above."""

    #: options of ``TrainConfig`` that only some tasks read, this one among them, and what they are
    options: Mapping[str, str] = MappingProxyType({})

    # -- rows

    def collate(self, examples: Examples, pad_id: int) -> dict[str, Tensor]:
        """The tensors of a batch: see ``data.batches.collate``."""
        return batches.collate(examples, pad_id, self.layout)

    #: texts of a row that go through the model by themselves
    texts = 1

    def widest(self, examples: Examples) -> tuple[int, int]:
        """Rows of a batch that an example makes at most, and tokens of the longest."""
        return self.texts, max(map(int, lengths_of(examples)))

    def adapted(self, model: Any, config: LoraConfig) -> LoraConfig:
        """``config`` that leaves alone what has no part in the task's output."""
        return text_only(model, config)

    def count(self, example: Example) -> int:
        """Predictions that the loss of an example is a mean of: its weight where gradients are accumulated."""
        if self.layout == "row" or self.own_loss is not None or not isinstance(example.labels, list):
            return 1
        return sum(label != IGNORE for label in example.labels[self.shifted :])

    # -- the forward and the loss

    #: the head is applied in the loss, to labelled tokens alone
    head_in_loss = False
    #: each token predicts the next one
    shifted = False
    #: a user's own loss: see ``with_loss``
    own_loss: OwnLoss | None = None

    def with_loss(self, function: OwnLoss) -> Task:
        """The same task with a user's own loss.

        Args:
            function: (what the model returns for a slot's rows, these rows with their labels) → [rows] losses. Rows of
                other slots are never among them.
        """
        made = copy.copy(self)
        made.own_loss, made.head_in_loss, made.compares_rows = function, False, False
        return made

    def inputs(self, model: Any, inputs: Inputs, labels: Tensor | None) -> Inputs:
        """The model's arguments; ``labels`` are read where a decoder begins from them."""
        return inputs

    def output(self, out: Any, inputs: Inputs, config: Any) -> Tensor:
        """[rows, ...] for the loss, of what the model returns."""
        logits: Tensor = out.logits
        return logits

    def row_losses(self, out: Tensor, labels: Tensor, groups: Sequence[slice], config: Any) -> Tensor:
        """[rows], of tasks with labels by row. ``groups`` are the rows of each slot, which never meet those of others.

        ``out`` is in at least float32.
        """
        raise NotImplementedError

    def probe_rows(self, batch: Inputs) -> slice:
        """The rows of ``batch`` that show whether everything gets a gradient: the longest."""
        mask = batch.get("attention_mask", batch["input_ids"])
        row = int(mask.ne(0).flatten(1).sum(1).argmax())
        return slice(row, row + 1)

    # -- rows without an answer

    #: the column that a text given by itself stands for; empty where a row needs several
    text_column: str = ""

    def answered(self, columns: Mapping[str, Any], labels: Sequence[str], problem: str | None) -> dict[str, Any]:
        """A row's columns with a placeholder for the answer that is asked for, which nothing is made of."""
        raise NotImplementedError

    def answers(self, examples: Examples, outputs: Outputs, held_out: EvalRows) -> Predictions:
        """The answers to such rows."""
        return self.predictions(examples, outputs, held_out)

    # -- held-out rows

    #: predictions are texts that the adapter writes
    generates = False

    #: members of ``EvalRows`` that predictions are made of
    needs: tuple[str, ...] = ("tokenizer",)
    #: the kinds of metrics that rows may turn out to have
    metrics: tuple[Kind, ...]

    def kinds(self, problem: str | None = None) -> tuple[Kind, ...]:
        """Those of rows of this problem type."""
        return self.metrics

    def kind(self, problem: str | None = None, labels: Sequence[str] = ()) -> Kind:
        """The one of them that rows with these classes have."""
        return self.kinds(problem)[0]

    def problem_of(self, examples: Examples) -> str | None:
        """The problem type of these examples."""
        return None

    def own(self, out: Tensor, example: Example) -> Tensor:
        """The part of one row's output that is not padding."""
        if self.layout == "row" or not isinstance(example.labels, list):
            return out
        return out[: len(example.labels)]

    def kept(self, out: Tensor, examples: int) -> Tensor:
        """[examples, ...]: what is kept of the output of a batch for ``predictions``."""
        return out.float()

    def predictions(self, examples: Examples, outputs: Outputs, held_out: EvalRows) -> Predictions:
        """What is predicted and what is right, of tasks that do not generate; ``outputs`` are each example's kept ones.

        Where these are NaN, ``NOTHING`` is predicted.
        """
        raise NotImplementedError

    #: the loss of a row depends on the other rows of its batch
    compares_rows = False

    def losses(self, examples: Examples, outputs: Outputs, block: int) -> list[float]:
        """Of tasks that compare rows: the loss of each example among ``block`` of them, however they were batched."""
        raise NotImplementedError

    def prompt_and_target(self, example: Example) -> tuple[list[int], list[int]]:
        """Of tasks that generate: what the model is given, and what it is to write."""
        raise NotImplementedError

    def target_of(self, record: Record) -> str | None:
        """Of tasks that generate: the whole text that is to be written, where a record has it."""
        return None

    def constant(self, examples: Examples, known: Known) -> Constant | None:
        """The best answer that does not look at the row; None where there is none."""
        raise NotImplementedError

    # -- for people

    def shown_input(self, record: Record, example: Example, tokenizer: Any) -> str:
        """A row's input in one line."""
        raise NotImplementedError

    def shown_value(self, record: Record, value: Any, output: Tensor | None = None) -> str:
        """A prediction, or what is right; ``output`` is what it was made of."""
        return words_of(value)

    def shown_target(self, example: Example, tokenizer: Any, names: Sequence[str]) -> str | None:
        """What is trained on, where it is not some of the row's own tokens."""
        return None

    def usage(self, options: Any, problem: str | None, config: Any) -> dict[str, Any]:
        """What whoever uses the adapter has to know, beside classes and template: plain JSON."""
        return {}


def named_classes(labels: Sequence[str]) -> dict[str, Any]:
    """What a config says of a head for these classes."""
    numbers = {label: number for number, label in enumerate(labels)}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": numbers}
