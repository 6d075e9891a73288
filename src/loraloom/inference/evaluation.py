"""Adapters of a model on held-out rows: losses, figures, and what is predicted for each row beside what is right.

What a task's outputs mean is the task's business, and which figures follow from predictions that of its metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from loraloom.data.batches import evaluation_batches
from loraloom.data.example import Example
from loraloom.data.table.store import lengths_of
from loraloom.distributed.process_group import SINGLE, ProcessGroup
from loraloom.engine.pack import evaluating
from loraloom.inference import batching, jackknife
from loraloom.inference.generate import generate
from loraloom.inference.jackknife import Figures
from loraloom.lora.model import PeftModel
from loraloom.models.fsdp import sharded
from loraloom.tasks.base import Outputs, Task
from loraloom.tasks.metrics.kinds import Scores, total
from loraloom.tasks.metrics.registry import Metrics, choose
from loraloom.tasks.objective import Objective
from loraloom.tasks.outputs import EvalRows, Predictions


@dataclass(frozen=True, kw_only=True)
class HeldOut(EvalRows):
    """What an evaluation needs to know of held-out rows beside their examples, and what is measured of them."""

    metrics: Metrics | None = None
    max_new_tokens: int = 64
    #: rows that are compared with one another where the loss is of that kind, as many as in a batch of the training
    block: int = 16


@dataclass(frozen=True)
class Evaluator:
    """Adapters of ``model``, by their names, on ``examples``. The model's mode is as it was after each method.

    The processes of ``world`` share the work, and all have the result.
    """

    model: PeftModel
    task: Task
    examples: Sequence[Example]
    rows: HeldOut = HeldOut()
    pad_id: int = 0
    batch_size: int = 64
    world: ProcessGroup = SINGLE

    def evaluate(self, name: str) -> dict[str, float]:
        """``{"loss", metric, ...}`` over all examples.

        Raises:
            ConfigError: a user's own metric fails, or one was asked for that the tags do not have.
        """
        metrics = self._metrics
        (scores,), outputs = self._scored(name, [range(len(self.examples))], keep=metrics.needs_predictions)
        made = self.predictions(name, outputs) if metrics.needs_predictions else Predictions()
        return metrics.measure(scores, made.predictions, made.references)

    def loss(self, name: str) -> float:
        """The mean loss over all examples, or over all tokens that are trained on."""
        return self._scored(name, [range(len(self.examples))], keep=False)[0][0].loss

    def evaluate_parts(self, name: str, parts: Sequence[Sequence[int]]) -> Figures:
        """The same figures, each followed by those over all examples but one of the ``parts``."""
        metrics = self._metrics
        scores, outputs = self._scored(name, parts, keep=metrics.needs_predictions)
        made = self.predictions(name, outputs) if metrics.needs_predictions else Predictions()
        return jackknife.figures(metrics, scores, made, parts)

    def _scored(
        self, name: str, parts: Sequence[Sequence[int]], *, keep: bool
    ) -> tuple[list[Scores], list[Tensor | None]]:
        """The loss of each part, and all examples' outputs."""
        if self.task.compares_rows:
            _, outputs = self.run(name)
            losses = self.task.losses(self.examples, outputs, self.rows.block)
            return [Scores(math.fsum(losses[n] for n in part), len(part)) for part in parts], outputs
        scores: list[Scores] = []
        outputs = [None] * len(self.examples)
        for part in parts:
            score, found = self.run(name, part, keep=keep)
            scores.append(score)
            for number in part:
                outputs[number] = found[number]
        return scores, outputs

    def shown(self, name: str) -> list[dict[str, str]]:
        """``{"input", "expected", "predicted"}`` of each row, for a person to read."""
        outputs = [None] * len(self.examples) if self.task.generates else self.run(name)[1]
        made, words = self.predictions(name, outputs), dict[int, dict[str, str]]()
        for predicted, right, number in zip(made.predictions, made.references, made.examples, strict=True):
            record, example = self.rows.records[self.rows.row(number)][1], self.examples[number]
            one = {
                "input": self.task.shown_input(record, example, self.rows.tokenizer),
                "expected": self.task.shown_value(record, right),
                "predicted": self.task.shown_value(record, predicted, outputs[number]),
            }
            words.setdefault(self.rows.row(number), one)
        return list(words.values())

    @property
    def _metrics(self) -> Metrics:
        """Those that were asked for, without what cannot be measured of these rows."""
        asked = self.rows.metrics or choose(self.task, self.task.problem_of(self.examples))
        metrics = asked.of_labels(self.rows.labels)
        if metrics.needs_predictions and not self.rows.has(self.task.needs):
            return replace(metrics, names=(), own=())
        return metrics

    @cached_property
    def _objective(self) -> Objective:
        """Made once: it runs the model to see how its logits come about."""
        return Objective(self.model, self.task)

    def run(
        self, name: str, numbers: Sequence[int] | None = None, *, keep: bool = True
    ) -> tuple[Scores, list[Tensor | None]]:
        """The loss over all examples, or those with these ``numbers``; and with ``keep`` each example's outputs.

        Outputs are what ``Task.kept`` makes of them, padding left out; None for texts, which are generated.
        """
        model, task, world, objective = self.model, self.task, self.world, self._objective
        device = next(model.parameters()).device
        numbers = range(len(self.examples)) if numbers is None else numbers
        every = lengths_of(self.examples)
        lengths = [int(every[number]) for number in numbers]
        outputs: list[Tensor | None] = [None] * len(self.examples)
        parts, keep = [], keep and not task.generates

        def forward(examples: Sequence[Example]) -> tuple[Any, Tensor]:
            inputs = {key: value.to(device) for key, value in task.collate(examples, self.pad_id).items()}
            labels = inputs.pop("labels")
            with model.base_model.lora_routed([name] * len(labels)):
                return objective.forward(inputs, labels), labels

        def answer(rows: Sequence[int]) -> Tensor:
            examples = [self.examples[numbers[row]] for row in rows]
            return task.own(objective.outputs(forward(examples)[0])[0], examples[0])

        # What is gathered in inference mode could not be trained through afterwards.
        with evaluating(model, torch.no_grad() if sharded(model) else torch.inference_mode()):
            alike = not sharded(model) and batching.is_seen(model.get_base_model(), task.name, lengths, answer)
            batches = evaluation_batches(lengths, self.batch_size, alike=alike)
            mine = world.shard(batches)
            # A sharded model is gathered by all processes together: each goes through it as often as the others.
            extra = batches[:1] * (-(-len(batches) // world.size) - len(mine))
            for count, rows in enumerate([*mine, *extra]):
                examples = [self.examples[numbers[row]] for row in rows]
                out, labels = forward(examples)
                if count >= len(mine):
                    continue
                parts.append(objective.score(out, labels))
                kept = task.kept(objective.outputs(out), len(rows)).cpu() if keep else ()
                for row, example, found in zip(rows, examples, kept, strict=keep):
                    outputs[numbers[row]] = task.own(found, example)
        everyone = world.gather((total(parts), outputs))
        if world.size > 1:
            outputs = [next((one for one in row if one is not None), None) for row in zip(*(o for _, o in everyone))]
        return total(scores for scores, _ in everyone), outputs

    def predictions(self, name: str, outputs: Outputs) -> Predictions:
        """Classes by name, numbers, tags by word, answers or texts; ``outputs`` are those of ``run``."""
        if self.task.generates:
            return self._texts(name)
        return self.task.predictions(self.examples, outputs, self.rows)

    def _texts(self, name: str) -> Predictions:
        """Texts that the adapter writes: of a conversation, the last thing that it is trained to say."""
        rows, tokenizer, world = self.rows, self.rows.tokenizer, self.world
        made = Predictions(examples=list(range(len(self.examples))))
        prompts = []
        once = rows.rows is None or len({int(row) for row in rows.rows}) == len(self.examples)
        for number, example in enumerate(self.examples):
            prompt, target = self.task.prompt_and_target(example)
            prompts.append(prompt)
            record = rows.records[rows.row(number)][1] if rows.records and once else None
            whole = None if record is None else self.task.target_of(record)  # where the example may be cut
            made.references.append(tokenizer.decode(target, skip_special_tokens=True) if whole is None else whole)
        mine = world.shard(prompts)  # of which there may be none; a model in parts still needs this process
        written = generate(self.model, name, tokenizer, mine, rows.max_new_tokens, self.batch_size)
        everyone = world.gather(written)
        made.predictions = [everyone[number % world.size][number // world.size] for number in range(len(prompts))]
        return made
