"""Small adapters in float64 on real folders, and rows as the loop takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.data import Example, encode, label_names, read_rows
from loraloom.train.load import load_base, load_tokenizer
from loraloom.train.options import TASKS

LABELS = ["blame", "praise"]

Maker = Callable[..., PeftModel]


def _maker(folder: Path, task: str) -> Maker:
    def make(dtype: str = "float64", seed: int = 0, **fields: object) -> PeftModel:
        torch.manual_seed(0)  # a new head's numbers
        base, _ = load_base(str(folder), TASKS[task], dtype, LABELS)
        fields = {"target_modules": "all-linear", "init_lora_weights": False, "r": 4, "lora_alpha": 4, **fields}
        return get_peft_model(base, LoraConfig(task_type=TASKS[task], **fields), seed=seed)

    return make


@pytest.fixture
def classifier(encoder_folder: Path) -> Maker:
    return _maker(encoder_folder, "seq-cls")


@pytest.fixture
def decoder(decoder_folder: Path) -> Maker:
    return _maker(decoder_folder, "causal-lm")


@pytest.fixture(scope="session")
def classes(encoder_folder: Path, reviews: Path) -> list[Example]:
    rows = read_rows(reviews)
    assert label_names(rows, reviews) == LABELS
    return encode(rows, load_tokenizer(str(encoder_folder)), "seq-cls", 64, reviews, LABELS).examples


@pytest.fixture(scope="session")
def completions(decoder_folder: Path, chats: Path) -> list[Example]:
    return encode(read_rows(chats), load_tokenizer(str(decoder_folder)), "causal-lm", 64, chats).examples
