"""Small searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.space import Space

Make = Callable[..., TuneConfig]


def make(train: Mapping[str, Any], space: Mapping[str, Any], changes: dict[str, Any]) -> TuneConfig:
    """``changes`` with ``train`` and ``lora`` in it are those of the trials."""
    lora = LoraConfig(**{"r": 4, "target_modules": "all-linear", **changes.pop("lora", {})})
    options = TrainConfig(**{**train, "lora": lora, **changes.pop("train", {})})
    given = {"trials": 4, "finalists": 1, "seeds": 0, "slots": 4, "sampler": "random", **changes}
    return TuneConfig(train=options, space=Space.parse(space, options), **given)


def searches(**train: Any) -> Callable[[Path], Make]:
    """Searches in a folder, with ``train`` for options of their trials."""
    return lambda output: lambda space, **changes: make({**train, "output": output}, space, changes)


@pytest.fixture(scope="session")
def classifying(encoder_folder: Path, reviews: Path) -> Callable[[Path], Make]:
    return searches(model=encoder_folder, data=reviews, task="seq-cls", max_steps=9, batch_size=8, eval_split=40)


@pytest.fixture(scope="session")
def completing(decoder_folder: Path, chats: Path) -> Callable[[Path], Make]:
    return searches(model=decoder_folder, data=chats, task="causal-lm", max_steps=9, batch_size=4, eval_split=20)


@pytest.fixture
def classify(classifying: Callable[[Path], Make], tmp_path: Path) -> Make:
    return classifying(tmp_path / "search")


@pytest.fixture
def complete(completing: Callable[[Path], Make], tmp_path: Path) -> Make:
    return completing(tmp_path / "search")
