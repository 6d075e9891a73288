"""Answers that do not look at the row: always the commonest class, the mean, the tag O, the commonest text.

What does no better than the best of these has learned nothing of the rows. Each has the loss that training would show,
which says whether a trial has taken off, and the figures that a trial is measured by.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from loraloom.config.lora import TaskType
from loraloom.data.example import IGNORE, Example
from loraloom.inference.evaluation import Predictions, predictions, prompt_and_target
from loraloom.inference.jackknife import Figures, figures
from loraloom.tasks.metrics.registry import Scores, total
from loraloom.train.setup import Setup

#: Training rows that shares are counted in, and answers of which each is tried on the held-out rows.
COUNTED, TRIED = 5000, 20
#: Texts are answers to choose from where there are at most this share of the rows of them.
DISTINCT = 0.2

Score = Callable[[Example], Scores]
Outputs = Callable[[Example], Tensor]


@dataclass
class Constant:
    """The best answer of its kind by the loss, and answers to measure, in words.

    ``score`` is its loss on a row. Of ``answers`` each gives what the model would put out for a row; ``texts`` are
    those of tasks that generate.
    """

    words: str
    score: Score
    answers: list[tuple[str, Outputs]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def loss(self, examples: Iterable[Example]) -> float:
        return total(self.score(example) for example in examples).loss


def constant(setup: Setup) -> Constant | None:
    """The answer for the task of ``setup``; None where there is none, as for texts that are all different."""
    examples = list(_some(setup.data.train.examples))
    if setup.task is TaskType.SEQ_CLS:
        labels: list[Any] = [example.labels for example in examples]
        if setup.data.problem == "regression":
            return _number([float(label) for label in labels])
        if setup.data.problem == "multi_label_classification":
            return _several(labels, setup.data.names)
        return _class(labels, setup.data.names)
    if setup.task is TaskType.TOKEN_CLS:
        return _tag(examples, setup.data.names)
    if setup.task is TaskType.QUESTION_ANS:
        return _answer(examples)
    return _text(examples, setup)


def training_loss(found: Constant, setup: Setup) -> float:
    """Its mean loss over the training rows."""
    return found.loss(_some(setup.data.train.examples))


def measure(found: Constant, setup: Setup) -> dict[str, Figures]:
    """Answer in words → its figures on the held-out rows, as ``Setup.evaluate_parts`` has them."""
    examples, parts = setup.data.evaluation.examples, setup.parts
    scores = [total(found.score(examples[number]) for number in part) for part in parts]
    if setup.task in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM):
        texts = found.texts if setup.metrics.needs_predictions else found.texts[:1]
        references = [_written(example, setup) for example in examples]
        numbers = list(range(len(examples)))
        saying = {f"always {text!r}": Predictions([text] * len(numbers), references, numbers) for text in texts}
        return {words: figures(setup.metrics, scores, one, parts) for words, one in saying.items()}
    held_out, needed, size = setup.held_out(), setup.metrics.needs_predictions, setup.options.eval_batch_size
    out: dict[str, Figures] = {}
    for words, answer in found.answers if needed else found.answers[:1]:
        outputs = [answer(example) for example in examples] if needed else []
        # Of these tasks predictions follow from the outputs alone.
        said_now = predictions(None, "", setup.task, examples, outputs, size, held_out) if needed else Predictions()  # type: ignore[arg-type]
        out[words] = figures(setup.metrics, scores, said_now, parts)
    return out


def _some(examples: Sequence[Example]) -> Iterator[Example]:
    """At most ``COUNTED`` of them, spread over all."""
    count = len(examples)
    return (examples[i * count // min(count, COUNTED)] for i in range(min(count, COUNTED)))


def _class(labels: Sequence[int], names: Sequence[str]) -> Constant:
    classes = max(len(names), max(labels) + 1)
    counts = Counter(labels)
    loss = _surprise(counts, range(classes))
    answers = [(f"always {_name(names, label)}", _always(label, classes)) for label, _ in counts.most_common(TRIED)]
    return Constant(answers[0][0], lambda e: Scores(loss[e.labels], 1), answers)  # type: ignore[index]


def _always(label: int, classes: int) -> Outputs:
    logits = torch.zeros(classes)
    logits[label] = 1.0
    return lambda example: logits


def _number(labels: Sequence[float]) -> Constant:
    mean, middle = fmean(labels), median(labels)
    answers: list[tuple[str, Outputs]] = [
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

    def first(count: int) -> Outputs:
        logits = torch.full((len(order),), -1.0)
        logits[order[:count]] = 1.0
        return lambda example: logits

    answers = []
    for count in range(min(TRIED, len(order)) + 1):
        said = " and ".join(_name(names, one) for one in order[:count]) if 0 < count < 4 else f"the {count} commonest"
        answers.append((f"always {said}" if count else "always none", first(count)))
    return Constant("always the labels' shares", score, answers)


def _tag(examples: Sequence[Example], names: Sequence[str]) -> Constant:
    counts = Counter(label for e in examples for label in _asked(e))
    loss = _surprise(counts, range(max(len(names), max(counts) + 1)))

    def score(example: Example) -> Scores:
        asked = _asked(example)
        return Scores(math.fsum(loss[label] for label in asked), len(asked))

    def always(tag: int) -> Outputs:
        return lambda example: torch.full((len(example.input_ids),), tag)

    answers = [(f"always {_name(names, tag)}", always(tag)) for tag, _ in counts.most_common(TRIED)]
    return Constant(answers[0][0], score, answers)


def _asked(example: Example) -> list[int]:
    assert isinstance(example.labels, list)
    return [int(label) for label in example.labels if label != IGNORE]


def _answer(examples: Sequence[Example]) -> Constant:
    """No answer (the first token) as often as in the training rows, and else each place as likely as any other."""
    none = sum(e.labels == [0, 0] for e in examples)
    share = min(max(none, 0.5), len(examples) - 0.5) / len(examples) if none else 0.0

    def score(example: Example) -> Scores:
        assert isinstance(example.labels, list)
        places = max(len(example.input_ids) - 1, 1)
        each = [-math.log(max(share, 1e-9)) if not label else math.log(places) - math.log1p(-share)
                for label in example.labels]  # fmt: skip
        return Scores(fmean(each), 1)

    def nothing(example: Example) -> Tensor:
        logits = torch.zeros(len(example.input_ids), 2)
        logits[0] = 1.0
        return logits

    return Constant("always no answer", score, [("always no answer", nothing)])


def _text(examples: Sequence[Example], setup: Setup) -> Constant | None:
    """Where few texts are asked for, as where a text names a class: each as likely as among the training rows."""
    targets = Counter(_target(example, setup.task) for example in examples)
    if len(targets) > DISTINCT * len(examples):
        return None
    all_tokens, count = setup.data.train.largest + 1, len(examples) + 0.5 * (len(targets) + 1)

    def score(example: Example) -> Scores:
        target = _target(example, setup.task)
        unknown = 0.0 if target in targets else len(target) * math.log(all_tokens)
        return Scores(unknown - math.log((targets[target] + 0.5) / count), len(target))

    seen = Counter(_written(example, setup) for example in examples)
    texts = [text for text, _ in seen.most_common(3)]
    return Constant(f"always {texts[0]!r}", score, texts=texts)


def _written(example: Example, setup: Setup) -> str:
    """The text that is asked for."""
    target = prompt_and_target(example, setup.task)[1]
    return str(setup.tokenizer.decode(target, skip_special_tokens=True))


def _target(example: Example, task: TaskType) -> tuple[int, ...]:
    assert isinstance(example.labels, list)
    return tuple(int(label) for label in example.labels[task is TaskType.CAUSAL_LM :] if label != IGNORE)


def _surprise(counts: Counter[int], numbers: Iterable[int]) -> dict[int, float]:
    """Number → minus the logarithm of its share; one that never came is as rare as half a row."""
    whole = counts.total()
    return {number: -math.log(max(counts[number], 0.5) / whole) for number in numbers}


def _name(names: Sequence[str], number: int) -> str:
    return repr(names[number]) if number < len(names) else str(number)
