"""Promises of the losses and metrics, seen from outside: what one step notes down and what an evaluation says."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom import PeftModel, TaskType
from loraloom.data import IGNORE, Example, collate
from loraloom.train.loop import evaluate, train_pack
from loraloom.train.slot import Slot

CLASSES, LM = TaskType.SEQ_CLS, TaskType.CAUSAL_LM
Maker = Callable[..., PeftModel]


def first_loss(model: PeftModel, task: TaskType, examples: list[Example]) -> tuple[float, list[Tensor]]:
    """The loss that one step over all ``examples`` notes down, and the gradients that it takes."""
    parameters = model.adapter_parameters("default")
    slot = Slot("default", parameters, examples, steps=1, batch_size=len(examples), learning_rate=1e-30)
    gradients: list[Tensor] = []
    update = slot.update

    def keep(loss: Tensor) -> None:
        gradients.extend(p.grad.clone() for p in parameters.values() if p.grad is not None)
        update(loss)

    slot.update = keep  # type: ignore[method-assign]
    train_pack(model, [slot], task, 0, evaluate_every=1, evaluate=lambda slot: {})
    return slot.curve.loss[0], gradients


def by_hand(model: PeftModel, examples: list[Example]) -> Tensor:
    """Each completion token's loss, one row at a time and without padding."""
    losses = []
    for example in examples:
        assert isinstance(example.labels, list)
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        losses += [
            F.cross_entropy(logits[i - 1], torch.tensor(label))
            for i, label in enumerate(example.labels)
            if label != IGNORE and i
        ]
    return torch.stack(losses)


def test_the_loss_of_causal_lm_is_the_mean_over_completion_tokens_only(
    decoder: Maker, completions: list[Example]
) -> None:
    model, examples = decoder(), completions[:5]
    found, gradients = first_loss(model, LM, examples)
    per_token = by_hand(model, examples)
    assert len(per_token) == 10  # one word and the end, five times
    assert found == pytest.approx(per_token.mean().item(), rel=1e-6)
    model.zero_grad()
    per_token.mean().backward()
    wanted = [p.grad for p in model.adapter_parameters("default").values() if p.grad is not None]
    assert len(gradients) == len(wanted) > 0
    for a, b in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_what_the_prompts_tokens_are_told_to_be_changes_nothing(decoder: Maker, completions: list[Example]) -> None:
    model, example = decoder(), completions[0]
    assert isinstance(example.labels, list)
    all_tokens = Example(example.input_ids, list(example.input_ids))
    alone, _ = first_loss(model, LM, [example])
    whole, _ = first_loss(model, LM, [all_tokens])
    assert alone != pytest.approx(whole, rel=1e-3)
    assert alone == pytest.approx(by_hand(model, [example]).mean().item(), rel=1e-6)


def test_the_loss_of_a_classifier_is_the_mean_over_rows(classifier: Maker, classes: list[Example]) -> None:
    model, examples = classifier(), classes[:6]
    found, _ = first_loss(model, CLASSES, examples)
    losses = [
        F.cross_entropy(model(input_ids=torch.tensor([e.input_ids])).logits[0], torch.tensor(e.labels))
        for e in examples
    ]
    assert found == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_an_evaluation_is_the_exact_mean_whatever_the_batches(
    decoder: Maker, completions: list[Example], size: int
) -> None:
    # Completions of different lengths: a mean of the batches' means would be another number.
    examples = [Example(e.input_ids + [3 + i] * i, e.labels + [3 + i] * i) for i, e in enumerate(completions[:7])]  # type: ignore[operator]
    model = decoder()
    with torch.no_grad():
        mean = float(by_hand(model, examples).mean())
    found = evaluate(model, "default", LM, examples, 0, size)
    assert found == {"loss": pytest.approx(mean, rel=1e-6), "perplexity": pytest.approx(math.exp(mean), rel=1e-6)}


@pytest.mark.parametrize("size", [1, 4, 64])
def test_accuracy_counts_rows(classifier: Maker, classes: list[Example], size: int) -> None:
    model, examples = classifier(), classes[:9]
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([e.input_ids])).logits for e in examples])
    labels = torch.tensor([e.labels for e in examples])
    found = evaluate(model, "default", CLASSES, examples, 0, size)
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)


def test_a_perplexity_beyond_all_numbers_is_infinite_and_no_error(decoder: Maker, completions: list[Example]) -> None:
    model = decoder(target_modules=["lm_head"])
    for p in model.adapter_parameters("default").values():
        p.data.mul_(1e4)
    found = evaluate(model, "default", LM, completions[:3], 0, 8)
    assert found["loss"] > 700
    assert found["perplexity"] == math.inf


def test_padding_is_not_seen(classifier: Maker, classes: list[Example]) -> None:
    model = classifier().eval()
    rows = sorted(classes[:12], key=lambda e: len(e.input_ids))
    short, long = rows[0], rows[-1]
    assert len(short.input_ids) < len(long.input_ids)
    inputs = collate([short, long], 0, CLASSES)
    inputs.pop("labels")
    with torch.no_grad():
        together = model(**inputs).logits[0]
        alone = model(input_ids=torch.tensor([short.input_ids])).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
