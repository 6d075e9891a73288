"""Small models, made from local configs, saved and loaded again through the real ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(llama_folder: Path) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(llama_folder)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 100, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits() -> Callable[..., Tensor]:
    def call(model: nn.Module, ids: Tensor, **options: object) -> Tensor:
        with torch.no_grad():
            return model(ids, **options).logits

    return call
