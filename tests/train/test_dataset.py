"""Promises of a run's rows: held out at random and never trained on, checked before any tokenizer is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraloom.errors import DataError
from loraloom.train.dataset import read_data, read_run_rows
from loraloom.train.load import load_tokenizer
from loraloom.train.options import TrainOptions


def options(model: Path, data: Path, task: str = "causal-lm", **changes: object) -> TrainOptions:
    return TrainOptions(**{"model": model, "data": data, "task": task, "output": "unused", **changes})


def test_rows_held_out_are_never_trained_on_and_follow_from_the_seed(decoder_folder: Path, chats: Path) -> None:
    given = options(decoder_folder, chats, eval_split=0.3, seed=5)
    rows = read_run_rows(given)
    lines = [[row.line for row in part] for part in (rows.train, rows.evaluation)]
    assert sorted(lines[0] + lines[1]) == list(range(1, 101))
    assert len(lines[1]) == 30
    data = read_data(given, load_tokenizer(str(decoder_folder)))
    assert (len(data.train.examples), len(data.evaluation.examples)) == (70, 30)
    assert [row.line for row in data.evaluation_rows] == lines[1]
    other = read_run_rows(options(decoder_folder, chats, eval_split=0.3, seed=6))
    assert [row.line for row in other.evaluation] != lines[1]


def test_every_label_stays_in_training_however_many_rows_are_held_out(encoder_folder: Path, reviews: Path) -> None:
    rows = read_run_rows(options(encoder_folder, reviews, "seq-cls", eval_split=198))
    assert {row.fields["label"] for row in rows.train} == set(rows.names) == {"blame", "praise"}


def test_the_model_is_not_asked_before_the_rows_are_right(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\ngood,a\nbad,a\n")
    with pytest.raises(DataError, match="two classes or more"):
        read_run_rows(options(tmp_path / "no-model", tmp_path / "a.csv", "seq-cls"))
