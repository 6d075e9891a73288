"""Answers that do not look at the row: always the commonest class, the mean, the tag O, the commonest text.

What does no better than the best of these has learned nothing of the rows. Each has the loss that training would show,
which says whether a trial has taken off, and the figures that a trial is measured by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loraloom.data.example import Example
from loraloom.inference.jackknife import Figures, figures
from loraloom.tasks.baseline import Constant, Known
from loraloom.tasks.metrics.kinds import total
from loraloom.tasks.outputs import Predictions
from loraloom.training.setup import Setup

#: Training rows that shares are counted in.
COUNTED = 5000


def constant(setup: Setup) -> Constant | None:
    """The answer for the task of ``setup``; None where there is none (texts all different, an own loss)."""
    if setup.task.own_loss is not None:
        return None  # its losses are not those of a user's own function
    data = setup.data
    block = min(setup.options.batch_size, len(data.validation.examples))
    known = Known(data.names, data.problem, setup.tokenizer, data.train.largest + 1, block)
    return setup.task.constant(list(_some(data.train.examples)), known)


def training_loss(found: Constant, setup: Setup) -> float:
    """Its mean loss over the training rows."""
    return found.loss(_some(setup.data.train.examples))


def measure(found: Constant, setup: Setup) -> dict[str, Figures]:
    """Answer in words → its figures on the held-out rows, as ``Evaluator.figures`` has them."""
    examples, parts = setup.data.validation.examples, setup.parts
    scores = [total(found.score(examples[number]) for number in part) for part in parts]
    if found.texts:
        texts = found.texts if setup.metrics.needs_predictions else found.texts[:1]
        targets = [setup.task.prompt_and_target(example)[1] for example in examples]
        references = [setup.tokenizer.decode(target, skip_special_tokens=True) for target in targets]
        numbers = list(range(len(examples)))
        saying = {f"always {text!r}": Predictions([text] * len(numbers), references, numbers) for text in texts}
        return {words: figures(setup.metrics, scores, one, parts) for words, one in saying.items()}
    held_out, needed = setup.evaluator().rows, setup.metrics.needs_predictions
    out: dict[str, Figures] = {}
    for words, answer in found.answers if needed else found.answers[:1]:
        outputs = [answer(example) for example in examples] if needed else []
        made = setup.task.predictions(examples, outputs, held_out) if needed else Predictions()
        out[words] = figures(setup.metrics, scores, made, parts)
    return out


def _some(examples: Sequence[Example]) -> Iterator[Example]:
    """At most ``COUNTED`` of them, spread over all."""
    count = len(examples)
    return (examples[i * count // min(count, COUNTED)] for i in range(min(count, COUNTED)))
