"""What a task is: everything that reading rows, loading a model, the loss, figures and reports ask about it.

One object without state for each task, in a file of its own; ``tasks.get`` finds it. Nothing else branches on tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from loraloom.config.lora import TASK_HEADS, TaskType
from loraloom.data import batches
from loraloom.data.example import IGNORE, Encoder, Example, Settings
from loraloom.data.records import Record
from loraloom.data.shape.forms import Form
from loraloom.data.task import Layout
from loraloom.lora.auto import AUTO_CLASS
from loraloom.tasks.baseline import Constant, Known
from loraloom.tasks.metrics.kinds import Kind
from loraloom.tasks.outputs import EvalRows, Predictions, words_of

Inputs = Mapping[str, Tensor]


class Task:
    """One task. Members that a task does not set have the values below."""

    #: its name on the command line and in run files
    name: str
    #: PEFT's name
    task_type: TaskType
    #: options of ``TrainConfig`` that only some tasks read, this one among them, and what they are
    options: Mapping[str, str] = MappingProxyType({})

    # -- rows

    #: shapes of rows, in the order in which they are tried
    forms: tuple[Form, ...]
    #: what carries a label
    layout: Layout
    #: tokens that a row needs beside the special ones
    min_tokens: int = 1
    #: why a row cannot be split; empty where it can
    indivisible: str = ""
    #: rows over length are read in windows, whether they are to be cut or split
    windows: bool = False
    #: what a class is called; empty where labels are no classes
    class_word: str = ""
    #: what is wrong with ``rows`` rows of the one class ``only``
    one_class: str = ""

    def encoder(self, tokenizer: Any, settings: Settings) -> Encoder:
        """What makes examples of records."""
        raise NotImplementedError

    def class_names(self, record: Record) -> list[str]:
        """The classes that a record names."""
        return []

    def notes(self, labels: Sequence[str]) -> list[str]:
        """What to say of these classes before training."""
        return []

    def collate(self, examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
        """The tensors of a batch: see ``data.batches.collate``."""
        return batches.collate(examples, pad_id, self.layout)

    def count(self, example: Example) -> int:
        """Predictions that the loss of an example is a mean of: its weight where gradients are accumulated."""
        if self.layout == "row" or not isinstance(example.labels, list):
            return 1
        return sum(label != IGNORE for label in example.labels[self.shifted :])

    # -- the model

    #: most folders lack the head, and it is trained in full
    new_head: bool = False
    #: a decoder answers at the row's last token, which it finds by its config's padding token
    by_last_token: bool = False
    #: text is read in one direction, also by models that read a prompt in both
    one_way: bool = False
    #: a model whose folder lacks the pooler will do
    without_pooler: bool = False

    @property
    def auto_class(self) -> str:
        """The class of transformers that has a model for it."""
        return AUTO_CLASS[self.task_type]

    @property
    def heads(self) -> tuple[str, ...]:
        """Modules that PEFT trains in full for this task, by their usual names."""
        return TASK_HEADS.get(self.task_type, ())

    def head(self, labels: Sequence[str], problem_type: str | None) -> dict[str, Any]:
        """What the config says of a new head."""
        return {}

    def key_mapping(self, config: Any) -> dict[str, str]:
        """Patterns of names of weights that the published folder has under others."""
        return {}

    def check_model(self, name: str, config: Any) -> None:
        """Raise ``ModelError`` if the model ``name`` with this config cannot learn the task."""

    # -- the forward and the loss

    #: the head is applied in the loss, to labelled tokens alone
    head_in_loss: bool = False
    #: each token predicts the next one
    shifted: bool = False

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

    # -- held-out rows

    #: predictions are texts that the adapter writes
    generates: bool = False

    def kinds(self, problem: str | None = None) -> tuple[Kind, ...]:
        """The kinds of metrics that rows of this problem type may turn out to have."""
        raise NotImplementedError

    def kind(self, problem: str | None = None, labels: Sequence[str] = ()) -> Kind:
        """The one of them that rows with these classes have."""
        return self.kinds(problem)[0]

    def problem_of(self, examples: Sequence[Example]) -> str | None:
        """The problem type of these examples."""
        return None

    def can_predict(self, held_out: EvalRows) -> bool:
        """Whether ``held_out`` has what predictions are made of."""
        return held_out.tokenizer is not None

    def own(self, out: Tensor, example: Example) -> Tensor:
        """The part of one row's output that is not padding."""
        if self.layout == "row" or not isinstance(example.labels, list):
            return out
        return out[: len(example.labels)]

    def kept(self, out: Tensor) -> Tensor:
        """What is kept of the output of a batch for ``predictions``."""
        return out.float()

    def predictions(
        self, examples: Sequence[Example], outputs: Sequence[Tensor | None], held_out: EvalRows
    ) -> Predictions:
        """What is predicted and what is right, of tasks that do not generate; ``outputs`` are each example's kept ones.

        Where these are NaN, ``NOTHING`` is predicted.
        """
        raise NotImplementedError

    def prompt_and_target(self, example: Example) -> tuple[list[int], list[int]]:
        """Of tasks that generate: what the model is given, and what it is to write."""
        raise NotImplementedError

    def target_of(self, record: Record) -> str | None:
        """Of tasks that generate: the whole text that is to be written, where a record has it."""
        return None

    def constant(self, examples: Sequence[Example], known: Known) -> Constant | None:
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

    def usage(self, options: Any, problem: str | None) -> dict[str, Any]:
        """What whoever uses the adapter has to know, beside classes and template: plain JSON."""
        return {}


def named_classes(labels: Sequence[str]) -> dict[str, Any]:
    """What a config says of a head for these classes."""
    numbers = {label: number for number, label in enumerate(labels)}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": numbers}
