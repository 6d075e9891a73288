"""Promises of smaller adapters: measured as they are saved, and offered only if as good."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loraloom import LoraConfig
from loraloom.report.tune import conclusion
from loraloom.training.setup import load
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.search import search

Make = Callable[..., TuneConfig]


@pytest.fixture(scope="module")
def found(classifying: Callable[[Path], Make], tmp_path_factory: pytest.TempPathFactory) -> Any:
    make = classifying(tmp_path_factory.mktemp("smaller") / "search")
    space = {"lora.r": [8, 16], "train.learning_rate": [0.01, 0.02]}
    options = make(space, min_share=1.0, train={"max_steps": 48})
    return options, search(options)


def test_the_best_is_measured_at_each_half_of_its_rank(found: Any) -> None:
    _, result = found
    highest = result.verdict.best.options.lora.r
    ranks = [one["r"] for one in result.record["cuts"]["measured"]]
    assert ranks == [highest >> power for power in range(1, highest.bit_length())]
    sizes = [one["parameters"] for one in result.record["cuts"]["measured"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] < result.verdict.best.parameters


def test_the_smallest_that_loses_no_more_than_its_error_is_offered_and_is_what_was_measured(found: Any) -> None:
    options, result = found
    cuts = result.record["cuts"]
    good = [one for one in cuts["measured"] if one["worse"] <= one["error"]]
    assert cuts["offered"] == good[-1]
    assert LoraConfig.from_pretrained(cuts["adapter"]).r == cuts["offered"]["r"]
    setup = load(options.train)
    setup.model.load_adapter(cuts["adapter"], "again")
    (figures,) = setup.evaluator().metrics(["again"])
    assert figures["accuracy"] == cuts["offered"]["metric"]
    assert (Path(cuts["adapter"]) / "usage.json").is_file()
    console = Console(width=400, file=io.StringIO())
    console.print(conclusion(result.verdict))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"cut to r={cuts['offered']['r']} it is as good (accuracy {cuts['offered']['metric']:.3f}, " in said
    assert f"{cuts['offered']['parameters']:,} parameters" in said


def test_a_search_that_learned_nothing_cuts_nothing(classify: Make) -> None:
    result = search(classify({"lora.r": [2, 4]}, trials=2, train={"max_steps": 2, "learning_rate": 1e-7}))
    assert result.record["cuts"] is None
    assert conclusion(result.verdict)
