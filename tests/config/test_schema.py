"""Promises of the JSON Schema: it accepts what the reader accepts, and marks a typo where the reader does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from loraloom.config import yamltext
from loraloom.config.keys import OPTIONS
from loraloom.config.runfile import read, write
from loraloom.config.schema import schema
from loraloom.config.train import TrainConfig
from loraloom.tuning.config import TuneConfig
from loraloom.tuning.space import PRESETS

BASE: dict[str, Any] = {"task": "seq-cls", "model": {"name": "m"}, "data": {"train": "d"}, "output": "o"}
ROOT = Path(__file__).parents[2]
SAVED = sorted(path for path in (ROOT / "tests" / "ondisk").rglob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(schema())


def errors(run: Any) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(run)]


def test_it_is_a_schema_of_draft_2020_12_that_names_every_key() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    properties = schema()["properties"]
    for key, option in OPTIONS.items():
        section, _, leaf = key.rpartition(".")
        found = properties[section]["properties"][leaf] if section else properties[leaf]
        assert found.get("description", "") == option.help, key


@pytest.mark.parametrize("path", SAVED, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_run_files_that_were_written_by_earlier_versions_are_accepted(path: Path) -> None:
    assert errors(yamltext.parse(path.read_text(), str(path))[0]) == []


def test_a_file_with_every_key_that_a_run_leaves_is_accepted(tmp_path: Path) -> None:
    options = TrainConfig(
        model="m", data=["a.csv", {"path": "b", "weight": 2}], task="causal-lm", output="o", eval_split=["c"],
        revision="r", attn_implementation="sdpa", device="cpu", format="text", columns={"text": "body"}, max_length=9,
        chat_template="c", date="2026-07-26", data_workers=2, max_steps=5, warmup_steps=1, optim="SGD",
        optim_args={"momentum": 0.9, "x": [1]}, eval_steps=2, metrics=["exact_match"], metric_for_best_model="loss",
        early_stopping_patience=2, save_minutes=0.5, report_to=[], overwrite=True,
    )  # fmt: skip
    write(options, tmp_path / "run.yaml")
    assert read(tmp_path / "run.yaml").options == options
    assert errors(yamltext.parse((tmp_path / "run.yaml").read_text(), "")[0]) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_search_and_every_preset_space_are_accepted(preset: str) -> None:
    tune = {"preset": preset, "trials": 4, "memory": "8GiB", "space": dict(PRESETS[preset].space)}
    assert errors({**BASE, "lora": None, "tune": tune}) == []


@pytest.mark.parametrize(
    "change",
    [
        {"sed": 1},
        {"train": {"batch_sise": 2}},
        {"train": {"batch_size": 0}},
        {"train": {"batch_size": "two"}},
        {"train": {"learning_rate": None}},
        {"lora": {"rank": 4}},
        {"lora": {"lora_dropout": 1}},
        {"lora": {"bias": "some"}},
        {"lora": {"use_dora": True}},
        {"task": "seq-clas"},
        {"data": {"train": [{"path": "a", "wieght": 2}]}},
        {"data": {"overlong": "cut"}},
        {"eval": {"strategy": "epochs"}},
        {"tune": {"trails": 4}},
        {"tune": {"space": {"lora.rr": [1, 2]}}},
        {"tune": {"space": {"train.seed": [1, 2]}}},
        {"tune": {"space": {"lora.r": {"rnge": [1, 2]}}}},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_reader_refuses_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    run = {**BASE, **change}
    assert errors(run) != []
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {yamltext.write(value)}\n" for key, value in run.items()))
    with pytest.raises(ValueError):
        TuneConfig.read(tmp_path / "run.yaml")
