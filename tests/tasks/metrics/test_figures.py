"""Every metric beside the library that people compare with: from the names of labels to the figure, as a run has it.

On random and on degenerate inputs, and at chance: over all permutations of what is right, the mean of each of these
metrics is its value over all pairs of a prediction and a right answer, which their libraries say.
"""

from __future__ import annotations

import math
import random
import re
import statistics
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom import tasks
from loraloom.tasks.metrics import kinds
from loraloom.tasks.metrics.kinds import Kind, Scores
from loraloom.tasks.metrics.registry import choose

CALM = settings(max_examples=40, deadline=None)
Rows = Sequence[Any]

EVERY = {kind.name: kind for kind in vars(kinds).values() if isinstance(kind, Kind)}
#: Embeddings are measured by functions of classes and of numbers.
SHARED = {"matches": "classes", "similarities": "numbers"}
KINDS = {name: kind for name, kind in EVERY.items() if name not in SHARED}
TASKS: dict[str, tuple[str, str | None, list[str]]] = {
    "classes": ("seq-cls", None, ["a", "b", "c"]),
    "several classes": ("seq-cls", "multi_label_classification", ["a", "b", "c"]),
    "numbers": ("seq-cls", "regression", []),
    "tags": ("token-cls", None, ["O", "B-P", "I-P", "B-L", "I-L", "E-P", "S-P"]),
    "words": ("token-cls", None, ["DET", "NOUN", "O"]),
    "answers": ("question-answering", None, []),
    "texts": ("causal-lm", None, []),
}


def measured(kind: str, said: Rows, right: Rows, labels: Sequence[str] | None = None) -> dict[str, float]:
    """What a run measures of these predictions, the loss left out."""
    task, problem, usual = TASKS[kind]
    chosen = choose(tasks.get(task), problem, list(KINDS[kind].measures)).of_labels(usual if labels is None else labels)
    assert chosen.kind.name == kind
    found = chosen.measure(Scores(), said, right)
    del found["loss"]
    return found


# The libraries ------------------------------------------------------------------------------------------------


def classes(said: Rows, right: Rows) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score

    macro, micro = (f1_score(right, said, average=name, zero_division=0) for name in ("macro", "micro"))
    return {"accuracy": accuracy_score(right, said), "f1_macro": macro, "f1_micro": micro}


def several(said: Rows, right: Rows) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    occur = sorted(set().union(*said, *right))
    if not occur:  # sklearn knows no classes then; all rows agree that none applies
        return {"f1_micro": 0.0, "f1_macro": 0.0, "subset_accuracy": 1.0}
    # Of one class alone, it would score its absence as a class, too.
    binary = MultiLabelBinarizer(classes=[*occur, "never"]).fit([occur])
    a, b, columns = binary.transform(said), binary.transform(right), range(len(occur))
    macro, micro = (f1_score(b, a, labels=columns, average=name, zero_division=0) for name in ("macro", "micro"))
    return {"f1_micro": micro, "f1_macro": macro, "subset_accuracy": accuracy_score(b, a)}


def numbers(said: Rows, right: Rows) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    constant = len(set(right)) == 1  # sklearn calls that 1 or 0; no variance is no share of it
    return {
        "mse": mean_squared_error(right, said),
        "mae": mean_absolute_error(right, said),
        "pearson": pearsonr(said, right).statistic,
        "spearman": spearmanr(said, right).statistic,
        "r2": math.nan if constant else r2_score(right, said),
    }


def tags(said: Rows, right: Rows) -> dict[str, float]:
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    found = {"f1": f1_score, "precision": precision_score, "recall": recall_score, "accuracy": accuracy_score}
    return {name: function(right, said) for name, function in found.items()}


def words(said: Rows, right: Rows) -> dict[str, float]:
    return classes([tag for row in said for tag in row], [tag for row in right for tag in row])


def answers(said: Rows, right: Rows) -> dict[str, float]:
    """As in the official evaluation script of SQuAD 2.0."""

    def normal(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text).split()

    def f1(gold: str, one: str) -> float:
        a, b = normal(gold), normal(one)
        same = sum((Counter(a) & Counter(b)).values())
        if len(a) == 0 or len(b) == 0:
            return float(a == b)
        return 0.0 if same == 0 else 2 * (same / len(b)) * (same / len(a)) / (same / len(b) + same / len(a))

    def exact(gold: str, one: str) -> float:
        return float(normal(gold) == normal(one))

    rows = [(one, [gold for gold in golds if normal(gold)] or [""]) for one, golds in zip(said, right, strict=True)]
    scores = {"f1": f1, "exact_match": exact}
    return {
        name: statistics.fmean(max(score(gold, one) for gold in golds) for one, golds in rows)
        for name, score in scores.items()
    }


def texts(said: Rows, right: Rows) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    each = [scorer.score(b, a) for a, b in zip(said, right, strict=True)]
    found = {name: statistics.fmean(one[name].fmeasure for one in each) for name in ("rouge1", "rouge2", "rougeL")}
    exact = statistics.fmean(a.strip() == b.strip() for a, b in zip(said, right, strict=True))
    return {"exact_match": exact, **found}


LIBRARIES: dict[str, Callable[[Rows, Rows], dict[str, float]]] = {
    "classes": classes,
    "several classes": several,
    "numbers": numbers,
    "tags": tags,
    "words": words,
    "answers": answers,
    "texts": texts,
}


def theirs(kind: str, said: Rows, right: Rows) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of divisions by zero and constant inputs, which are what is tried
        return LIBRARIES[kind](said, right)


def test_every_metric_has_a_library_beside_it() -> None:
    for name, other in SHARED.items():
        assert set(EVERY[name].measures.values()) <= set(KINDS[other].measures.values())
    assert LIBRARIES.keys() == TASKS.keys() == KINDS.keys()
    for kind, (task, problem, labels) in TASKS.items():
        assert tasks.get(task).kind(problem).name == ("tags" if kind == "words" else kind)
        rows = [labels[:1]] if kind in ("tags", "words", "several classes") else [1.0, 2.0] if kind == "numbers" else []
        rows = rows or [["x"] if kind == "answers" else "x"]
        said = ["x"] if kind == "answers" else rows
        assert theirs(kind, said, rows).keys() == KINDS[kind].measures.keys()


# Random and degenerate ----------------------------------------------------------------------------------------

ANSWER = st.lists(st.sampled_from(["the", "The", "cat", "cat,", "a", "sat", "--", "U.S."]), max_size=4).map(" ".join)
NUMBER = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6))


def values(kind: str) -> st.SearchStrategy[tuple[Any, Any]]:
    """A row's prediction and right answer. Rows of tags are of one length."""
    labels = TASKS[kind][2]
    one: dict[str, Callable[[], st.SearchStrategy[Any]]] = {
        "classes": lambda: st.sampled_from(labels),
        "several classes": lambda: st.lists(st.sampled_from(labels), unique=True),
        "numbers": lambda: NUMBER,
        "tags": lambda: st.lists(st.sampled_from(labels), min_size=5, max_size=5),
        "words": lambda: st.lists(st.sampled_from(labels), min_size=5, max_size=5),
        "answers": lambda: ANSWER,
        "texts": lambda: st.text(alphabet="abAB1 .,-_'\n", max_size=20),
    }
    made = one[kind]()
    return st.tuples(made, st.lists(ANSWER, max_size=3) if kind == "answers" else made)


@pytest.mark.parametrize("kind", TASKS)
def test_a_metric_is_its_librarys_on_random_predictions(kind: str) -> None:
    @CALM
    @given(st.lists(values(kind), min_size=2, max_size=12))
    def check(pairs: list[tuple[Any, Any]]) -> None:
        said, right = ([pair[i] for pair in pairs] for i in (0, 1))
        assert measured(kind, said, right) == pytest.approx(theirs(kind, said, right), rel=1e-6, abs=1e-7, nan_ok=True)

    check()


O5, P5 = ["O"] * 5, ["B-P", "I-P", "I-P", "O", "B-L"]
DEGENERATE: dict[str, list[tuple[Rows, Rows]]] = {
    "classes": [
        (["a", "a"], ["a", "a"]), (["a", "a"], ["b", "b"]), (["a", "a", "a"], ["a", "b", "c"]), (["b"], ["a"]),
        (["a", "b", "c"], ["a", "a", "a"]),
    ],
    "several classes": [
        ([[], []], [[], []]), ([[], []], [["a"], ["b", "c"]]), ([["a", "b", "c"]] * 2, [[], []]), ([["a"]], [["a"]]),
    ],
    "numbers": [
        ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0]), ([2.0, 2.0], [2.0, 2.0]),
        ([0.0, 0.0, 1.0], [5.0, 5.0, 5.5]), ([1e-200, 2e-200, 5e-200], [1.0, 2.0, 3.0]),
    ],
    "tags": [([O5], [O5]), ([O5], [P5]), ([P5], [O5]), ([P5], [P5]), ([["B-P"] * 5], [["I-P"] * 5])],
    "words": [([["O"] * 3], [["O"] * 3]), ([["O"] * 3], [["DET"] * 3]), ([["DET"] * 2], [["DET", "NOUN"]])],
    "answers": [
        (["", ""], [[], ["cat"]]), (["the"], [["a"]]), (["cat"], [[]]), (["--"], [["the", ""]]), ([""], [["", "cat"]]),
    ],
    "texts": [(["", ""], ["", "a b"]), (["a b"], [""]), ([" \n"], [""]), (["."], ["."]), (["a"], ["a"])],
}  # fmt: skip


@pytest.mark.parametrize("kind", TASKS)
def test_a_metric_is_its_librarys_where_there_is_little_to_measure(kind: str) -> None:
    for said, right in DEGENERATE[kind]:
        wanted = theirs(kind, said, right)
        assert measured(kind, said, right) == pytest.approx(wanted, abs=1e-9, nan_ok=True), (said, right)


@pytest.mark.parametrize("kind", TASKS)
def test_a_metric_of_shuffled_answers_is_at_chance(kind: str) -> None:
    source = random.Random(kind)
    labels = TASKS[kind][2]

    def one() -> Any:
        if kind in ("tags", "words"):
            return [source.choice(labels) for _ in range(4)]
        if kind == "several classes":
            return [label for label in labels if source.random() < 0.4]
        if kind == "numbers":
            return source.gauss(0, 1)
        return source.choice(labels or ["a b c", "b a", "c d", "the cat"])

    said = [one() for _ in range(25)]
    right = [[answer] if kind == "answers" else answer for answer in said]  # all right, before they are shuffled
    perfect = {name: 0.0 if name in ("mse", "mae") else 1.0 for name in KINDS[kind].measures}
    assert measured(kind, said, right) == pytest.approx(perfect)
    chance = theirs(kind, [a for a in said for _ in right], right * len(said))
    found = [measured(kind, said, source.sample(right, len(right))) for _ in range(60)]
    for name, wanted in chance.items():
        figures = [one[name] for one in found]
        error = statistics.stdev(figures) / math.sqrt(len(figures))
        assert statistics.fmean(figures) == pytest.approx(wanted, abs=5 * error + 1e-9), name


# Entities, however they are written ---------------------------------------------------------------------------

SPAN = st.tuples(st.sampled_from("AB"), st.integers(0, 3), st.integers(1, 3))


def spread(spans: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Entities (type, first, last) one after the other, from (type, gap, length)."""
    at, found = 0, []
    for kind, gap, length in spans:
        found.append((kind, at + gap, at + gap + length - 1))
        at += gap + length
    return found


def written(found: Sequence[tuple[str, int, int]], size: int, scheme: str, form: str) -> list[str]:
    """The tags of these entities; ``form`` is such as ``{letter}-{kind}``."""
    row = ["O"] * size
    for number, (kind, first, last) in enumerate(found):
        before = found[number - 1] if number else None
        touches = before is not None and before[0] == kind and before[2] + 1 == first
        for place in range(first, last + 1):
            letter = "B" if place == first else "I"
            if scheme == "IOB1" and place == first and not touches:
                letter = "I"
            if scheme in ("IOBES", "BILOU") and place == last:
                letter = ("S" if scheme == "IOBES" else "U") if first == last else "E" if scheme == "IOBES" else "L"
            row[place] = form.format(letter=letter, kind=kind)
    return row


@pytest.mark.parametrize("form", ["{letter}-{kind}", "{letter}_{kind}", "{kind}-{letter}", "{kind}_{letter}"])
@pytest.mark.parametrize("scheme", ["IOB1", "IOB2", "IOBES", "BILOU"])
def test_entities_count_the_same_however_they_are_written(scheme: str, form: str) -> None:
    letters = {"IOB1": "BI", "IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU"}[scheme]
    labels = ["O", *(form.format(letter=letter, kind=kind) for letter in letters for kind in "AB")]

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.tuples(st.lists(SPAN, max_size=3), st.lists(SPAN, max_size=3)), min_size=1, max_size=4))
    def check(rows: list[tuple[Any, Any]]) -> None:
        said, right = ([spread(row[i]) for row in rows] for i in (0, 1))
        a, b = ([written(row, 18, scheme, form) for row in side] for side in (said, right))
        hits = sum(len({*x} & {*y}) for x, y in zip(said, right, strict=True))
        counts = [sum(map(len, side)) for side in (said, right)]
        found = measured("tags", a, b, labels)
        assert found["precision"] == pytest.approx(hits / counts[0] if counts[0] else 0)
        assert found["recall"] == pytest.approx(hits / counts[1] if counts[1] else 0)
        assert found["f1"] == pytest.approx(2 * hits / sum(counts) if sum(counts) else 0)

    check()


# What says nothing ----------------------------------------------------------------------------------------------


def test_a_model_that_predicts_nothing_is_right_nowhere() -> None:
    none = math.nan
    assert not any(measured("classes", [none] * 2, ["a", "b"]).values())
    assert not any(measured("several classes", [[none]] * 2, [["a"], []]).values())
    assert not any(measured("tags", [[none] * 5], [P5]).values())
    assert not any(measured("tags", [[none] * 5], [O5]).values())
    assert not any(measured("words", [[none] * 2], [["DET", "O"]]).values())
    assert not any(measured("answers", [none] * 2, [[], ["cat"]]).values())
    assert all(map(math.isnan, measured("numbers", [none, 1.0], [0.0, 1.0]).values()))


def test_numbers_that_are_the_same_but_for_rounding_correlate_with_nothing() -> None:
    constant = [0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]
    for said, right in ((constant, [1.0, 2.0, 3.0, 4.0]), ([1.0, 2.0, 3.0, 4.0], constant), ([0.1] * 3, [0.7] * 3)):
        found = measured("numbers", said, right)
        assert math.isnan(found["pearson"])
    assert math.isnan(measured("numbers", [1.0, 2.0, 3.0, 4.0], constant)["r2"])


def test_numbers_beyond_all_squares_are_no_error() -> None:
    found = measured("numbers", [1e300, -1e300, 1e308], [1e308, 1e308, -1e308])
    assert found["mse"] == found["mae"] == math.inf
    assert found["pearson"] < 0
