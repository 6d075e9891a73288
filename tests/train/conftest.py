"""Small adapters in float64 on real folders, and rows as the loop takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.data import Example, encoder, read_rows, recognise
from loraloom.train.settings.options import TASKS
from loraloom.train.start.load import load_base, load_tokenizer

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


def _examples(task: str, folder: Path, path: Path) -> list[Example]:
    rows = read_rows(path)
    shape = recognise(rows, task)
    made = encoder(task, load_tokenizer(str(folder)), max_length=64, labels=LABELS)
    return [example for one in made.encode([(row, shape.read(row)) for row in rows]) for example in one.examples]


@pytest.fixture(scope="session")
def classes(encoder_folder: Path, reviews: Path) -> list[Example]:
    return _examples("seq-cls", encoder_folder, reviews)


@pytest.fixture(scope="session")
def completions(decoder_folder: Path, chats: Path) -> list[Example]:
    return _examples("causal-lm", decoder_folder, chats)
