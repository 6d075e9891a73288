"""A device, and a small model on it. ``LORALOOM_TEST_DEVICE=cpu`` runs these tests where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 96
Make = Callable[..., nn.Module]
Batch = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="session")
def device() -> str:
    name = os.environ.get("LORALOOM_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; LORALOOM_TEST_DEVICE=cpu runs it on the processor")
    return name


@pytest.fixture
def llama(device: str) -> Make:
    """The same numbers on every device. Attention is plain: the fused one adds gradients up in any order on a GPU."""

    def make(dtype: torch.dtype = torch.float32, on: str = device, **fields: Any) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=VOCABULARY, attn_implementation="eager", **sizes, **fields)
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(on, dtype)

    return make


@pytest.fixture
def batch(device: str) -> Batch:
    """Rows that follow from their seed alone, ``{"input_ids", "labels"}`` of [rows, tokens]."""

    def make(seed: int, rows: int = 2, tokens: int = 16, on: str = device) -> dict[str, Tensor]:
        ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed)).to(on)
        return {"input_ids": ids, "labels": ids}

    return make
