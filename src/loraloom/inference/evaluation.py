"""Adapters of a model on held-out rows: losses by row, metrics, and predictions beside what is right.

One adapter or many: several go through one routed forward, each with its own copy of the rows. What outputs mean is
the task's business, and which figures follow from predictions that of its metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from loraloom.data.batches import evaluation_batches
from loraloom.data.example import Example
from loraloom.data.table.store import lengths_of
from loraloom.inference import batching, jackknife
from loraloom.inference.generate import generate
from loraloom.inference.jackknife import Figures
from loraloom.inference.session import Session
from loraloom.lora import mixed
from loraloom.models.fsdp import sharded
from loraloom.tasks.base import Outputs
from loraloom.tasks.metrics.kinds import Scores
from loraloom.tasks.metrics.registry import Metrics, choose
from loraloom.tasks.objective import Objective
from loraloom.tasks.outputs import EvalRows, Predictions

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HeldOut(EvalRows):
    """What an evaluation needs to know of held-out rows beside their examples, and what is measured of them."""

    metrics: Metrics | None = None
    max_new_tokens: int = 64
    #: rows that are compared with one another if the loss is of that kind, as many as in a batch of the training
    block: int = 16


@dataclass(frozen=True)
class Evaluator:
    """Adapters of a session's model on ``examples``; ``"__base__"`` is the frozen model alone.

    Results are in the order of the adapters and examples, and all processes of the session have them. ``batch_size``
    counts the rows of one forward, over all its adapters.
    """

    session: Session
    examples: Sequence[Example]
    held_out: HeldOut = HeldOut()
    batch_size: int = 64

    def losses(self, adapters: Sequence[str], rows: Sequence[int] | None = None) -> Tensor:
        """[adapters, rows], float64: the loss of each example, or of those with the numbers ``rows``.

        If tokens are labelled, it is the mean over the example's labelled tokens, and NaN without any.
        """
        if rows is not None:
            return self.on(rows).losses(adapters)
        sums, _ = self._run(adapters, keep=False)
        return sums / torch.tensor(self._counts, dtype=torch.float64)

    def metrics(self, adapters: Sequence[str]) -> list[dict[str, float]]:
        """``{"loss", metric, ...}`` of each adapter over all examples.

        Raises:
            ConfigError: a user's own metric fails, or one was asked for that the tags do not have.
        """
        found = self.figures(adapters, [range(len(self.examples))])
        return [{name: values[0] for name, values in one.items()} for one in found]

    def figures(self, adapters: Sequence[str], parts: Sequence[Sequence[int]]) -> list[Figures]:
        """The metrics of each adapter, each followed by those over all examples but one of the ``parts``."""
        metrics = self._metrics
        sums, outputs = self._run(adapters, keep=metrics.needs_predictions)
        needed = metrics.needs_predictions
        made = self._predictions(adapters, outputs) if needed else [Predictions() for _ in adapters]
        counts, found = self._counts, []
        for losses, said in zip(sums.tolist(), made, strict=True):
            scores = [Scores(math.fsum(losses[n] for n in part), sum(counts[n] for n in part)) for part in parts]
            found.append(jackknife.figures(metrics, scores, said, parts))
        return found

    def predictions(self, adapters: Sequence[str]) -> list[Predictions]:
        """Of each adapter: classes by name, numbers, tags by word, answers or texts, and what is right."""
        none: list[list[Tensor | None]] = [[] for _ in adapters]
        return self._predictions(adapters, none if self.session.task.generates else self._run(adapters)[1])

    def answers(self, adapter: str) -> Predictions:
        """What ``adapter`` answers to rows without an answer, of a task that does not generate."""
        return self.session.task.answers(self.examples, self._run([adapter])[1][0], self.rows)

    def shown(self, adapter: str) -> list[dict[str, str]]:
        """``{"input", "expected", "predicted"}`` of each row, for a person to read."""
        task, rows = self.session.task, self.rows
        outputs: Outputs = [None] * len(self.examples) if task.generates else self._run([adapter])[1][0]
        (made,), words = self._predictions([adapter], [outputs]), dict[int, dict[str, str]]()
        for predicted, right, number in zip(made.predictions, made.references, made.examples, strict=True):
            record, example = rows.records[rows.row(number)][1], self.examples[number]
            one = {
                "input": task.shown_input(record, example, rows.tokenizer),
                "expected": task.shown_value(record, right),
                "predicted": task.shown_value(record, predicted, outputs[number]),
            }
            words.setdefault(rows.row(number), one)
        return list(words.values())

    def on(self, numbers: Sequence[int]) -> Evaluator:
        """The same on the examples with these numbers."""
        view = getattr(self.examples, "view", None)
        examples = view(numbers) if view else [self.examples[number] for number in numbers]
        rows = [self.held_out.row(number) for number in numbers]
        return replace(self, examples=examples, held_out=replace(self.held_out, rows=rows))

    @cached_property
    def parts(self) -> list[list[int]]:
        """The examples in parts, for the error of figures; those of one row stay together."""
        return jackknife.divide(self._row_numbers)

    @property
    def row_count(self) -> int:
        """Rows that the examples are from."""
        return len(set(self._row_numbers))

    @property
    def _row_numbers(self) -> Sequence[int]:
        return self.held_out.rows or range(len(self.examples))

    @cached_property
    def rows(self) -> HeldOut:
        """What is known of the rows, with the session's tokenizer, and its labels unless others are given."""
        session, given = self.session, self.held_out
        return replace(given, labels=given.labels or session.labels, tokenizer=session.tokenizer)

    @property
    def _metrics(self) -> Metrics:
        """Those that were asked for, without what cannot be measured of these rows."""
        task = self.session.task
        asked = self.rows.metrics or choose(task, task.problem_of(self.examples))
        metrics = asked.of_labels(self.rows.labels)
        if metrics.needs_predictions and not self.rows.has(task.needs):
            return replace(metrics, names=(), own=())
        return metrics

    @cached_property
    def _objective(self) -> Objective:
        """Made once: it runs the model to see how its logits come about."""
        return Objective(self.session.model, self.session.task)

    @cached_property
    def _counts(self) -> list[int]:
        """Losses that the loss of each example is a mean of."""
        return [self.session.task.count(example) for example in self.examples]

    # -- forwards -----------------------------------------------------------------------------------------------------

    def _run(self, adapters: Sequence[str], keep: bool = True) -> tuple[Tensor, list[list[Tensor | None]]]:
        """[adapters, examples] sums of losses, and with ``keep`` each adapter's outputs for each example.

        Outputs are what ``Task.kept`` leaves of them, without padding; None for texts, which are generated.
        """
        session, task = self.session, self.session.task
        lengths = list(map(int, lengths_of(self.examples)))
        keep = task.compares_rows or (keep and not task.generates)
        found: dict[tuple[str, int], tuple[float, Tensor | None]] = {}
        with session.evaluating():
            alike = not sharded(session.model) and batching.is_seen(
                session.base, task.name, lengths, lambda rows: self._first_output(adapters[0], rows)
            )
            for names in session.groups(adapters, self.batch_size):
                batches = evaluation_batches(lengths, max(1, self.batch_size // len(names)), alike=alike)
                mine = session.world.shard(batches)
                # A sharded model is gathered by all processes together: each runs it as often as the others.
                extra = batches[:1] * (-(-len(batches) // session.world.size) - len(mine))
                for rows in [*mine, *extra]:
                    found |= self._batch(names, rows, keep)
        found = {key: value for part in session.world.gather(found) for key, value in part.items()}
        results = [[found[name, number] for number in range(len(self.examples))] for name in adapters]
        outputs = [[output for _, output in one] for one in results]
        losses = [[loss for loss, _ in one] for one in results]
        if task.compares_rows:
            losses = [task.losses(self.examples, one, self.rows.block) for one in outputs]
        return torch.tensor(losses, dtype=torch.float64).view(len(adapters), len(self.examples)), outputs

    def _batch(
        self, names: Sequence[str], numbers: Sequence[int], keep: bool
    ) -> dict[tuple[str, int], tuple[float, Tensor | None]]:
        """(adapter, example) → the sum of its losses and its output, of these examples."""
        task, objective, examples = self.session.task, self._objective, [self.examples[n] for n in numbers]
        made: dict[tuple[str, int], tuple[float, Tensor | None]] = {}

        def read(out: Any, labels: Tensor, rows: Mapping[str, slice]) -> None:
            each = None if task.compares_rows else objective.row_losses(out, labels, rows).tolist()
            for name, own in rows.items():
                losses = [0.0] * len(numbers) if each is None else each[own]
                kept = task.kept(objective.outputs(out)[own], len(numbers)).cpu() if keep else [None] * len(numbers)
                for number, example, loss, output in zip(numbers, examples, losses, kept, strict=True):
                    made[name, number] = loss, None if output is None else task.own(output, example)

        self._forward(names, examples, read)
        return made

    def _first_output(self, name: str, numbers: Sequence[int]) -> Tensor:
        """The model's output for the first of these examples, in a batch with the others."""
        examples = [self.examples[number] for number in numbers]
        found: list[Tensor] = []
        self._forward([name], examples, lambda out, labels, rows: found.append(self._objective.outputs(out)[0]))
        return self.session.task.own(found[0], examples[0])

    def _forward(
        self,
        names: Sequence[str],
        examples: Sequence[Example],
        read: Callable[[Any, Tensor, Mapping[str, slice]], None],
    ) -> None:
        """Run ``examples`` through each of ``names``, and ``read`` what comes out: outputs, labels, rows of each."""
        session, objective, lora = self.session, self._objective, self.session.model.base_model
        batch = session.task.collate(examples, session.pad_id)
        inputs = {key: torch.cat([value.to(session.device)] * len(names)) for key, value in batch.items()}
        labels = inputs.pop("labels")
        count = len(labels) // len(names)
        slots = [name for name in names for _ in range(count)]

        def run() -> None:
            with lora.lora_routed(slots, inputs=inputs.values()):
                out = objective.forward(inputs, labels)
                read(out, labels, {name: slice(i * count, (i + 1) * count) for i, name in enumerate(names)})

        if mixed.in_one_forward(lora, names, run, lambda site: objective.prove(site, inputs, labels)) is None:
            for name in names:  # the model's layers do not show whose rows they see
                self._forward([name], examples, read)

    # -- predictions --------------------------------------------------------------------------------------------------

    def _predictions(self, adapters: Sequence[str], outputs: Sequence[Outputs]) -> list[Predictions]:
        """What follows from each adapter's outputs, which are those of ``_run``; texts are generated."""
        if self.session.task.generates:
            return self._texts(adapters)
        return [self.session.task.predictions(self.examples, one, self.rows) for one in outputs]

    def _texts(self, adapters: Sequence[str]) -> list[Predictions]:
        """Texts that the adapters write: of a conversation, the last thing that they are trained to say."""
        session, rows, count = self.session, self.rows, len(self.examples)
        prompts, references = [], []
        once = rows.rows is None or len({int(row) for row in rows.rows}) == count
        for number, example in enumerate(self.examples):
            prompt, target = session.task.prompt_and_target(example)
            prompts.append(prompt)
            record = rows.records[rows.row(number)][1] if rows.records and once else None
            whole = None if record is None else session.task.target_of(record)  # the example may be cut
            references.append(rows.tokenizer.decode(target, skip_special_tokens=True) if whole is None else whole)
        texts: dict[str, list[str]] = {}
        for names in session.groups(adapters, self.batch_size):
            asked = [(name, prompt) for name in names for prompt in prompts]
            mine = session.world.shard(asked)  # may be empty; a sharded model still needs this process
            slots, own = [name for name, _ in mine], [prompt for _, prompt in mine]
            written = generate(session, slots, own, rows.max_new_tokens, self.batch_size)
            parts = session.world.gather(written)
            ordered = [parts[n % session.world.size][n // session.world.size] for n in range(len(asked))]
            texts |= {name: ordered[i * count : (i + 1) * count] for i, name in enumerate(names)}
        return [Predictions(texts[name], references, list(range(count))) for name in adapters]
