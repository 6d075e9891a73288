"""Promises of many adapters in one forward: each row's loss, figures and predictions as with one adapter at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loraloom import LoraConfig, PeftModel, tasks
from loraloom.data.example import Example
from loraloom.data.records import Asked, Labelled, Pair, Record, Related, Tagged, Translated
from loraloom.data.rows import Row
from loraloom.data.tokenize.encode import encoder
from loraloom.inference.evaluation import Evaluator, HeldOut
from loraloom.inference.session import Session
from loraloom.lora.routing import BASE
from loraloom.models.load import load_base, load_tokenizer
from loraloom.tasks.metrics.registry import choose

NAMES = ["first", "second", BASE, "third"]
TAGS = ["O", "B-X", "I-X"]
WORDS = ["the", "good", "film", "was", "a", "bad", "book", "with", "the", "cat", "in", "it"]


def text(number: int) -> str:
    return " ".join(WORDS[number % 5 : number % 5 + 3 + number % 7])


#: task → its model, rows, labels, metrics
CASES: dict[str, tuple[str, Callable[[int], Record], list[str], list[str] | None]] = {
    "causal-lm": ("decoder_folder", lambda i: Pair(text(i), f" {text(i + 2)}"), [], ["rougeL", "perplexity"]),
    "seq-cls": ("encoder_folder", lambda i: Labelled(text(i), None, "abc"[i % 3]), ["a", "b", "c"], None),
    "token-cls": (
        "encoder_folder",
        lambda i: Tagged(text(i).split(), [TAGS[(i + j) % 3] for j in range(len(text(i).split()))]),
        TAGS,
        None,
    ),
    "seq2seq-lm": ("translator_folder", lambda i: Translated(text(i), text(i + 3)), [], ["rougeL"]),
    "question-answering": ("encoder_folder", lambda i: Asked("was it", text(i), [(text(i)[:3], 0)]), [], None),
    "feature-extraction": ("encoder_folder", lambda i: Related((text(i), text(i + 1))), [], None),
}


def session_of(task: str, folder: str, dtype: str = "float32", **more: Any) -> Session:
    """Adapters that differ in rank, targets and heads."""
    known, labels = tasks.get(task), CASES[task][2]
    torch.manual_seed(0)
    base, _ = load_base(folder, known, dtype, labels)
    model = PeftModel(base)
    for number, name in enumerate(["first", "second", "third"]):
        given: dict[str, Any] = {"r": 2 + 3 * number, "lora_alpha": 8, "init_lora_weights": False, **more}
        targets = "all-linear" if number else [key for key, module in base.named_modules() if _inner(key, module)]
        config = LoraConfig(task_type=known.task_type, target_modules=targets, **given)
        model.add_adapter(name, known.adapted(base, config), seed=number)
    return Session(model=model, task=known, tokenizer=load_tokenizer(folder), labels=labels)


def _inner(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and "1" in name.split(".")


def evaluator_of(session: Session, size: int) -> Evaluator:
    _, record, labels, metrics = CASES[session.task.name]
    records = [(Row({}, number), record(number)) for number in range(14)]
    encoded = encoder(session.task, session.tokenizer, max_length=64, labels=labels).encode(records)
    assert not any(row.error or row.problem for row in encoded)
    examples: list[Example] = [example for row in encoded for example in row.examples]
    of = [number for number, row in enumerate(encoded) for _ in row.examples]
    asked = choose(session.task, session.task.problem_of(examples), metrics)
    held_out = HeldOut(records=records, rows=of, max_length=64, metrics=asked, max_new_tokens=4)
    return Evaluator(session, examples, held_out, size)


@pytest.mark.parametrize(("task", "size"), [*((task, 64) for task in CASES), ("causal-lm", 24), ("seq-cls", 6)])
def test_many_adapters_in_one_forward_equal_one_at_a_time(
    task: str, size: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(task, str(request.getfixturevalue(CASES[task][0])))
    evaluator = evaluator_of(session, size)
    forwards: list[Any] = []
    session.base.register_forward_pre_hook(lambda module, args: forwards.append(1))
    losses, metrics, said = evaluator.losses(NAMES), evaluator.metrics(NAMES), evaluator.predictions(NAMES)
    rows = [7, 2, 11]
    assert losses.shape == (4, 14)
    if task != "feature-extraction":  # there a row is compared with the others
        torch.testing.assert_close(evaluator.losses(NAMES, rows), losses[:, rows], rtol=1e-5, atol=1e-6)
    for place, name in enumerate(NAMES):
        torch.testing.assert_close(evaluator.losses([name])[0], losses[place], rtol=1e-5, atol=1e-6)
        assert metrics[place] == pytest.approx(evaluator.metrics([name])[0], rel=1e-5, abs=1e-6)
        assert said[place].references == evaluator.predictions([name])[0].references
    assert len({round(float(one.mean()), 5) for one in losses}) == 4
    if size == 64:
        forwards.clear()
        evaluator.losses(NAMES)
        assert len(forwards) <= 2  # one, and one that shows how the logits come about


@pytest.mark.parametrize("task", ["causal-lm", "seq-cls", "token-cls", "seq2seq-lm"])
def test_a_rows_loss_is_its_own_whatever_the_rows_beside_it(task: str, request: pytest.FixtureRequest) -> None:
    session = session_of(task, str(request.getfixturevalue(CASES[task][0])), "float64")
    evaluator = evaluator_of(session, 64)
    alone = torch.cat([evaluator.on([number]).losses(NAMES) for number in range(14)], 1)
    torch.testing.assert_close(evaluator.losses(NAMES), alone, rtol=1e-5, atol=1e-8)
    mean, counts = evaluator.metrics(["first"])[0]["loss"], [session.task.count(e) for e in evaluator.examples]
    weights = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    assert float(evaluator.losses(["first"])[0] @ weights) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("more", [{"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_heads_that_adapters_train_are_their_own(decoder_folder: Path, more: dict[str, Any]) -> None:
    base, _ = load_base(str(decoder_folder), tasks.get("causal-lm"), "float64")
    model = PeftModel(base)
    for number, name in enumerate(["first", "second"]):
        given = {"target_modules": ["q_proj"], **more}
        model.add_adapter(name, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **given), seed=number)
        for parameter in model.adapter_parameters(name).values():
            parameter.data += 0.1 * torch.randn_like(parameter)
    tokenizer = load_tokenizer(str(decoder_folder))
    evaluator = evaluator_of(Session(model=model, task=tasks.get("causal-lm"), tokenizer=tokenizer), 64)
    names = ["first", BASE, "second"]
    found = evaluator.losses(names)
    torch.testing.assert_close(found, torch.cat([evaluator.losses([name]) for name in names]), rtol=1e-6, atol=1e-9)
    model.set_adapter("second")  # which one is active plays no part
    torch.testing.assert_close(evaluator.losses(names), found)
    assert float((found[0] - found[2]).abs().max()) > 1e-3


def test_nan_in_one_adapter_leaves_the_others_rows_bit_identical(encoder_folder: Path) -> None:
    session = session_of("seq-cls", str(encoder_folder))
    evaluator = evaluator_of(session, 64)
    before = evaluator.losses(NAMES)
    for parameter in session.model.adapter_parameters("second").values():
        parameter.data.fill_(torch.nan)
    after = evaluator.losses(NAMES)
    assert bool(after[1].isnan().all())
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def test_a_model_whose_layers_do_not_show_their_rows_is_run_adapter_by_adapter(
    encoder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of("seq-cls", str(encoder_folder))
    evaluator = evaluator_of(session, 64)
    wanted = evaluator.losses(NAMES)
    monkeypatch.setattr("loraloom.inference.evaluation.mixed.in_one_forward", _only_alone)
    torch.testing.assert_close(evaluator.losses(NAMES), wanted, rtol=1e-5, atol=1e-6)


def _only_alone(lora: Any, names: list[str], run: Callable[[], Any], prove: Any) -> Any:
    return (run(),) if len(names) == 1 else None
