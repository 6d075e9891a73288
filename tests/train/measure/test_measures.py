"""Promises of the figures: they are those of the libraries that people compare with."""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.train.measure import measures

CALM = settings(max_examples=150, deadline=None)
CLASSES = st.sampled_from(["a", "b", "c"])
PAIRS = st.lists(st.tuples(CLASSES, CLASSES), min_size=1, max_size=30)
LABELS = st.sets(CLASSES)
NUMBERS = st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=20)


@CALM
@given(PAIRS)
def test_f1_and_accuracy_of_classes_are_sklearns(pairs: list[tuple[str, str]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    said, right = zip(*pairs, strict=True)
    one, two = [[x] for x in said], [[x] for x in right]
    assert measures.accuracy(said, right) == pytest.approx(accuracy_score(right, said))
    assert measures.f1_macro(one, two) == pytest.approx(f1_score(right, said, average="macro"))
    assert measures.f1_micro(one, two) == pytest.approx(f1_score(right, said, average="micro"))


@CALM
@given(st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=20))
def test_f1_of_several_classes_is_sklearns_over_the_classes_that_occur(pairs: list[tuple[set[str], set[str]]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    said, right = zip(*pairs, strict=True)
    occur = sorted(set().union(*said, *right))
    if not occur:
        assert measures.f1_macro(said, right) == measures.f1_micro(said, right) == 0
        return
    # Of one class alone, it would score its absence as a class, too.
    binary = MultiLabelBinarizer(classes=[*occur, "never"]).fit([occur])
    columns = range(len(occur))
    a, b = binary.transform(said), binary.transform(right)
    for name, found in (("macro", measures.f1_macro), ("micro", measures.f1_micro)):
        assert found(said, right) == pytest.approx(f1_score(b, a, labels=columns, average=name, zero_division=0))
    assert measures.accuracy(said, right) == pytest.approx(accuracy_score(b, a))


@CALM
@given(NUMBERS)
def test_regressions_figures_are_those_of_sklearn_and_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    said, right = (list(map(float, side)) for side in zip(*pairs, strict=True))
    assert measures.mse(said, right) == pytest.approx(mean_squared_error(right, said))
    assert measures.mae(said, right) == pytest.approx(mean_absolute_error(right, said))
    if len(set(right)) > 1:
        assert measures.r2(said, right) == pytest.approx(r2_score(right, said))
    else:
        assert math.isnan(measures.r2(said, right))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found, theirs in ((measures.pearson, pearsonr), (measures.spearman, spearmanr)):
            assert found(said, right) == pytest.approx(theirs(said, right).statistic, nan_ok=True, abs=1e-9)


def test_a_prediction_that_is_no_number_gives_none_and_no_error() -> None:
    for figure in (measures.mse, measures.mae, measures.pearson, measures.spearman, measures.r2):
        assert math.isnan(figure([math.nan, 1.0], [0.0, 1.0]))


TAGS = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-PER", "S-PER", "S-LOC", "E-LOC"])


@CALM
@given(st.lists(st.lists(st.tuples(TAGS, TAGS), min_size=1, max_size=12), min_size=1, max_size=5))
def test_entities_are_counted_as_seqeval_does(rows: list[list[tuple[str, str]]]) -> None:
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    said, right = ([[pair[i] for pair in row] for row in rows] for i in (0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert measures.entity_precision(said, right) == pytest.approx(precision_score(right, said))
        assert measures.entity_recall(said, right) == pytest.approx(recall_score(right, said))
        assert measures.entity_f1(said, right) == pytest.approx(f1_score(right, said))
        assert measures.word_accuracy(said, right) == pytest.approx(accuracy_score(right, said))


def test_an_entity_is_its_type_and_its_first_and_last_word() -> None:
    tags = ["B-PER", "I-PER", "O", "I-LOC", "I-PER", "B-PER", "B-LOC", "I-LOC"]
    assert measures.entities(tags) == {
        ("PER", 0, 1), ("LOC", 3, 3), ("PER", 4, 4), ("PER", 5, 5), ("LOC", 6, 7),
    }  # fmt: skip


# As in the official evaluation script of SQuAD 2.0.
def official(text: str) -> str:
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text).split())


def official_f1(gold: str, said: str) -> float:
    a, b = official(gold).split(), official(said).split()
    same = sum((Counter(a) & Counter(b)).values())
    if len(a) == 0 or len(b) == 0:
        return float(a == b)
    if same == 0:
        return 0
    precision, recall = same / len(b), same / len(a)
    return 2 * precision * recall / (precision + recall)


ANSWER = st.lists(st.sampled_from(["the", "The", "cat", "cat,", "a", "sat", "--", "U.S."]), max_size=4).map(" ".join)


@CALM
@given(st.lists(st.tuples(ANSWER, st.lists(ANSWER, max_size=3)), min_size=1, max_size=6))
def test_answers_are_scored_as_by_squads_official_script(rows: list[tuple[str, list[str]]]) -> None:
    exact, f1 = [], []
    for said, answers in rows:
        gold = [answer for answer in answers if official(answer)] or [""]
        exact.append(max(float(official(said) == official(answer)) for answer in gold))
        f1.append(max(official_f1(answer, said) for answer in gold))
    said, right = [one for one, _ in rows], [answers for _, answers in rows]
    assert measures.answer_exact(said, right) == pytest.approx(np.mean(exact))
    assert measures.answer_f1(said, right) == pytest.approx(np.mean(f1))


TEXT = st.text(alphabet="abAB1 .,-_'\n", max_size=30)


@CALM
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_rouge_is_that_of_rouge_score(pairs: list[tuple[str, str]]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    said, right = zip(*pairs, strict=True)
    theirs = [scorer.score(b, a) for a, b in pairs]
    for name, found in (("rouge1", measures.rouge1), ("rouge2", measures.rouge2), ("rougeL", measures.rouge_l)):
        assert found(said, right) == pytest.approx(np.mean([one[name].fmeasure for one in theirs])), name


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
