"""Promises of the bar: what says nothing of the rows, in every task, and what is no better is not recommended."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.inference.jackknife import PARTS, divide, error
from loraloom.report.sentences import sentence
from loraloom.training.setup import Setup, load
from loraloom.tuning.bar import Bar, gain, learned, needed, set_bar
from loraloom.tuning.diagnostics.nothing_learned import nothing
from loraloom.tuning.trial import Trial

OPTIONS = TrainConfig(model="m", data="d", task="seq-cls", output="o", learning_rate=1e-5)


def hits(count: int, rows: int = 60) -> list[float]:
    """Accuracy of the first ``count`` rows right: over all, and over all but each part."""
    parts = divide(list(range(rows)))
    right = [float(row < count) for row in range(rows)]
    kept = [[right[row] for row in range(rows) if row not in part] for part in ([], *parts)]
    return [sum(one) / len(one) for one in kept]


def trial(accuracy: list[float], loss: list[float], losses: list[float] | None = None, **more: Any) -> Trial:
    curve = Curve(losses or [1.1] * 40, [], [{"step": 40, "loss": loss[0], "accuracy": accuracy[0]}])
    return Trial(0, {}, OPTIONS, 40, 40, "finished", curve=curve, parts={"accuracy": accuracy, "loss": loss}, **more)


def flat(value: float) -> list[float]:
    return [value] * (PARTS + 1)


BAR = Bar(60, 1.1, False, {"always 'a'": {"accuracy": hits(20), "loss": flat(1.1)}})


@pytest.mark.parametrize(
    ("right", "loss", "passes"),
    [
        (60, 0.1, True),
        (45, 2.0, True),  # surely more often right, though too sure where it is wrong
        (26, 1.2, False),  # a tenth above, of sixty rows: the best of eight comes to that by luck
        (20, 0.5, False),  # the loss alone, where the metric sees nothing of it
        (12, 1.1, False),
    ],
)
def test_only_what_is_above_by_more_than_its_error_and_luck_has_learned(right: int, loss: float, passes: bool) -> None:
    assert learned(BAR, [trial(hits(right), flat(loss))], "accuracy", 8) == passes


def test_a_held_out_loss_beats_the_bar_if_it_is_lower_by_more_than_the_noise_and_a_fiftieth() -> None:
    rough = [1.0, *(1.0 + 0.01 * (part % 3 - 1) for part in range(PARTS))]
    assert BAR.is_beaten(flat(1.0), 60)
    assert not BAR.is_beaten(flat(1.09), 60)
    assert not BAR.is_beaten(rough, 60)
    assert not BAR.is_beaten(flat(math.nan), 60)
    assert not BAR.is_beaten([1.0], 1)  # of one row nothing is sure
    assert not Bar(60).is_beaten(flat(1.0), 60)
    same = Bar(60, None, True, {"the frozen model": {"loss": [value + 0.1 for value in rough]}})
    assert same.is_beaten(rough, 60)  # row by row, on all of them
    assert not same.is_beaten(rough, 30)


def test_a_difference_of_few_rows_is_no_proof_whatever_its_size() -> None:
    few = Bar(3, 0.7, False, {"always 'a'": {"accuracy": hits(1, 3), "loss": [0.7] * 4}})
    assert not learned(few, [trial(hits(3, 3), [0.01] * 4)], "accuracy", 8)
    one = Bar(1, 0.7, False, {"always 'a'": {"accuracy": [0.0], "loss": [0.7]}})
    assert not learned(one, [trial([1.0], [0.01])], "accuracy", 8)


def test_what_is_needed_is_students_t_with_bonferronis_correction() -> None:
    assert needed(20, 1) == pytest.approx(1.7291, abs=1e-3)  # t(0.95, 19)
    assert needed(20, 5) == pytest.approx(2.5395, abs=1e-3)  # t(0.99, 19)
    assert needed(6, 5) == pytest.approx(3.365, abs=2e-2)  # t(0.99, 5)
    assert needed(1, 8) == math.inf


def test_the_error_of_a_share_is_that_of_the_textbook() -> None:
    assert error(hits(20)) == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 60), rel=0.35)
    assert error([0.5]) == math.inf


def test_advice_says_what_to_change_for_each_reason() -> None:
    def kinds(one: Trial, bar: Bar = BAR) -> list[str]:
        return [advice.kind for advice in nothing([one] * 8, one, bar, "accuracy")]

    still = trial(hits(20), flat(1.1))
    assert kinds(still) == ["stuck"]
    assert "Raise the learning rates (tried: 1e-5)" in sentence(nothing([still], still, BAR, "accuracy")[0])
    by_heart = trial(hits(20), flat(2.0), [1.1] * 20 + [0.1] * 20)
    assert kinds(by_heart) == ["apart"]
    assert kinds(trial(hits(26), flat(1.2))) == ["rows", "stuck"]
    assert kinds(trial(hits(20), flat(0.5))) == ["metric", "stuck"]
    failed = trial(hits(20), flat(1.1))
    failed.state = "failed"
    assert kinds(failed)[0] == "failures"


# -- every task -------------------------------------------------------------------------------------------------------


def loaded_rows(rows: list[dict[str, Any]], task: str, model: Path, folder: Path, **more: Any) -> Setup:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = TrainConfig(model=str(model), data=str(path), task=task, output=str(folder / "o"), eval_split=20, **more)
    return load(options)


def bar_of(setup: Setup) -> Bar:
    setup.model.add_adapter("span", LoraConfig(r=1, target_modules="all-linear", task_type=setup.task.task_type))
    return set_bar(setup)


def entropy(*shares: float) -> float:
    return -sum(share * math.log(share) for share in shares)


def test_of_classes_it_is_the_commonest(encoder_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "the film", "label": "a" if i % 4 else "b"} for i in range(200)]
    bar = bar_of(loaded_rows(rows, "seq-cls", encoder_folder, tmp_path))
    words, values = bar.best("accuracy") or ("", [])
    assert (words, values[0]) == ("always 'a'", 0.8)  # of the 20 that are held out
    assert bar.base == pytest.approx(entropy(0.25, 0.75), abs=0.01)
    assert bar.starting_loss([9.0] * 9) == bar.base  # a new head's first losses say nothing
    assert "the frozen model" not in bar.answers


def test_of_numbers_it_is_the_mean_or_the_median(encoder_folder: Path, tmp_path: Path) -> None:
    source = random.Random(0)
    rows = [{"text": "the film", "label": source.choice([0.5, 0.5, 0.5, 7.5])} for _ in range(200)]
    bar = bar_of(loaded_rows(rows, "seq-cls", encoder_folder, tmp_path))
    for metric, what in (("mse", "mean"), ("mae", "median")):
        assert what in (bar.best(metric) or ("", []))[0]
    assert bar.base == pytest.approx(49 * 3 / 16, rel=0.2)
    one = trial([0.0] * 21, [0.0] * 21)
    one.parts["pearson"] = flat(0.9)
    assert (gain(bar, [one], "pearson", 1) or BAR).bar == 0.0  # what is constant goes along with nothing


def test_of_several_classes_it_is_the_best_of_the_commonest_sets(encoder_folder: Path, tmp_path: Path) -> None:
    rows = [{"text": "the film", "label": ["a", "b"] if i % 2 else ["a"] if i % 4 else ["c"]} for i in range(200)]
    bar = bar_of(loaded_rows(rows, "seq-cls", encoder_folder, tmp_path))
    words, values = bar.best("f1_micro") or ("", [])
    assert words == "always 'a' and 'b'"
    assert 0.6 < values[0] < 0.9
    assert bar.base == pytest.approx((entropy(0.25, 0.75) * 2 + entropy(0.5, 0.5)) / 3, abs=0.02)


def test_of_tags_it_is_always_the_commonest_which_finds_no_entity(encoder_folder: Path, tmp_path: Path) -> None:
    row = {"tokens": ["the", "good", "film", "was", "a", "book"], "tags": ["O", "O", "O", "O", "O", "B-X"]}
    bar = bar_of(loaded_rows([row] * 60, "token-cls", encoder_folder, tmp_path))
    assert (bar.best("accuracy") or ("", []))[0] == "always 'O'"
    assert bar.answers["always 'O'"]["f1"][0] == 0.0
    assert (bar.best("f1") or ("", [0.0]))[1][0] > 0  # always B-X hits one in six
    assert bar.base == pytest.approx(entropy(1 / 6, 5 / 6), abs=0.01)


def test_of_texts_that_are_few_it_is_the_commonest_and_of_others_the_frozen_model(
    decoder_folder: Path, chats: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    bar = bar_of(loaded_rows(rows, "causal-lm", decoder_folder, tmp_path))
    assert list(bar.answers)[1:] == ["the frozen model"]
    assert (bar.best("perplexity") or ("", []))[0].startswith("always ")
    assert bar.starting_loss([0.1] * 9) == pytest.approx(0.1)  # below that it begins
    source = random.Random(0)
    words = [row["prompt"].split() for row in rows]
    different = [{"text": " ".join(source.sample(one, len(one)))} for one in words]
    bar = bar_of(loaded_rows(different, "causal-lm", decoder_folder, tmp_path))
    assert (list(bar.answers), bar.base) == (["the frozen model"], None)
    assert bar.starting_loss([3.0, 2.0]) is None
    assert bar.starting_loss([4.0, 3.0, 2.0, 1.0, 0.0]) == 2.5


def test_of_answers_it_is_none_as_often_as_there_is_none(encoder_folder: Path, tmp_path: Path) -> None:
    row = {"question": "was it", "context": "the good film", "answers": {"text": ["good"], "answer_start": [4]}}
    none = row | {"answers": {"text": [], "answer_start": []}}
    bar = bar_of(loaded_rows([row, none] * 40, "question-answering", encoder_folder, tmp_path))
    assert set(bar.answers) == {"always no answer", "the frozen model"}
    assert bar.answers["always no answer"]["exact_match"][0] == 0.5
    assert bar.base is not None
    assert entropy(0.5, 0.5) < bar.base < entropy(0.5, 0.5) + 0.5 * math.log(9)
