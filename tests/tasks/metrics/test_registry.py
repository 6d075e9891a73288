"""Promises of the metrics' names: what a task has, what is better, and a user's own function."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loraloom import tasks
from loraloom.errors import ConfigError
from loraloom.tasks.base import Task
from loraloom.tasks.metrics.kinds import TAGS, Scores
from loraloom.tasks.metrics.registry import OwnMetric, choose, greater_is_better, known_metrics, own_metric

CLASSES, LM, TOKENS = tasks.get("seq-cls"), tasks.get("causal-lm"), tasks.get("token-cls")
SEQ2SEQ, QA = tasks.get("seq2seq-lm"), tasks.get("question-answering")
TASKS = [
    (CLASSES, None), (CLASSES, "regression"), (CLASSES, "multi_label_classification"), (LM, None),
    (TOKENS, None), (SEQ2SEQ, None), (QA, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "problem", "names"),
    [
        (CLASSES, None, ["accuracy", "f1_macro"]),
        (CLASSES, "multi_label_classification", ["f1_micro", "f1_macro", "subset_accuracy"]),
        (CLASSES, "regression", ["mse", "mae", "pearson", "spearman", "r2"]),
        (LM, None, ["perplexity"]),
        (SEQ2SEQ, None, ["perplexity"]),
        (TOKENS, None, ["f1", "precision", "recall", "accuracy"]),
        (QA, None, ["f1", "exact_match"]),
    ],
)
def test_a_task_is_measured_by_its_own_metrics_and_generates_nothing_unasked(
    task: Task, problem: str | None, names: list[str]
) -> None:
    chosen = choose(task, problem)
    assert list(chosen.names) == names
    assert not chosen.needs_generation
    assert chosen.first == task.kind(problem).unasked[0] == names[0]


@pytest.mark.parametrize(("task", "problem"), TASKS)
def test_every_known_metric_can_be_asked_for(task: Task, problem: str | None) -> None:
    known = known_metrics(task.kinds(problem))
    if task is TOKENS:  # half of them are of entities, the others of words
        known = [name for name in known if name in ("loss", *TAGS.measures)]
    chosen = choose(task, problem, known)
    kinds: dict[str, list[Any]] = {"numbers": [1.0, 2.0], "several classes": [["a"], ["b"]], "tags": [["B-A", "O"]]}
    said = kinds.get(chosen.kind.name, ["x y", "y z"])
    right = [[one] for one in said] if chosen.kind.name == "answers" else said
    found = chosen.measure(Scores(6.0, 4), said, right)
    assert list(found) == known
    assert found["loss"] == 1.5
    for name in chosen.kind.measures:
        assert found[name] == pytest.approx(1 if greater_is_better(name) else 0), name


def test_a_perfect_figure_is_the_better_one_for_every_metric() -> None:
    less = {"loss", "eval_loss", "perplexity", "mse", "mae", "rmse", "word_error", "wer", "my.loss"}
    more = {"accuracy", "f1", "f1_macro", "rougeL", "exact_match", "r2", "pearson", "bleu", "lossless"}
    assert not any(map(greater_is_better, less))
    assert all(map(greater_is_better, more))


def test_texts_are_generated_for_metrics_of_texts_alone() -> None:
    assert choose(LM, None, ["rougeL"]).needs_generation
    assert choose(LM, None, ["loss", "perplexity"]).needs_generation is False
    assert choose(LM, None, []).first == "loss"
    assert not choose(CLASSES, None, ["accuracy"]).needs_generation


def test_a_name_that_the_task_lacks_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="metrics: 'acuracy' is none of seq-cls, which has loss, accuracy, f1_macro"):
        choose(CLASSES, None, ["acuracy"])
    with pytest.raises(ConfigError, match=r"did you mean 'rougeL'\?"):
        choose(LM, None, ["rougeLsum"])
    with pytest.raises(ConfigError, match=r"'accuracy' is none of seq-cls \(regression\)"):
        choose(CLASSES, "regression", ["accuracy"])


POS, NER = ["DET", "NOUN", "VERB"], ["B-PER", "I-PER", "O"]


def test_tags_that_mark_no_entities_are_measured_by_word_and_watched_by_accuracy() -> None:
    chosen = choose(TOKENS).of_labels(POS)
    assert chosen.names == ("accuracy", "f1_macro", "f1_micro")
    assert chosen.first == "accuracy"
    wrong = chosen.measure(Scores(1.0, 1), [["NOUN", "DET"]], [["DET", "NOUN"]])
    assert wrong == {"loss": 1.0, "accuracy": 0.0, "f1_macro": 0.0, "f1_micro": 0.0}
    assert choose(TOKENS).of_labels(NER).names == ("f1", "precision", "recall", "accuracy")


@pytest.mark.parametrize(
    ("labels", "asked", "words"),
    [
        (POS, ["f1"], r"'f1' is not measured of these tags \(DET, NOUN, VERB, ...\), which mark no entities"),
        (POS, ["accuracy", "recall"], "there are loss, accuracy, f1_macro, f1_micro"),
        (NER, ["f1_micro"], "which mark entities; there are loss, f1, precision, recall, accuracy"),
    ],
)
def test_a_metric_that_tags_do_not_have_is_an_error(labels: list[str], asked: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose(TOKENS, None, asked).of_labels(labels)


def test_a_users_function_sees_the_tags_as_they_are() -> None:
    def saw(predictions: Any, references: Any) -> float:
        return float(predictions == [["PER_U", math.nan]])

    chosen = dataclasses.replace(choose(TOKENS), own=(OwnMetric("m:saw", saw),)).of_labels(["O", "PER_U"])
    found = chosen.measure(Scores(1.0, 1), [["PER_U", math.nan]], [["PER_U", "O"]])
    assert found == {"loss": 1.0, "f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 0.5, "saw": 1.0}


def test_a_loss_beyond_all_numbers_has_an_infinite_perplexity_and_none_has_none() -> None:
    assert Scores(800.0, 1).perplexity == math.inf
    assert math.isnan(Scores().perplexity)
    assert Scores(2.0, 2).perplexity == pytest.approx(math.e)


# A user's own -----------------------------------------------------------------------------------------------

MODULE = """
import torch
from numbers import Number

class Scorer:
    def __call__(self, predictions, references):
        return 1.0

def share(predictions, references):
    return sum(a == b for a, b in zip(predictions, references)) / len(references)

def several(predictions, references):
    return {"length": len(predictions), "tensor": torch.tensor(2.5)}

def taken(predictions, references):
    return {"loss": 1}

def words(predictions, references):
    return "good"

def nothing(predictions, references):
    pass

def in_dict(predictions, references):
    return {"ok": 1, "bad": [1, 2]}

def fails(predictions, references):
    return 1 / 0

scorer = Scorer()
number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, which is not on the path."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import not_there_at_all\n")
    (tmp_path / f"{name}_wrong.py").write_text("x = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    return name


def test_a_users_function_gives_a_number_or_several(own: str) -> None:
    chosen = choose(CLASSES, None, ["accuracy", f"{own}:share", f"{own}:several", f"{own}:scorer"])
    found = chosen.measure(Scores(1.0, 1), ["a", "b"], ["a", "c"])
    assert found == {"loss": 1.0, "accuracy": 0.5, "share": 0.5, "length": 2.0, "tensor": 2.5, "scorer": 1.0}
    assert choose(LM, None, [f"{own}:share"]).first == "share"
    assert choose(LM, None, [f"{own}:share"]).needs_generation


def test_the_path_is_as_it_was_afterwards(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    before = list(sys.path)
    own_metric(f"{own}:share")
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{own}:shaer", "has no 'shaer'; did you mean 'share'?"),
        ("{own}:number", "is not a function, found int"),
        ("{own}x:share", "there is no module"),
        ("{own}_broken:share", "importing .* failed: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("{own}_wrong:share", "failed: ZeroDivisionError: division by zero"),
        ("{own}:", "must have the form package.module:function"),
        ("my file.py:share", "must have the form package.module:function"),
    ],
)
def test_a_function_that_cannot_be_had_is_said_before_training(own: str, spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        choose(CLASSES, None, [spec.format(own=own)])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("taken", " returns 'loss', which is measured already; rename it"),
        ("words", r" must return a number or a dict of numbers by name, found str \('good'\)"),
        ("nothing", r" must return a number or a dict of numbers by name, found NoneType"),
        ("in_dict", r" must .*, found list \('bad': \[1, 2\]\)"),
        ("fails", r" failed with ZeroDivisionError: division by zero \(own_.*\.py, line \d+\)"),
    ],
)
def test_a_function_that_gives_something_else_is_named(own: str, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"metrics: {own}:{name}{words}"):
        choose(CLASSES, None, [f"{own}:{name}"]).measure(Scores(1.0, 1), ["a"], ["a"])


def test_numbers_of_other_libraries_are_numbers() -> None:
    import numpy as np

    from loraloom.tasks.metrics.registry import OwnMetric

    for value in (np.float32(0.5), np.array([0.5]), torch.tensor(0.5)):
        assert OwnMetric("m:f", lambda a, b, value=value: value)([], []) == {"f": 0.5}
