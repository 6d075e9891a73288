"""The common part of tasks whose adapters write texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loraloom.data.example import IGNORE, Example
from loraloom.tasks.base import Examples, Task
from loraloom.tasks.baseline import Constant, Known, commonest_text
from loraloom.tasks.metrics.kinds import TEXTS

#: The placeholder of the text to write.
PLACEHOLDER = "x"


class TextTask(Task):
    options: Mapping[str, str] = {"max_new_tokens": "how much is generated for metrics"}
    generates = True
    metrics = (TEXTS,)

    def labelled(self, example: Example) -> tuple[int, ...]:
        """The labelled tokens."""
        assert isinstance(example.labels, list)
        return tuple(int(label) for label in example.labels[self.shifted :] if label != IGNORE)

    def written(self, examples: Iterable[Example], tokenizer: Any) -> list[str]:
        """The texts to write."""
        targets = [self.prompt_and_target(example)[1] for example in examples]
        return [str(tokenizer.decode(target, skip_special_tokens=True)) for target in targets]

    def constant(self, examples: Examples, known: Known) -> Constant | None:
        targets = [self.labelled(example) for example in examples]
        return commonest_text(targets, self.written(examples, known.tokenizer), known.tokens, self.labelled)
