"""Promises of smaller adapters: measured as they are saved, and offered only if as good."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from loraloom import LoraConfig
from loraloom.lora.rank_cut import rescale
from loraloom.report.sentences import sentence
from loraloom.report.tune import conclusion, cut_messages
from loraloom.training.setup import load
from loraloom.tuning import smaller
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.search import search
from loraloom.tuning.smaller import Scaled, best_scale, cut

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
    measured = result.record["cuts"]["measured"]
    even, each = ([one for one in measured if one["by_energy"] is way] for way in (False, True))
    halves = [highest >> power for power in range(1, highest.bit_length())]
    assert [one["r"] for one in even] == halves
    assert [one["r"] for one in each] == halves[:-1]  # a rank of 1 cannot be shared out
    sizes = [one["parameters"] for one in even]
    assert sizes == sorted(sizes, reverse=True)
    assert all(0.9 * size < one["parameters"] <= size for one, size in zip(each, sizes, strict=False))
    assert sizes[0] < result.verdict.best.parameters


def test_the_smallest_that_loses_no_more_than_its_error_is_offered_and_is_what_was_measured(found: Any) -> None:
    options, result = found
    cuts = result.record["cuts"]
    good = [one for one in cuts["measured"] if one["worse"] <= one["error"]]
    least = min(one["r"] for one in good)
    assert cuts["offered"] == next(one for one in good if one["r"] == least)
    assert cuts["offered"]["by_energy"] or LoraConfig.from_pretrained(cuts["adapter"]).r == least
    setup = load(options.train)
    setup.model.load_adapter(cuts["adapter"], "again")
    (figures,) = setup.evaluator().metrics(["again"])
    assert figures["accuracy"] == cuts["offered"]["metric"]
    assert (Path(cuts["adapter"]) / "usage.json").is_file()
    assert result.verdict.cuts is not None
    said = sentence(cut_messages(result.verdict.cuts, "accuracy")[0])
    way = "the size of r={r}, with a rank for each module," if cuts["offered"]["by_energy"] else "r={r}"
    assert f"cut to {way} it is as good (accuracy {{metric:.3f}}, ".format(**cuts["offered"]) in said
    assert f"{cuts['offered']['parameters']:,} parameters" in said


def test_the_best_is_measured_at_other_scales(found: Any) -> None:
    options, result = found
    scales = result.record["cuts"]["scales"]
    assert [one["factor"] for one in scales] == [0.5, 0.75, 1.25]
    setup = load(options.train)
    setup.model.load_adapter(result.record["best"]["adapter"], "whole")
    config = rescale(setup.model, "whole", "halved", 0.5)
    assert config.lora_alpha == scales[0]["lora_alpha"]
    (figures,) = setup.evaluator().metrics(["halved"])
    assert figures["accuracy"] == scales[0]["metric"]


def test_a_scale_is_offered_only_if_its_gain_is_more_than_chance_gives_the_best_of_several() -> None:
    def one(factor: float, better: float) -> Scaled:
        return Scaled(factor, 16 * factor, 0.8, better, 0.01)

    assert best_scale([one(0.5, -0.02), one(0.75, 0.022), one(1.25, 0.021)], 19) is None
    assert best_scale([one(0.5, -0.02), one(0.75, 0.024), one(1.25, 0.03)], 19) == one(1.25, 0.03)
    hits = 0
    draw = random.Random(0)
    for _ in range(500):  # 20 parts of rows on which three scales are as good as none
        parts = [[draw.gauss(0, 1) for _ in range(20)] for _ in range(3)]
        means = [fmean(values) for values in parts]
        errors = [stdev(values) / 20**0.5 for values in parts]
        hits += best_scale([Scaled(1, 1, 0, m, e) for m, e in zip(means, errors, strict=True)], 19) is not None
    assert hits / 500 == pytest.approx(0.05, abs=0.02)


def test_a_scale_that_is_surely_better_is_written_as_alpha(
    found: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, result = found
    best = Path(result.record["best"]["adapter"])
    weak = tmp_path / "weak"
    shutil.copytree(best, weak)
    config = LoraConfig.from_pretrained(weak)
    config.copy(lora_alpha=config.lora_alpha / 1024).save_pretrained(weak)
    monkeypatch.setattr(smaller, "FACTORS", (0.5, 1024))
    monkeypatch.setattr(smaller, "CHANCE", 0.9)  # 40 rows are sure of little
    found_cuts = cut(load(options.train), "accuracy", weak, tmp_path)
    assert found_cuts.scaled == found_cuts.scales[1]
    assert found_cuts.scaled.metric == result.record["best"]["metric"]
    assert LoraConfig.from_pretrained(found_cuts.scaled_adapter).lora_alpha == config.lora_alpha
    assert (Path(found_cuts.scaled_adapter) / "usage.json").is_file()
    (said,) = (sentence(one) for one in cut_messages(found_cuts, "accuracy") if one.kind == "scaled")
    assert said.startswith(f"at 1024 times its scale (lora_alpha {config.lora_alpha:g}) it is better (accuracy ")


def test_a_search_that_learned_nothing_cuts_nothing(classify: Make) -> None:
    result = search(classify({"lora.r": [2, 4]}, trials=2, train={"max_steps": 2, "learning_rate": 1e-7}))
    assert result.record["cuts"] is None
    assert conclusion(result.verdict)
