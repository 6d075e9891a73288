"""Small searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from loraloom import LoraConfig
from loraloom.train.settings.options import TrainOptions
from loraloom.tune.options import TuneOptions
from loraloom.tune.space import Space

Make = Callable[..., TuneOptions]


def make(train: Mapping[str, Any], space: Mapping[str, Any], changes: dict[str, Any]) -> TuneOptions:
    """``changes`` with ``train`` and ``lora`` in it are those of the trials."""
    lora = LoraConfig(**{"r": 4, "target_modules": "all-linear", **changes.pop("lora", {})})
    options = TrainOptions(**{**train, "lora": lora, **changes.pop("train", {})})
    given = {"trials": 4, "finalists": 1, "seeds": 0, "slots": 4, "sampler": "random", **changes}
    return TuneOptions(train=options, space=Space.parse(space, options), **given)


@pytest.fixture
def classify(encoder_folder: Path, reviews: Path, tmp_path: Path) -> Make:
    def options(space: Mapping[str, Any], **changes: Any) -> TuneOptions:
        train = {"model": encoder_folder, "data": reviews, "task": "seq-cls", "output": tmp_path / "search"}
        return make({**train, "max_steps": 9, "batch_size": 8, "eval_split": 40}, space, changes)

    return options


@pytest.fixture
def complete(decoder_folder: Path, chats: Path, tmp_path: Path) -> Make:
    def options(space: Mapping[str, Any], **changes: Any) -> TuneOptions:
        train = {"model": decoder_folder, "data": chats, "task": "causal-lm", "output": tmp_path / "search"}
        return make({**train, "max_steps": 9, "batch_size": 4, "eval_split": 20}, space, changes)

    return options
