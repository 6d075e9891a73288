"""Promises of the loop: a pack of many is each one alone, a loss that is not finite changes nothing, all is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loops import train_pack
from loraloom import LoraConfig, PeftModel, tasks
from loraloom.data.example import Example
from loraloom.engine.loop import StepEvent
from loraloom.engine.slot import Slot
from loraloom.inference.evaluation import Evaluator
from loraloom.inference.session import Session
from loraloom.tasks.base import Task

CLASSES, LM = tasks.get("seq-cls"), tasks.get("causal-lm")
Maker = Callable[..., PeftModel]

#: Two that differ in all that slots can differ in: r, targets, scale, start, rows, rates, how long they train.
ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {"r": 4, "target_modules": "all-linear", "lora_alpha": 4, "init_lora_weights": False},
    "other": {"r": 7, "target_modules": ["q_proj", "down_proj", "query", "value"], "use_rslora": True},
}
SLOTS: dict[str, dict[str, Any]] = {
    "default": {"steps": 7, "batch_size": 5, "learning_rate": 1e-2, "seed": 1, "weight_decay": 0.1},
    "other": {"steps": 4, "batch_size": 3, "learning_rate": 3e-2, "seed": 2, "warmup_ratio": 0.5, "max_grad_norm": 0.2},
}


def two(make: Maker) -> PeftModel:
    """A model that carries both adapters, each with its own seed."""
    model = make(seed=11, **ADAPTERS["default"])
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in ADAPTERS["other"]["target_modules"] if name in known]
    other = LoraConfig(
        task_type=model.peft_config["default"].task_type, **{**ADAPTERS["other"], "target_modules": targets}
    )
    model.add_adapter("other", other, seed=12)
    return model


def train(
    model: PeftModel, task: Task, examples: list[Example], *names: str, **options: Any
) -> tuple[dict[str, Slot], int]:
    slots = {name: Slot(name, model.adapter_parameters(name), examples, **SLOTS[name]) for name in names}
    return slots, train_pack(model, list(slots.values()), task, 0, **options)


def weights(model: PeftModel, name: str) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in model.adapter_parameters(name).items()}


@pytest.fixture(params=["seq-cls", "causal-lm"])
def pack(request: pytest.FixtureRequest) -> tuple[Maker, Task, list[Example]]:
    if request.param == "seq-cls":
        return request.getfixturevalue("classifier"), CLASSES, request.getfixturevalue("classes")
    return request.getfixturevalue("decoder"), LM, request.getfixturevalue("completions")


# One and many ---------------------------------------------------------------------------------------------


def test_a_pack_of_two_is_each_of_them_alone(pack: tuple[Maker, Task, list[Example]]) -> None:
    make, task, examples = pack
    together = two(make)
    start = {name: weights(together, name) for name in ADAPTERS}
    both, _ = train(together, task, examples, "default", "other")
    for name in ADAPTERS:
        # The other adapter lies on the same base and is not trained: only what is in the loop differs.
        alone = two(make)
        one, _ = train(alone, task, examples, name)
        assert both[name].step == SLOTS[name]["steps"]
        assert both[name].curve.learning_rate == one[name].curve.learning_rate
        close = 1e-5 if task is LM else 1e-9  # a Llama's norms compute in float32, whose rounding follows the batch
        assert both[name].curve.loss == pytest.approx(one[name].curve.loss, rel=close)
        found, wanted = weights(together, name), weights(alone, name)
        assert max((found[key] - start[name][key]).abs().max() for key in found) > 1e-3
        for key in found:
            torch.testing.assert_close(found[key], wanted[key], rtol=close, atol=close)


def test_what_is_not_in_the_loop_is_not_touched(decoder: Maker, completions: list[Example]) -> None:
    model = two(decoder)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    train(model, LM, completions, "other")
    mine = {id(p) for p in model.adapter_parameters("other").values()}
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key]) != (id(p) in mine), key
        assert p.grad is None, key


# Figures --------------------------------------------------------------------------------------------------


def test_each_step_is_seen_with_its_loss_and_the_tokens_so_far(decoder: Maker, completions: list[Example]) -> None:
    model, seen = decoder(), []

    def watch(event: StepEvent) -> None:
        assert event.loss == slot.curve.loss[-1]
        seen.append((event.step, len(slot.curve.loss), event.tokens))

    slot = Slot(
        "default", model.adapter_parameters("default"), completions[:9], steps=4, batch_size=4, learning_rate=1e-3
    )
    tokens = train_pack(model, [slot], LM, 0, on_step=watch)
    assert [step for step, *_ in seen] == [losses for _, losses, _ in seen] == [1, 2, 3, 4]
    epoch = sum(len(e.input_ids) for e in completions[:9])  # three batches; padding is not counted
    assert seen[2][2] == epoch
    assert tokens == seen[3][2] > epoch


def test_an_evaluation_changes_neither_mode_nor_weights_nor_the_active_adapter(
    decoder: Maker, completions: list[Example]
) -> None:
    model = two(decoder)
    before, active = weights(model, "other"), model.active_adapters
    for training in (True, False):
        model.train(training)
        figures = Evaluator(Session(model=model, task=LM), completions[:8], batch_size=3).metrics(list(ADAPTERS))
        assert model.training is training
        assert model.active_adapters == active
        assert figures[0] != figures[1]
    assert all(torch.equal(p, before[key]) for key, p in model.adapter_parameters("other").items())


def test_dropout_is_on_in_training_and_off_in_evaluation(classifier: Maker, classes: list[Example]) -> None:
    model = classifier(lora_dropout=0.5)
    evaluator = Evaluator(Session(model=model, task=CLASSES), classes[:8], batch_size=4)
    figures = {evaluator.metrics(["default"])[0]["loss"] for _ in range(3)}
    assert len(figures) == 1
    losses = set()
    for seed in range(3):
        # One batch of all rows: the seed is that of the dropout alone.
        slot = Slot(
            "default",
            model.adapter_parameters("default"),
            classes[:8],
            steps=1,
            batch_size=8,
            learning_rate=1e-30,
            seed=seed,
        )
        train_pack(model, [slot], CLASSES, 0)
        losses.add(slot.curve.loss[0])
    assert len(losses) == 3


# A loss that is not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_its_slot_as_it_was_before_and_the_others_go_on(
    decoder: Maker, completions: list[Example], number: float
) -> None:
    model = two(decoder)
    left: dict[str, dict[str, Tensor]] = {}

    def spoil(event: StepEvent) -> None:
        if event.name == "other" and event.step == 2:  # the last to be updated in a step
            next(iter(model.adapter_parameters("other").values())).data[0, 0] = number
            left.update({name: weights(model, name) for name in ADAPTERS})

    slots, _ = train(model, LM, completions, "default", "other", on_step=spoil)
    assert slots["other"].failure == "step 3: the loss is nan"
    for key, p in model.adapter_parameters("other").items():
        assert torch.equal(p.nan_to_num(), left["other"][key].nan_to_num()), key
    alone = two(decoder)
    one, _ = train(alone, LM, completions, "default")
    assert slots["default"].curve.loss == pytest.approx(one["default"].curve.loss, rel=1e-5)
