"""seq-cls: one class of a text or pair of texts, several classes, or a number (regression)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.config.lora import TaskType
from loraloom.data.example import Example
from loraloom.data.records import Labelled, Record
from loraloom.data.shape.forms import Form, read_labelled, read_pair
from loraloom.data.shape.labels import NUMBER, SEVERAL, SINGLE
from loraloom.data.tokenize.labels import LabelEncoder, class_names
from loraloom.models import padding
from loraloom.tasks.base import Examples, Inputs, Outputs, Task, named_classes
from loraloom.tasks.baseline import TRIED, Answer, Constant, Known, name_of, surprise
from loraloom.tasks.metrics.kinds import CLASSES, NUMBERS, SEVERAL_CLASSES, Kind, Scores
from loraloom.tasks.outputs import NOTHING, EvalRows, Predictions, words_of


class SequenceClassification(Task):
    name = "seq-cls"
    task_type = TaskType.SEQ_CLS
    encoder = LabelEncoder
    options = {"problem_type": "what the labels of texts are"}  # noqa: RUF012
    forms = (
        Form("text-label", ("text", "label"), read_labelled),
        Form("pair-label", ("text1", "text2", "label"), read_pair),
    )
    indivisible = "its label is of the text as a whole"
    class_word = "label"
    one_class = "a classifier needs two classes or more; all {rows} rows are labelled {only}"
    new_head = True
    needs = ()
    by_last_token = True
    without_pooler = True

    text_column = "text"

    def answered(self, columns: Mapping[str, Any], labels: Sequence[str], problem: str | None) -> dict[str, Any]:
        return {**columns, "label": 0.5 if problem == NUMBER else [labels[0]] if problem == SEVERAL else labels[0]}

    def class_names(self, record: Record) -> list[str]:
        assert isinstance(record, Labelled)
        return class_names(record.label)

    def head(self, labels: Sequence[str], problem_type: str | None) -> dict[str, Any]:
        if problem_type == NUMBER:
            return {"num_labels": 1, "problem_type": NUMBER}
        return {**named_classes(labels), "problem_type": problem_type or SINGLE}

    def inputs(self, model: Any, inputs: Inputs, labels: Tensor | None) -> Inputs:
        arranged = padding.for_rows(getattr(model, "config", None))
        return inputs if arranged is None else arranged(inputs)

    def row_losses(self, out: Tensor, labels: Tensor, groups: Sequence[slice], config: Any) -> Tensor:
        """The config decides the loss or, as in transformers, the labels."""
        kind = getattr(config, "problem_type", None)
        if kind == NUMBER or (kind is None and out.shape[-1] == 1):
            wanted = labels.to(out.dtype).view(out.shape)
            return F.mse_loss(out, wanted, reduction="none").mean(-1)
        if kind == SEVERAL or labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(out, labels.to(out.dtype), reduction="none").mean(-1)
        return F.cross_entropy(out, labels, reduction="none")

    def kinds(self, problem: str | None = None) -> tuple[Kind, ...]:
        return ({NUMBER: NUMBERS, SEVERAL: SEVERAL_CLASSES}.get(problem or SINGLE, CLASSES),)

    def problem_of(self, examples: Examples) -> str | None:
        first = examples[0].labels if len(examples) else 0
        if isinstance(first, float):
            return NUMBER
        return SEVERAL if isinstance(first, list) else SINGLE

    def predictions(self, examples: Examples, outputs: Outputs, held_out: EvalRows) -> Predictions:
        made = Predictions()

        def named(number: int) -> str:
            return held_out.labels[number] if held_out.labels else str(number)

        for place, (example, logits) in enumerate(zip(examples, outputs, strict=True)):
            assert logits is not None
            right, none = example.labels, bool(logits.isnan().any())
            if isinstance(right, list):
                found = [NOTHING] if none else [named(i) for i, logit in enumerate(logits.tolist()) if logit > 0]
                made.add(found, [named(i) for i, one in enumerate(right) if one], place)
            elif isinstance(right, float):
                made.add(float(logits), right, place)
            else:
                made.add(NOTHING if none else named(int(logits.argmax())), named(right), place)
        return made

    def constant(self, examples: Examples, known: Known) -> Constant | None:
        labels: list[Any] = [example.labels for example in examples]
        if known.problem == NUMBER:
            return _number([float(label) for label in labels])
        return _several(labels, known.labels) if known.problem == SEVERAL else _class(labels, known.labels)

    def shown_input(self, record: Record, example: Example, tokenizer: Any) -> str:
        assert isinstance(record, Labelled)
        return record.text if record.second is None else f"{record.text} | {record.second}"

    def shown_value(self, record: Record, value: Any, output: Tensor | None = None) -> str:
        words = words_of(value)
        sure = output is not None and isinstance(value, str)
        return f"{words} ({float(output.softmax(-1).max()):.0%})" if sure and output is not None else words

    def shown_target(self, example: Example, tokenizer: Any, names: Sequence[str]) -> str | None:
        labels = example.labels
        if isinstance(labels, list):
            return ", ".join(name for name, applies in zip(names, labels, strict=True) if applies) or "(none)"
        return names[labels] if names and isinstance(labels, int) else f"{labels:g}"

    def usage(self, options: Any, problem: str | None, config: Any) -> dict[str, Any]:
        return {"problem_type": problem or SINGLE}


def _class(labels: Sequence[int], names: Sequence[str]) -> Constant:
    classes = max(len(names), max(labels) + 1)
    counts = Counter(labels)
    loss = surprise(counts, range(classes))
    answers = [(f"always {name_of(names, label)}", _always(label, classes)) for label, _ in counts.most_common(TRIED)]
    return Constant(answers[0][0], lambda e: Scores(loss[e.labels], 1), answers)  # type: ignore[index]


def _always(label: int, classes: int) -> Answer:
    logits = torch.zeros(classes)
    logits[label] = 1.0
    return lambda example: logits


def _number(labels: Sequence[float]) -> Constant:
    mean, middle = fmean(labels), median(labels)
    answers: list[tuple[str, Answer]] = [
        (f"always the {what}, {value:.4g}", lambda example, value=value: torch.tensor([value], dtype=torch.float64))  # type: ignore[misc]
        for what, value in (("mean", mean), ("median", middle))
    ]
    return Constant(answers[0][0], lambda e: Scores((float(e.labels) - mean) ** 2, 1), answers)  # type: ignore[arg-type]


def _several(labels: Sequence[Sequence[float]], names: Sequence[str]) -> Constant:
    shares = torch.tensor(labels, dtype=torch.float64).mean(0)
    safe = shares.clamp(0.5 / len(labels), 1 - 0.5 / len(labels))
    order = shares.argsort(descending=True, stable=True).tolist()

    def score(example: Example) -> Scores:
        right = torch.tensor(example.labels, dtype=torch.float64)
        return Scores(float(-(right * safe.log() + (1 - right) * (1 - safe).log()).mean()), 1)

    def first(count: int) -> Answer:
        logits = torch.full((len(order),), -1.0)
        logits[order[:count]] = 1.0
        return lambda example: logits

    answers = []
    for count in range(min(TRIED, len(order)) + 1):
        said = " and ".join(name_of(names, one) for one in order[:count]) if 0 < count < 4 else f"the {count} commonest"
        answers.append((f"always {said}" if count else "always none", first(count)))
    return Constant("always the labels' shares", score, answers)
