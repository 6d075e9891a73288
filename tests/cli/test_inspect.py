"""Promises of ``loraloom plan`` and ``loraloom inspect``: what they show is what is there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WEIGHTS = "adapter_model.safetensors"


def test_a_plan_shows_modules_totals_and_memory_from_the_config_alone(
    call: Callable[..., Any], decoder_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(decoder_folder / "config.json", tmp_path)
    given = ["--r", 4, "--target-modules", "q_proj,v_proj", "--batch-size", 3, "--max-length", 10]
    ended = call("plan", "--model", tmp_path, "--task", "causal-lm", *given)
    assert (ended.code, ended.err) == (0, "")
    assert "model.layers.1.self_attn.v_proj" in ended.out
    assert f"{4 * (2 * (32 + 32) + 2 * (32 + 16)):,} of" in ended.out
    assert "3 rows of 10 tokens in float32" in ended.out
    for part in ("frozen model", "adapter", "its gradients", "AdamW", "kept for backward", "in all"):
        assert part in ended.out
    assert ended.out.startswith("lora_alpha is 8 (2 * r); --lora-alpha sets another\n")
    assert os.listdir(tmp_path) == ["config.json"]


def test_an_adapter_is_shown_with_norms_and_the_rank_it_uses(call: Callable[..., Any], trained: Path) -> None:
    ended = call("inspect", trained)
    assert (ended.code, ended.err) == (0, "")
    # Whole names, at any width of the terminal: they are what the user copies into target_modules.
    for name in ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.self.value"):
        assert f"\n{name} " in ended.out
    assert "classifier.weight: 2×32, in full" in ended.out
    assert "init_lora_weights: False" in ended.out


def test_the_singular_values_of_inspect_are_those_of_the_whole_update(call: Callable[..., Any], trained: Path) -> None:
    found = json.loads(call("inspect", trained, "--json").out)
    tensors = load_file(trained / WEIGHTS)
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert found["config"]["task_type"] == "SEQ_CLS"
    assert len(found["updates"]) == 13  # every linear layer of two layers, and the pooler's
    for update in found["updates"]:
        key = f"base_model.model.{update['name']}.lora_"
        delta = 2 * tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()  # alpha 32, r 16
        values = torch.linalg.svdvals(delta)[:16]
        assert update["singular_values"] == pytest.approx(values.tolist(), rel=1e-6, abs=1e-9)
        assert update["norm"] == pytest.approx(float(delta.norm()))
        assert update["used_rank"] == int((values.square().cumsum(0) < 0.99 * values.square().sum()).sum()) + 1
