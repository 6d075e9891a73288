"""Promises of the predictions that are shown, by way of whole runs: every task from a file to words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.lora.routing import BASE
from loraloom.training.run import prepare
from loraloom.training.trainer import Trainer

GOOD, BAD = ("good", "fine", "lovely", "great"), ("bad", "poor", "awful", "weak")
FILLERS = ("the", "film", "was", "a", "book", "with", "cat", "in", "it")


def sentence(i: int, word: str) -> list[str]:
    return [FILLERS[i % 9], FILLERS[(i * 2 + 1) % 9], word, FILLERS[(i * 5 + 3) % 9]]


def word(i: int) -> str:
    return (GOOD + BAD)[i % 8]


#: name → task, model, its rows, what is measured by default
RUNS: dict[str, tuple[str, str, Callable[[int], dict[str, Any]], list[str]]] = {
    "pairs": (
        "seq-cls", "encoder_folder",
        lambda i: {"text1": " ".join(sentence(i, word(i))), "text2": "it was", "label": "ab"[i % 8 < 4]},
        ["accuracy", "f1_macro"],
    ),
    "several": (
        "seq-cls", "encoder_folder",
        lambda i: {"text": " ".join(sentence(i, word(i))), "label": [["praise"], ["blame", "film"], []][i % 3]},
        ["f1_micro", "f1_macro", "subset_accuracy"],
    ),
    "numbers": (
        "seq-cls", "encoder_folder",
        lambda i: {"text": " ".join(sentence(i, word(i))), "label": (i % 8) / 4},
        ["mse", "mae", "pearson", "spearman", "r2"],
    ),
    "tags": (
        "token-cls", "encoder_folder",
        lambda i: {"tokens": sentence(i, word(i)), "tags": ["O", "O", f"B-{'GOOD' if i % 8 < 4 else 'BAD'}", "O"]},
        ["f1", "precision", "recall", "accuracy"],
    ),
    "answers": (
        "question-answering", "encoder_folder",
        lambda i: {
            "question": "say now", "context": " ".join(sentence(i, word(i))),
            "answers": {"text": [word(i)], "answer_start": [" ".join(sentence(i, word(i))).index(word(i))]},
        },
        ["f1", "exact_match"],
    ),
    "translations": (
        "seq2seq-lm", "translator_folder",
        lambda i: {"source": " ".join(sentence(i, word(i))), "target": word(i)},
        ["perplexity"],
    ),
    "completions": (
        "causal-lm", "decoder_folder",
        lambda i: {"prompt": " ".join([*sentence(i, word(i)), "now say :"]), "completion": f" {word(i)}"},
        ["perplexity"],
    ),
    "matches": (
        "feature-extraction", "encoder_folder",
        lambda i: {"anchor": " ".join(sentence(i, word(i))), "positive": word(i)},
        ["recall_at_1"],
    ),
    "similarities": (
        "feature-extraction", "decoder_folder",
        lambda i: {"text1": " ".join(sentence(i, word(i))), "text2": word(i // 8), "score": float(i % 8 == i // 8 % 8)},
        ["spearman", "pearson"],
    ),
}  # fmt: skip


@pytest.fixture(params=RUNS)
def options(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., TrainConfig]:
    task, folder, row, _ = RUNS[request.param]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(96)))
    model = str(request.getfixturevalue(folder))

    def make(**changes: Any) -> TrainConfig:
        given: dict[str, Any] = {
            "model": model, "data": str(path), "task": task, "output": str(tmp_path / "out"), "max_steps": 60,
            "learning_rate": 3e-3, "eval_split": 0.2, "report_to": [],
            "lora": LoraConfig(target_modules="all-linear", r=8, lora_alpha=16),
        }  # fmt: skip
        return TrainConfig(**given | changes)

    make.name = request.param  # type: ignore[attr-defined]
    return make


def test_every_task_learns_and_is_measured_and_shows_three_rows_in_words(options: Any) -> None:
    job = prepare(options())
    result = Trainer(job).fit()
    evaluations = result.record["curve"]["evaluations"]
    names = RUNS[options.name][3]
    assert list(evaluations[-1]) == ["step", "loss", *names]
    assert result.record["result"].keys() == {"loss", *names}
    (before,) = job.evaluator().metrics([BASE])
    assert evaluations[-1]["loss"] < before["loss"]
    if options.name in ("pairs", "tags", "answers"):
        assert evaluations[-1][names[0]] > max(0.6, before[names[0]])
    assert len(result.predictions) == 3
    for said in result.predictions:
        assert set(said) == {"input", "expected", "predicted"}
        assert all(isinstance(text, str) and text for text in (said["input"], said["expected"]))
    for base, said in zip(job.shown(3, BASE), result.predictions, strict=True):
        assert (base["input"], base["expected"]) == (said["input"], said["expected"])
    again = json.loads(json.dumps(result.record))
    assert again["metric"] == names[0]


@pytest.mark.parametrize("options", ["translations", "completions"], indirect=True)
def test_texts_are_measured_where_asked_for(options: Any) -> None:
    result = Trainer(prepare(options(metrics=["rougeL", "exact_match"], max_steps=4, max_new_tokens=4))).fit()
    assert result.record["result"].keys() == {"loss", "rougeL", "exact_match"}
    assert result.record["metric"] == "rougeL"
