"""Promises of the figures where no library says what is right; ``test_figures`` compares the others with theirs."""

from __future__ import annotations

import math

import pytest

from loraloom.train.measure import measures


def test_a_prediction_that_is_no_number_gives_none_and_no_error() -> None:
    for figure in (measures.mse, measures.mae, measures.pearson, measures.spearman, measures.r2):
        assert math.isnan(figure([math.nan, 1.0], [0.0, 1.0]))


def test_an_entity_is_its_type_and_its_first_and_last_word() -> None:
    tags = ["B-PER", "I-PER", "O", "I-LOC", "I-PER", "B-PER", "B-LOC", "I-LOC"]
    assert measures.entities(tags) == {
        ("PER", 0, 1), ("LOC", 3, 3), ("PER", 4, 4), ("PER", 5, 5), ("LOC", 6, 7),
    }  # fmt: skip


def test_rouge_reads_other_scripts_too() -> None:
    assert measures.rouge1(["猫坐在垫子上"], ["猫在垫子上"]) == pytest.approx(10 / 11)
    assert measures.rouge2(["猫坐"], ["猫坐"]) == 1
    assert measures.rouge1(["кот сидит"], ["кот спит"]) == 0.5
    assert measures.rouge1(["über"], ["ber"]) == 0


def test_texts_are_the_same_but_for_spaces_around_them() -> None:
    assert measures.text_exact([" yes", "no\n", "Yes"], ["yes", "no", "yes"]) == pytest.approx(2 / 3)


def test_nothing_to_measure_is_no_error() -> None:
    assert math.isnan(measures.mse([], []))
    assert measures.accuracy([], []) == 0
    assert measures.entity_f1([], []) == 0
    assert measures.entities(["DET", "NOUN", "", "X-PER"]) == set()
