"""Promises of a search's test: rows that chose nothing, each figure with its interval, differences on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraloom.report import tune as report
from loraloom.report.sentences import sentence
from loraloom.training.setup import load
from loraloom.tuning import conclusion
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.search import search

Make = Callable[..., TuneConfig]
SPACE = {"lora.r": [2, 4], "train.learning_rate": [0.01, 0.02]}


@pytest.fixture(scope="module")
def tested_search(classifying: Callable[[Path], Make], tmp_path_factory: pytest.TempPathFactory) -> Any:
    make = classifying(tmp_path_factory.mktemp("tested") / "search")
    options = make(SPACE, min_share=1.0, seeds=1, finalists=2, train={"test_split": 40, "max_steps": 48})
    return options, search(options)


def test_the_winner_is_measured_on_rows_that_neither_trained_nor_chose(tested_search: Any) -> None:
    options, result = tested_search
    test = result.record["test"]
    assert result.verdict.learned
    assert (test["rows"], test["seeds"], test["metric"]) == (40, 2, "accuracy")
    setup = load(options.train)
    assert setup.data.test is not None
    rows = [
        {tuple(example.input_ids) for example in part.examples} for part in (setup.data.train, setup.data.validation)
    ]
    assert not {tuple(example.input_ids) for example in setup.data.test.examples} & set.union(*rows)


def test_its_figure_is_the_mean_of_its_seeds_on_those_rows(tested_search: Any) -> None:
    options, result = tested_search
    setup = load(options.train)
    best = result.verdict.best.number
    seeds = [trial.number for trial in result.verdict.trials if best in (trial.number, trial.repeats)]
    for number in seeds:
        setup.model.load_adapter(Path(options.train.output) / "trials" / f"trial-{number}", f"trial-{number}")
    evaluator = setup.test_evaluator()
    assert evaluator is not None
    by_hand = [one["accuracy"] for one in evaluator.metrics([f"trial-{number}" for number in seeds])]
    figure = result.record["test"]["figure"]
    assert figure["value"] == pytest.approx(sum(by_hand) / len(by_hand))
    assert figure["low"] < figure["value"] <= figure["high"] <= 1


def test_it_stands_beside_the_runner_up_the_commonest_class_and_a_new_head(tested_search: Any) -> None:
    _, result = tested_search
    runner_up, *answers = result.record["test"]["against"]
    common, head = sorted(answers, key=lambda one: one["words"].startswith("a new head"))
    assert head["words"] == "a new head on the frozen model"
    assert runner_up["trial"] == result.verdict.runner_up.number
    assert common["words"].startswith("always ")
    assert common["better"]["value"] == pytest.approx(
        result.record["test"]["figure"]["value"] - common["figure"]["value"]
    )
    said = [sentence(message) for message in report.final_test_messages(result.verdict.test)]
    assert said[0].startswith("on 40 test rows that chose nothing: accuracy ")
    assert "95 %" in said[0]
    assert all("40 rows" in line for line in said[1:])


def test_a_finished_search_that_is_asked_again_says_the_same_and_measures_no_row_again(
    tested_search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, result = tested_search

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    with monkeypatch.context() as patched:
        patched.setattr(conclusion, "final_test", never)
        patched.setattr(conclusion, "cut", never)
        assert search(options).record == result.record
    # Another verdict on these rows: they have chosen too, and it says so.
    extended = search(replace(options, seeds=2), add_trials=0)
    assert [note.kind for note in extended.verdict.notes].count("test_used_before") == 1


def test_without_such_rows_the_verdict_says_that_its_figure_chose_the_winner(classify: Make) -> None:
    options = classify(SPACE, min_share=1.0, train={"max_steps": 48})
    result = search(options)
    assert result.verdict.learned
    assert result.record["test"] is None
    (note,) = (sentence(note) for note in result.verdict.notes if note.kind == "no_test")
    assert note.startswith("its figures are of the 40 rows that chose it, so they are too good")


def test_with_one_seed_the_claim_is_about_these_adapters_alone(classify: Make) -> None:
    result = search(classify(SPACE, min_share=1.0, train={"max_steps": 48, "test_split": 40}))
    assert {one["better"]["seeds"] for one in result.record["test"]["against"]} == {1}
