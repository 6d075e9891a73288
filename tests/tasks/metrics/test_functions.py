"""Promises of the figures where no library says what is right; ``test_figures`` compares the others with theirs."""

from __future__ import annotations

import math

import pytest

from loraloom.tasks.metrics import functions


def test_a_prediction_that_is_no_number_gives_none_and_no_error() -> None:
    for figure in (functions.mse, functions.mae, functions.pearson, functions.spearman, functions.r2):
        assert math.isnan(figure([math.nan, 1.0], [0.0, 1.0]))


def test_an_entity_is_its_type_and_its_first_and_last_word() -> None:
    tags = ["B-PER", "I-PER", "O", "I-LOC", "I-PER", "B-PER", "B-LOC", "I-LOC"]
    assert functions.entities(tags) == {
        ("PER", 0, 1), ("LOC", 3, 3), ("PER", 4, 4), ("PER", 5, 5), ("LOC", 6, 7),
    }  # fmt: skip


def test_rouge_reads_other_scripts_too() -> None:
    assert functions.rouge_n(["猫坐在垫子上"], ["猫在垫子上"], 1) == pytest.approx(10 / 11)
    assert functions.rouge_n(["猫坐"], ["猫坐"], 2) == 1
    assert functions.rouge_n(["кот сидит"], ["кот спит"], 1) == 0.5
    assert functions.rouge_n(["über"], ["ber"], 1) == 0


def test_texts_are_the_same_but_for_spaces_around_them() -> None:
    assert functions.text_exact([" yes", "no\n", "Yes"], ["yes", "no", "yes"]) == pytest.approx(2 / 3)


def test_nothing_to_measure_is_no_error() -> None:
    assert math.isnan(functions.mse([], []))
    assert functions.accuracy([], []) == 0
    assert functions.entity_f1([], []) == 0
    assert functions.entities(["DET", "NOUN", "", "X-PER"]) == set()
