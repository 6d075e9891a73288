"""A new linear head on the frozen model: the cheapest thing that learns from the rows, and what LoRA should beat.

Each row goes through the frozen model once, without gradients. The head is fitted to the last hidden states: to their
mean over a row's tokens if rows are labelled, to each token's own if tokens are. It sees no more rows than a trial
trains on, so it costs less than half of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.data.batches import evaluation_batches
from loraloom.data.example import IGNORE, Example
from loraloom.data.table.store import lengths_of
from loraloom.inference.evaluation import Evaluator
from loraloom.inference.jackknife import Figures, figures
from loraloom.models.configs import width
from loraloom.models.fsdp import sharded
from loraloom.tasks.metrics.kinds import Scores, total
from loraloom.tasks.objective import Objective
from loraloom.tasks.outputs import Predictions
from loraloom.training.setup import Setup

HEAD = "a new head on the frozen model"
#: Hidden numbers that are kept at once: 256 MiB.
KEPT = 2**26
#: Weights of the penalty to choose from, by the loss on every ``FOLD``-th row.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
FOLD = 5
#: Steps of L-BFGS.
STEPS = 50

#: (outputs, labels) → [rows]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """A linear map of hidden states that are first brought to mean 0 and deviation 1."""

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., hidden] → [..., outputs]."""
        return F.linear((hidden - self.mean) / self.deviation, self.weight, self.bias)


def measure_head(setup: Setup, evaluator: Evaluator) -> Figures:
    """Its figures on the rows of ``evaluator``; empty for tasks without classes or numbers, and models without states.

    It is fitted to training rows, to the same ones each time.
    """
    task, hidden = setup.task, width(getattr(setup.base, "config", None))
    several = setup.world.size > 1 or sharded(setup.model)
    if not task.class_word or task.own_loss is not None or several or hidden is None:
        return {}
    train = _chosen(setup, hidden)
    pieces: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(row: int, states: Tensor) -> None:
        labels, labelled = _labels(setup, train[row], states)
        pieces[row] = states[labelled], labels[labelled]

    if not _states(setup, train, keep):
        return {}
    ordered = [pieces[row] for row in range(len(train))]
    fold = torch.cat([torch.full((len(labels),), row % FOLD == 0) for row, (_, labels) in enumerate(ordered)])
    x, y = (torch.cat(parts) for parts in zip(*ordered, strict=True))
    outputs = len(setup.data.names) or 1
    return _figures(setup, evaluator, fit_head(x, y, fold.to(x.device), outputs, _loss(setup)))


def fit_head(features: Tensor, labels: Tensor, fold: Tensor, outputs: int, loss: Loss) -> Head:
    """Fit ``outputs`` linear functions of ``features`` [rows, hidden] by their mean loss and a penalty on the weights.

    Args:
        fold: [rows] booleans: rows on which the penalty is chosen; all rows are then fitted with it.
    """
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    scaled = (features - mean) / deviation

    def fitted(rows: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        x, y = scaled[rows], labels[rows]
        weight = torch.zeros(outputs, x.shape[1], device=x.device, requires_grad=True)
        bias = torch.zeros(outputs, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss(F.linear(x, weight, bias), y).mean() + penalty * weight.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return weight.detach(), bias.detach()

    def held_back(penalty: float) -> float:
        found = float(loss(F.linear(scaled[fold], *fitted(~fold, penalty)), labels[fold]).mean())
        return found if math.isfinite(found) else math.inf

    divided = 0 < int(fold.sum()) < len(fold)
    best = min(PENALTIES, key=held_back) if divided else PENALTIES[-1]
    return Head(mean, deviation, *fitted(torch.ones_like(fold), best))


def _chosen(setup: Setup, hidden: int) -> list[Example]:
    """Training rows to fit, spread over all: at most as many as a trial trains on, and as can be kept."""
    options, examples = setup.options, setup.data.train.examples
    seen = setup.steps_of(options)[0] * options.batch_size * options.gradient_accumulation_steps
    tokens = 1.0 if setup.task.layout == "row" else setup.data.train.tokens / len(examples)
    count = max(1, min(len(examples), seen, int(KEPT / hidden / tokens)))
    return [examples[number * len(examples) // count] for number in range(count)]


def _states(setup: Setup, examples: Sequence[Example], read: Callable[[int, Tensor], None]) -> bool:
    """Give ``read`` the number of each example and what its head sees: [1, hidden], or [tokens, hidden].

    False if the model's trunk does not return a state for each token.
    """
    base: Any = setup.base
    trunk = getattr(base, getattr(base, "base_model_prefix", "") or " ", None)
    if trunk is None or trunk is base:
        return False
    objective = Objective(setup.model, setup.task)
    seen: list[Any] = []
    hook = trunk.register_forward_hook(lambda module, inputs, out: seen.append(out[0]))
    try:
        for rows in evaluation_batches(list(map(int, lengths_of(examples))), setup.options.eval_batch_size):
            batch = setup.task.collate([examples[row] for row in rows], setup.pad_id)
            inputs = {name: value.to(setup.device) for name, value in batch.items()}
            labels = inputs.pop("labels")
            with setup.evaluating(), setup.model.disable_adapter():
                objective.forward(inputs, labels)
            mask = setup.task.inputs(base, inputs, labels)["attention_mask"].bool()
            states = seen.pop() if seen else None
            if not isinstance(states, Tensor) or states.dim() != 3 or states.shape[:2] != mask.shape:
                return False
            for row, own, real in zip(rows, states.clone().float(), mask, strict=True):
                read(row, own[real].mean(0, keepdim=True) if setup.task.layout == "row" else own[real])
    finally:
        hook.remove()
    return True


def _labels(setup: Setup, example: Example, states: Tensor) -> tuple[Tensor, Tensor]:
    """The labels of one example's states, and which of them count."""
    labels = setup.task.collate([example], setup.pad_id)["labels"].to(states.device)
    if setup.task.layout == "row":
        return labels, torch.ones(1, dtype=torch.bool, device=labels.device)
    return labels[0], labels[0] != IGNORE


def _loss(setup: Setup) -> Loss:
    if setup.task.layout != "row":
        return lambda out, labels: F.cross_entropy(out, labels, reduction="none")
    config = getattr(setup.base, "config", None)
    return lambda out, labels: setup.task.row_losses(out, labels, [slice(None)], config)


def _figures(setup: Setup, evaluator: Evaluator, head: Head) -> Figures:
    """The head's figures, measured as those of an adapter."""
    task, examples, loss = setup.task, evaluator.examples, _loss(setup)
    scores: dict[int, Scores] = {}
    outputs: dict[int, Tensor] = {}

    def answer(row: int, states: Tensor) -> None:
        labels, labelled = _labels(setup, examples[row], states)
        out = head(states)
        losses = loss(out[labelled], labels[labelled])
        scores[row] = Scores(float(losses.sum()), len(losses))
        made = out if task.layout == "row" else out.unsqueeze(0)
        outputs[row] = task.own(task.kept(made, 1)[0].cpu(), examples[row])

    _states(setup, examples, answer)
    said = Predictions()
    if setup.metrics.needs_predictions:
        said = task.predictions(examples, [outputs[row] for row in range(len(examples))], evaluator.rows)
    parts = evaluator.parts
    return figures(setup.metrics, [total(scores[row] for row in part) for part in parts], said, parts)
