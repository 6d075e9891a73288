"""One adapter on held-out rows: the loss of all of them, and what it predicts for each beside what is right.

What a task's outputs mean is the task's business, and which figures follow from predictions that of its metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.data.batches import evaluation_batches
from loraloom.data.example import Example
from loraloom.data.table.store import lengths_of
from loraloom.distributed.process_group import SINGLE, ProcessGroup
from loraloom.engine.pack import evaluating
from loraloom.inference import batching
from loraloom.inference.generate import generate
from loraloom.lora.model import PeftModel
from loraloom.models.fsdp import sharded
from loraloom.tasks.base import Task
from loraloom.tasks.metrics.kinds import Scores, total
from loraloom.tasks.metrics.registry import Metrics, choose
from loraloom.tasks.objective import Objective
from loraloom.tasks.outputs import EvalRows, Predictions


@dataclass(frozen=True, kw_only=True)
class HeldOut(EvalRows):
    """What an evaluation needs to know of held-out rows beside their examples, and what is measured of them."""

    metrics: Metrics | None = None
    max_new_tokens: int = 64


def evaluate(
    model: PeftModel,
    name: str,
    task: Task,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int,
    held_out: HeldOut | None = None,
    world: ProcessGroup | None = None,
) -> dict[str, float]:
    """``{"loss", metric, ...}`` of one adapter over all ``examples``. The model's mode is as it was afterwards.

    The processes of ``world`` share the work, and all have the result.

    Raises:
        ConfigError: a user's own metric fails, or one was asked for that the tags do not have.
    """
    held_out = held_out or HeldOut()
    metrics = (held_out.metrics or choose(task, task.problem_of(examples))).of_labels(held_out.labels)
    if metrics.needs_predictions and not task.can_predict(held_out):
        metrics = Metrics(task, metrics.kind, ())
    world, keep = world or SINGLE, metrics.needs_predictions
    scores, outputs = run(model, name, task, examples, pad_id, batch_size, keep=keep, world=world)
    made = predictions(model, name, task, examples, outputs, batch_size, held_out, world) if keep else Predictions()
    return metrics.measure(scores, made.predictions, made.references)


def run(
    model: PeftModel,
    name: str,
    task: Task,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int,
    *,
    keep: bool = True,
    world: ProcessGroup = SINGLE,
) -> tuple[Scores, list[Tensor | None]]:
    """The loss over all examples, and with ``keep`` each one's outputs, padding left out, in the order of the examples.

    Outputs are what ``Task.kept`` makes of them; None for texts, which are generated.
    """
    objective = Objective(model, task)
    device = next(model.parameters()).device
    keep = keep and not task.generates
    lengths = [int(length) for length in lengths_of(examples)]
    outputs: list[Tensor | None] = [None] * len(examples)
    parts = []

    def forward(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs = {key: value.to(device) for key, value in task.collate([examples[row] for row in rows], pad_id).items()}
        labels = inputs.pop("labels")
        with model.base_model.lora_routed([name] * len(labels)):
            return objective.forward(inputs, labels), labels

    def answer(rows: Sequence[int]) -> Tensor:
        return task.own(forward(rows)[0][0], examples[rows[0]])

    # What is gathered in inference mode could not be trained through afterwards.
    with evaluating(model, torch.no_grad() if sharded(model) else torch.inference_mode()):
        alike = not sharded(model) and batching.is_seen(model.get_base_model(), task.name, lengths, answer)
        batches = evaluation_batches(lengths, batch_size, alike=alike)
        mine = world.shard(batches)
        # A sharded model is gathered by all processes together, so that each goes through it as often as the others.
        extra = batches[:1] * (-(-len(batches) // world.size) - len(mine))
        for number, rows in enumerate([*mine, *extra]):
            out, labels = forward(rows)
            if number >= len(mine):
                continue
            parts.append(objective.score(out, labels))
            if keep:
                for row, found in zip(rows, task.kept(out).cpu(), strict=True):
                    outputs[row] = task.own(found, examples[row])
    everyone = world.gather((total(parts), outputs))
    if world.size > 1:
        outputs = [next((one for one in row if one is not None), None) for row in zip(*(o for _, o in everyone))]
    return total(scores for scores, _ in everyone), outputs


def predictions(
    model: PeftModel,
    name: str,
    task: Task,
    examples: Sequence[Example],
    outputs: Sequence[Tensor | None],
    batch_size: int,
    held_out: HeldOut,
    world: ProcessGroup = SINGLE,
) -> Predictions:
    """Classes by name, numbers, tags by word, answers or texts; ``outputs`` are those of ``run``."""
    if task.generates:
        return _texts(model, name, task, examples, batch_size, held_out, world)
    return task.predictions(examples, outputs, held_out)


def _texts(
    model: PeftModel,
    name: str,
    task: Task,
    examples: Sequence[Example],
    batch_size: int,
    held_out: HeldOut,
    world: ProcessGroup,
) -> Predictions:
    """Texts that the adapter writes: of a conversation, the last thing that it is trained to say."""
    made = Predictions(examples=list(range(len(examples))))
    prompts = []
    once = held_out.rows is None or len({int(row) for row in held_out.rows}) == len(examples)
    for number, example in enumerate(examples):
        prompt, target = task.prompt_and_target(example)
        prompts.append(prompt)
        record = held_out.records[held_out.row(number)][1] if held_out.records and once else None
        whole = None if record is None else task.target_of(record)  # where the example may be cut
        made.references.append(held_out.tokenizer.decode(target, skip_special_tokens=True) if whole is None else whole)
    mine = world.shard(prompts)  # of which there may be none; a model in parts still needs this process
    everyone = world.gather(generate(model, name, held_out.tokenizer, mine, held_out.max_new_tokens, batch_size))
    made.predictions = [everyone[number % world.size][number // world.size] for number in range(len(prompts))]
    return made
