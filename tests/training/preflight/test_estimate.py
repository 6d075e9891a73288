"""Promises of the outlook: figures for the whole training, and an adapter that is as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraloom import PeftModel
from loraloom.data.example import Example
from loraloom.engine.pack import Pack
from loraloom.models.load import build_empty
from loraloom.training.preflight import estimate
from loraloom.training.preflight.estimate import ResourceEstimate, estimate_resources


def looked(model: PeftModel, folder: Path, examples: list[Example], again: bool = False) -> ResourceEstimate:
    pack = Pack(model)
    return estimate_resources(
        pack, "default", model.peft_config["default"], examples, examples[:2],
        empty=build_empty(str(folder), pack.task), dtype="float32", batch_size=4, forwards=1000, evaluations=10,
        gradient_checkpointing=again,
    )  # fmt: skip


@pytest.mark.parametrize("task", ["classifier", "decoder"])
def test_time_and_memory_are_told_and_the_adapter_is_as_it_was(task: str, request: pytest.FixtureRequest) -> None:
    make: Callable[..., PeftModel] = request.getfixturevalue(task)
    folder = request.getfixturevalue("encoder_folder" if task == "classifier" else "decoder_folder")
    examples = request.getfixturevalue("classes" if task == "classifier" else "completions")
    model = make("float32")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    found = looked(model, folder, examples)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert 0.1 < found.seconds < 1000
    assert found.fits
    assert found.memory.activations
    again = looked(make("float32"), folder, examples, again=True)
    assert again.memory.activations
    assert again.memory.activations < found.memory.activations


def test_what_does_not_fit_is_known(
    classifier: Callable[..., PeftModel], encoder_folder: Path, classes: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda: 1000)
    assert not looked(classifier("float32"), encoder_folder, classes).fits
