"""One adapter on held-out rows: the loss of all of them, and what it says of each beside what is right.

This file knows how a task's outputs become words, numbers and texts again. Which figures follow from these is
``train.metrics``'s business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraloom.config.lora import TaskType
from loraloom.data.batches import collate, evaluation_batches
from loraloom.data.example import IGNORE, Example, Settings
from loraloom.data.records import Asked, Pair, Record, Translated
from loraloom.data.rows import Row
from loraloom.data.tokenize.answers import AnswerEncoder, Window
from loraloom.distributed.process_group import SINGLE, ProcessGroup
from loraloom.engine.pack import evaluating
from loraloom.inference import batching
from loraloom.inference.generate import generate
from loraloom.lora.model import PeftModel
from loraloom.models.fsdp import sharded
from loraloom.tasks.metrics.registry import Metrics, Scores, choose, total
from loraloom.tasks.objective import Objective

#: What is predicted where the model's numbers are none: equal to nothing, so it counts as wrong everywhere.
NOTHING = math.nan
#: An answer has at most so many tokens, as in the official baselines.
LONGEST_ANSWER = 30


@dataclass(frozen=True)
class HeldOut:
    """What metrics need to know of held-out rows beside their examples.

    ``records`` are the rows as they were read; ``rows`` gives each example's place among them (by default each has one,
    in order). ``labels`` are the classes or tags by number. ``max_length`` and ``stride`` are those that the examples
    of question-answering were made with. Metrics for which something is not given are left out.
    """

    metrics: Metrics | None = None
    records: Sequence[tuple[Row, Record]] = ()
    rows: Sequence[int] | None = None
    labels: Sequence[str] = ()
    tokenizer: Any = None
    max_length: int = 0
    stride: int = 128
    max_new_tokens: int = 64


@dataclass
class Predictions:
    """What was predicted and what is right, and whose example each is of (the first, of a row with several)."""

    predictions: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)


def evaluate(
    model: PeftModel,
    name: str,
    task: TaskType,
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
    metrics = (held_out.metrics or choose(task, problem_of(examples))).of_labels(held_out.labels)
    if metrics.needs_predictions and not _known(task, held_out):
        metrics = Metrics(task, metrics.kind, ())
    world, keep = world or SINGLE, metrics.needs_predictions
    scores, outputs = run(model, name, task, examples, pad_id, batch_size, keep=keep, world=world)
    said = predictions(model, name, task, examples, outputs, batch_size, held_out, world) if keep else Predictions()
    return metrics.measure(scores, said.predictions, said.references)


def problem_of(examples: Sequence[Example]) -> str | None:
    """What the labels of these examples are, of seq-cls."""
    first = examples[0].labels if len(examples) else 0
    if isinstance(first, float):
        return "regression"
    several = isinstance(first, list) and bool(first) and isinstance(first[0], float)
    return "multi_label_classification" if several else None


def _known(task: TaskType, held_out: HeldOut) -> bool:
    if task is TaskType.QUESTION_ANS:
        return bool(held_out.records) and held_out.tokenizer is not None
    if task is TaskType.TOKEN_CLS:
        return bool(held_out.labels)
    return task is TaskType.SEQ_CLS or held_out.tokenizer is not None


def run(
    model: PeftModel,
    name: str,
    task: TaskType,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int,
    *,
    keep: bool = True,
    world: ProcessGroup = SINGLE,
) -> tuple[Scores, list[Tensor | None]]:
    """The loss over all examples, and with ``keep`` each one's outputs, padding left out, in the order of the examples.

    Outputs: logits [classes] of seq-cls, the best tag's number of each token (-1 for NaN), [tokens, 2] of
    question-answering; None for texts, which are generated.
    """
    objective = Objective(model, task)
    device = next(model.parameters()).device
    keep = keep and task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)
    lengths = getattr(examples, "lengths", None)
    lengths = [len(e.input_ids) for e in examples] if lengths is None else [int(length) for length in lengths]
    outputs: list[Tensor | None] = [None] * len(examples)
    parts = []

    def forward(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        inputs = collate([examples[row] for row in rows], pad_id, task)
        inputs = {key: value.to(device) for key, value in inputs.items()}
        labels = inputs.pop("labels")
        with model.base_model.lora_routed([name] * len(rows)):
            return objective.forward(inputs, labels), labels

    def answer(rows: Sequence[int]) -> Tensor:
        example = examples[rows[0]]
        size = len(example.labels) if isinstance(example.labels, list) else 0  # targets have a length of their own
        size = size if task is TaskType.SEQ_2_SEQ_LM else len(example.input_ids)
        out = forward(rows)[0][0]
        return out if task is TaskType.SEQ_CLS else out[:size]

    # What is gathered in inference mode could not be trained through afterwards.
    with evaluating(model, torch.no_grad() if sharded(model) else torch.inference_mode()):
        alike = not sharded(model) and batching.is_seen(model.get_base_model(), task.value, lengths, answer)
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
                out = _best_tags(out) if task is TaskType.TOKEN_CLS else out.float()
                for row, found in zip(rows, out.cpu(), strict=True):
                    outputs[row] = found if task is TaskType.SEQ_CLS else found[: lengths[row]]
    everyone = world.gather((total(parts), outputs))
    if world.size > 1:
        outputs = [next((one for one in row if one is not None), None) for row in zip(*(o for _, o in everyone))]
    return total(scores for scores, _ in everyone), outputs


def _best_tags(logits: Tensor) -> Tensor:
    """The greatest of the last dimension; -1 where one is NaN, which ``argmax`` takes for the greatest."""
    return torch.where(logits.isnan().any(-1), -1, logits.argmax(-1))


def predictions(
    model: PeftModel,
    name: str,
    task: TaskType,
    examples: Sequence[Example],
    outputs: Sequence[Tensor | None],
    batch_size: int,
    held_out: HeldOut,
    world: ProcessGroup = SINGLE,
) -> Predictions:
    """Classes by name, numbers, tags by word, answers or texts; ``outputs`` are those of ``run``.

    Where these are NaN, ``NOTHING`` is predicted.
    """
    if task is TaskType.SEQ_CLS:
        return _classes(examples, outputs, held_out.labels)
    if task is TaskType.TOKEN_CLS:
        return _tags(examples, outputs, held_out)
    if task is TaskType.QUESTION_ANS:
        return _answers(examples, outputs, held_out)
    return _texts(model, name, task, examples, batch_size, held_out, world)


def _classes(examples: Sequence[Example], outputs: Sequence[Tensor | None], labels: Sequence[str]) -> Predictions:
    said = Predictions(examples=list(range(len(examples))))

    def named(number: int) -> str:
        return labels[number] if labels else str(number)

    for example, logits in zip(examples, outputs, strict=True):
        assert logits is not None
        right = example.labels
        none = bool(logits.isnan().any())
        if isinstance(right, list):
            found = [named(i) for i, logit in enumerate(logits.tolist()) if logit > 0]
            said.predictions.append([NOTHING] if none else found)
            said.references.append([named(i) for i, one in enumerate(right) if one])
        elif isinstance(right, float):
            said.predictions.append(float(logits))
            said.references.append(right)
        else:
            said.predictions.append(NOTHING if none else named(int(logits.argmax())))
            said.references.append(named(right))
    return said


def _by_row(count: int, rows: Sequence[int] | None) -> dict[int, list[int]]:
    """Row → its examples."""
    found: dict[int, list[int]] = {}
    for number in range(count):
        found.setdefault(number if rows is None else int(rows[number]), []).append(number)
    return found


def _tags(examples: Sequence[Example], outputs: Sequence[Tensor | None], held_out: HeldOut) -> Predictions:
    """The words of a row whose examples are parts of it are put together again."""
    said = Predictions()
    names = held_out.labels
    for parts in _by_row(len(examples), held_out.rows).values():
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
        said.predictions.append(found)
        said.references.append(right)
        said.examples.append(parts[0])
    return said


def _answers(examples: Sequence[Example], outputs: Sequence[Tensor | None], held_out: HeldOut) -> Predictions:
    encoder = AnswerEncoder(held_out.tokenizer, Settings(held_out.max_length, stride=held_out.stride))
    asked = [record for _, record in held_out.records if isinstance(record, Asked)]
    empty = any(not record.answers for record in asked)
    said = Predictions()
    for row, parts in _by_row(len(examples), held_out.rows).items():
        record = asked[row]
        # By their tokens: where a few examples are looked at, some of a row's windows may not be there.
        windows = {tuple(window.ids): window for window in encoder.windows([record])[0]}
        seen = [windows[tuple(examples[part].input_ids)] for part in parts]
        logits = [output for output in (outputs[part] for part in parts) if output is not None]
        none = any(bool(both.isnan().any()) for both in logits)
        said.predictions.append(NOTHING if none else best_answer(record.context, seen, logits, empty))
        said.references.append([text for text, _ in record.answers])
        said.examples.append(parts[0])
    return said


def best_answer(context: str, windows: Sequence[Window], logits: Sequence[Tensor], empty: bool) -> str:
    """The likeliest span of at most ``LONGEST_ANSWER`` tokens of the context over all its windows.

    ``logits`` [tokens, 2] are each window's starts and ends. With ``empty``, there may be no answer: then it is ``""``
    where the first token scores no less as start and end than the span, in the window in which it scores least.
    """
    best, text = -torch.inf, ""
    null = torch.inf
    for window, both in zip(windows, logits, strict=True):
        null = min(null, float(both[0, 0] + both[0, 1]))
        inside = both[window.first : window.first + len(window.offsets)]
        spans = inside[:, 0, None] + inside[None, :, 1]
        # The end is the start or one of the tokens behind it.
        allowed = torch.ones_like(spans, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
        spans = spans.masked_fill(~allowed, -torch.inf)
        place = int(spans.argmax())
        start, stop = divmod(place, len(window.offsets))
        if float(spans[start, stop]) > best:
            best = float(spans[start, stop])
            text = context[window.offsets[start][0] : window.offsets[stop][1]].strip()
    return "" if empty and not best > null else text


def _texts(
    model: PeftModel,
    name: str,
    task: TaskType,
    examples: Sequence[Example],
    batch_size: int,
    held_out: HeldOut,
    world: ProcessGroup,
) -> Predictions:
    """Texts that the adapter writes: of a conversation, the last thing that it is trained to say."""
    said = Predictions(examples=list(range(len(examples))))
    prompts = []
    once = held_out.rows is None or len({int(row) for row in held_out.rows}) == len(examples)
    for number, example in enumerate(examples):
        prompt, target = prompt_and_target(example, task)
        prompts.append(prompt)
        row = number if held_out.rows is None else int(held_out.rows[number])
        record = held_out.records[row][1] if held_out.records and once else None
        if isinstance(record, Pair | Translated):  # whole, where the example may be cut
            said.references.append(record.completion if isinstance(record, Pair) else record.target)
        else:
            said.references.append(held_out.tokenizer.decode(target, skip_special_tokens=True))
    mine = world.shard(prompts)  # of which there may be none; a model in parts still needs this process
    everyone = world.gather(generate(model, name, held_out.tokenizer, mine, held_out.max_new_tokens, batch_size))
    said.predictions = [everyone[number % world.size][number // world.size] for number in range(len(prompts))]
    return said


def prompt_and_target(example: Example, task: TaskType) -> tuple[list[int], list[int]]:
    """What the model is given, and what it is to write: the end of a text, where there is no prompt."""
    labels = example.labels
    assert isinstance(labels, list)
    if task is TaskType.SEQ_2_SEQ_LM:
        return example.input_ids, [int(label) for label in labels]
    trained = [i for i, label in enumerate(labels) if label != IGNORE]
    stop = start = trained[-1] + 1 if trained else len(labels)
    while start > 0 and labels[start - 1] != IGNORE:
        start -= 1
    # A row's first token is never predicted; where all are trained on, some are the prompt.
    start = start if start > 1 else max(1, min(8, stop - 1))
    return example.input_ids[:start], example.input_ids[start:stop]
