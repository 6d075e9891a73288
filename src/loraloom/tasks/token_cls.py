"""token-cls: a tag for each word of a text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loraloom.config.lora import TaskType
from loraloom.data.example import IGNORE, Example
from loraloom.data.records import Record, Tagged
from loraloom.data.shape.forms import Form, read_tagged
from loraloom.data.tokenize.tags import TagEncoder
from loraloom.tasks.base import Examples, Outputs, Task, named_classes
from loraloom.tasks.baseline import TRIED, Answer, Constant, Known, name_of, surprise
from loraloom.tasks.metrics.kinds import TAGS, WORDS, Kind, Scores
from loraloom.tasks.metrics.tagging import described, scheme_of
from loraloom.tasks.outputs import NOTHING, EvalRows, Predictions


class TokenClassification(Task):
    name = "token-cls"
    task_type = TaskType.TOKEN_CLS
    encoder = TagEncoder
    forms = (Form("tokens-tags", ("tokens", "tags"), read_tagged),)
    layout = "token"
    class_word = "tag"
    one_class = "two tags or more are needed; all words are tagged {only}"
    new_head = True
    needs = ("labels",)
    metrics = (TAGS, WORDS)  # the names of tags show whether they mark entities

    text_column = "tokens"

    def answered(self, columns: Mapping[str, Any], labels: Sequence[str], problem: str | None) -> dict[str, Any]:
        words = columns.get("tokens")
        words = words.split() if isinstance(words, str) else words
        count = len(words) if isinstance(words, list) else 0
        return {**columns, "tokens": words, "tags": [labels[0]] * count}

    def class_names(self, record: Record) -> list[str]:
        assert isinstance(record, Tagged)
        return [str(tag) for tag in record.tags]

    def notes(self, labels: Sequence[str]) -> list[str]:
        return [described(labels)]

    def head(self, labels: Sequence[str], problem_type: str | None) -> dict[str, Any]:
        return named_classes(labels)

    def kind(self, problem: str | None = None, labels: Sequence[str] = ()) -> Kind:
        if not labels:
            return TAGS
        scheme = scheme_of(labels)
        return WORDS if scheme is None else replace(TAGS, plain=scheme.rows)

    def kept(self, out: Tensor, examples: int) -> Tensor:
        """The number of each token's best tag; -1 if a logit is NaN, which ``argmax`` takes for the greatest."""
        return torch.where(out.isnan().any(-1), -1, out.argmax(-1))

    def predictions(self, examples: Examples, outputs: Outputs, held_out: EvalRows) -> Predictions:
        """Joins the words of rows that were split into several examples."""
        made, names = Predictions(), held_out.labels
        for parts in held_out.by_row(len(examples)).values():
            found: list[str | float] = []
            right: list[str] = []
            for part in parts:
                labels, best = examples[part].labels, outputs[part]
                assert isinstance(labels, list)
                assert best is not None
                numbers = best.tolist()
                asked = [i for i, label in enumerate(labels) if label != IGNORE]
                found += [names[numbers[i]] if numbers[i] >= 0 else NOTHING for i in asked]
                right += [names[int(labels[i])] for i in asked]
            made.add(found, right, parts[0])
        return made

    def constant(self, examples: Examples, known: Known) -> Constant | None:
        counts = Counter(label for example in examples for label in _asked(example))
        loss = surprise(counts, range(max(len(known.labels), max(counts) + 1)))

        def score(example: Example) -> Scores:
            asked = _asked(example)
            return Scores(math.fsum(loss[label] for label in asked), len(asked))

        def always(tag: int) -> Answer:
            return lambda example: torch.full((len(example.input_ids),), tag)

        answers = [(f"always {name_of(known.labels, tag)}", always(tag)) for tag, _ in counts.most_common(TRIED)]
        return Constant(answers[0][0], score, answers)

    def shown_input(self, record: Record, example: Example, tokenizer: Any) -> str:
        assert isinstance(record, Tagged)
        return " ".join(record.tokens)

    def shown_value(self, record: Record, value: Any, output: Tensor | None = None) -> str:
        assert isinstance(record, Tagged)
        # If a row was cut, or a word has no token, it is unknown which words the tags belong to.
        words = record.tokens if len(value) == len(record.tokens) else [""] * len(value)
        marked = [f"{word} {tag}".strip() for word, tag in zip(words, value, strict=True) if tag != "O"]
        return ", ".join(marked) or "O"


def _asked(example: Example) -> list[int]:
    assert isinstance(example.labels, list)
    return [int(label) for label in example.labels if label != IGNORE]
