"""Promises of the outlook: figures for the whole training, and an adapter that is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.training.preflight import estimate
from loraloom.training.preflight.estimate import outlook
from loraloom.training.run import prepare
from loraloom.training.setup import TrainJob


def job_of(task: str, request: pytest.FixtureRequest, output: Path, again: bool = False) -> TrainJob:
    folder, data = {"seq-cls": ("encoder_folder", "reviews"), "causal-lm": ("decoder_folder", "chats")}[task]
    model, rows = str(request.getfixturevalue(folder)), str(request.getfixturevalue(data))
    return prepare(TrainConfig(
        model=model, data=rows, task=task, output=str(output), batch_size=4, max_steps=1000, eval_steps=100,
        gradient_checkpointing=again, lora=LoraConfig(target_modules="all-linear", lora_dropout=0.1),
    ))  # fmt: skip


@pytest.mark.parametrize("task", ["seq-cls", "causal-lm"])
def test_time_and_memory_are_told_and_the_adapter_is_as_it_was(
    task: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    job = job_of(task, request, tmp_path)
    before = {name: p.detach().clone() for name, p in job.model.named_parameters()}
    state = torch.get_rng_state()
    found = outlook(job)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in job.model.named_parameters())
    assert 0.1 < found.seconds < 1000
    assert found.fits
    assert found.memory.activations
    again = outlook(job_of(task, request, tmp_path, again=True))
    assert again.memory.activations
    assert again.memory.activations < found.memory.activations


def test_what_does_not_fit_is_known(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda: 1000)
    assert not outlook(job_of("seq-cls", request, tmp_path)).fits
