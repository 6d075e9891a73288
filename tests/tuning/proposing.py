"""Proposals and trials without a model, for tests of what is made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.sampler import propose
from loraloom.tuning.space import Space
from loraloom.tuning.trial import Trial

BASE = TrainConfig(model="m", data="d.csv", task="seq-cls", output="o", max_steps=30)
SMALL = {"lora.r": [4, 8, 16], "lora.lora_alpha": ["r", "2r"], "lora.lora_dropout": [0.0, 0.1]}
WIDE = {**SMALL, "train.learning_rate": {"log": [1e-4, 1e-2]}}


def options(space: Mapping[str, Any] = WIDE, **changes: Any) -> TuneConfig:
    train = changes.pop("train", BASE)
    return TuneConfig(**{"train": train, "space": Space.parse(space, train), "trials": 12, "finalists": 2, **changes})


def trial(number: int, values: Mapping[str, Any], state: str = "finished", good: float = 0.5, **more: Any) -> Trial:
    curve = Curve([1.0] * 30, [1e-3] * 30, [{"step": 10, "loss": 1.0, "accuracy": good}])
    return Trial(number, dict(values), BASE, 30, 30, state, curve=curve, **more)


def all_proposals(given: TuneConfig, count: int, sampler: Any = None) -> Iterator[dict[str, Any]]:
    """One after another, each measured: the higher the rank, the better."""
    trials: list[Trial] = []
    while len(trials) < count and (values := propose(given, trials, sampler)) is not None:
        yield values
        trials.append(trial(len(trials), values, good=values["lora.r"] / 16))
