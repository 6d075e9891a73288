"""Promises of the new head: it is a linear map of the frozen model's states, and as good as such a map can be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from loraloom.config.train import TrainConfig
from loraloom.training.setup import load
from loraloom.tuning.bar import set_bar
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.head_baseline import HEAD, fit_head, measure_head

Make = Callable[..., TuneConfig]
SPACE = {"lora.r": [1, 2, 4, 8]}


def cross_entropy(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(out, labels, reduction="none")


def test_it_finds_a_linear_map_where_there_is_one_and_none_in_noise() -> None:
    torch.manual_seed(0)
    x, fold = 5 + 3 * torch.randn(400, 20), torch.arange(400) % 5 == 0
    true = torch.randn(20, 3)
    y = ((x - 5) @ true).argmax(-1)
    head = fit_head(x[:300], y[:300], fold[:300], 3, cross_entropy)
    assert float((head(x[300:]).argmax(-1) == y[300:]).float().mean()) > 0.85
    random = torch.randint(2, (400,))
    head = fit_head(x[:300], random[:300], fold[:300], 2, cross_entropy)
    assert float(cross_entropy(head(x[300:]), random[300:]).mean()) < 0.75  # ln 2 is 0.693


def test_its_figures_are_those_of_a_head_on_mean_states(classify: Make) -> None:
    setup = load(classify(SPACE, train={"max_steps": 1000}).train)
    found = measure_head(setup, setup.evaluator())
    assert {len(values) for values in found.values()} == {21}

    def states(part: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [setup.base.bert(input_ids=torch.tensor([e.input_ids]))[0].mean(1) for e in part.examples]
        return torch.cat(rows), torch.tensor([e.labels for e in part.examples])

    with torch.no_grad():
        (x, y), (held, right) = states(setup.data.train), states(setup.data.validation)
    head = fit_head(x, y, torch.arange(len(x)) % 5 == 0, 2, cross_entropy)
    assert found["loss"][0] == pytest.approx(float(cross_entropy(head(held), right).mean()), rel=0.02)
    assert found["accuracy"][0] == pytest.approx(float((head(held).argmax(-1) == right).float().mean()), abs=0.051)
    bar = set_bar(setup)
    assert bar.head == found
    assert bar.baselines("accuracy")[0][0] == HEAD
    assert HEAD not in bar.answers


def test_it_sees_no_more_rows_than_a_trial(classify: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from loraloom.tuning import head_baseline

    seen: list[int] = []
    monkeypatch.setattr(head_baseline, "fit_head", lambda x, *rest: seen.append(len(x)) or fit_head(x, *rest))
    setup = load(classify(SPACE, train={"max_steps": 3}).train)
    measure_head(setup, setup.evaluator())
    assert seen == [24]


ROWS: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "tags": (
        "token-cls",
        [{"tokens": ["the", "good"], "tags": ["O", "A"]}, {"tokens": ["the", "bad"], "tags": ["O", "B"]}],
        "accuracy",
    ),
    "numbers": ("seq-cls", [{"text": "the good film", "label": 1.5}, {"text": "a bad", "label": 0.5}], "mse"),
    "several": ("seq-cls", [{"text": "the good", "label": ["a", "b"]}, {"text": "bad", "label": ["b"]}], "f1_micro"),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_task_with_classes_or_numbers_has_one(name: str, encoder_folder: Path, tmp_path: Path) -> None:
    task, rows, metric = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(rows[i % 2]) + "\n" for i in range(40)))
    options = TrainConfig(model=str(encoder_folder), data=str(path), task=task, output="o", max_steps=20, eval_split=10)
    setup = load(options)
    found = measure_head(setup, setup.evaluator())
    assert found.keys() == set_bar(setup).answers.popitem()[1].keys()
    assert found[metric][0] == pytest.approx(0.0 if metric == "mse" else 1.0, abs=0.02)


def test_a_task_without_classes_has_none(complete: Make) -> None:
    setup = load(complete(SPACE).train)
    assert measure_head(setup, setup.evaluator()) == {}
