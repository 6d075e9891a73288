"""Promises of a run's options: checked as a whole before anything is loaded, and each error names its option."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraloom import LoraConfig, TaskType
from loraloom.config.train import TrainConfig
from loraloom.errors import ConfigError


def options(**changes: object) -> TrainConfig:
    return TrainConfig(**{"model": "m", "data": "d.csv", "task": "seq-cls", "output": "o", **changes})


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="learning_rat: there is no such training option; did you mean 'learning_ra"):
        options(learning_rat=1)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model", "", "must be a path or a name"),
        ("data", None, "must be a path or a name, or a list of these, found None"),
        ("data", [], "must be a path or a name, or a list of these, found []"),
        ("data", [{"path": "a", "wieght": 2}], "did you mean 'weight'?"),
        ("data", [{"path": "a", "weight": 0}], "a weight must be a number above 0, found 0"),
        ("overlong", "cut", "must be one of error, truncate, drop, split, found 'cut'"),
        ("columns", ["text"], "must give names for names"),
        ("optim_args", {"lr": 1}, "adamw takes none"),
        ("decay_ratio", 2, "at most 1, found 2"),
        ("report_to", 3, "must be a list of names, found 3"),
        ("early_stopping_patience", 0, "must be a whole number of at least 1, found 0"),
        ("task", "causal_lm", "did you mean 'causal-lm'?"),
        ("dtype", "flaot16", "did you mean 'float16'?"),
        ("batch_size", True, "must be a whole number of at least 1, found True"),
        ("batch_size", 2.0, "must be a whole number of at least 1, found 2.0"),
        ("max_steps", 0, "must be a whole number of at least 1, found 0"),
        ("max_length", 0, "must be a whole number of at least 1, found 0"),
        ("seed", 2**63, "of at most 9223372036854775807"),
        ("epochs", 0, "must be a number above 0, found 0"),
        ("epochs", "3", "must be a number above 0, found '3'"),
        ("learning_rate", float("nan"), "must be a number above 0, found nan"),
        ("weight_decay", -0.1, "must be a number of at least 0, found -0.1"),
        ("warmup_ratio", 1.1, "must be a number of at least 0 and at most 1, found 1.1"),
        ("eval_split", 0, "must be a share below 1, a count of rows, or a file, found 0"),
        ("eval_split", True, "found True"),
        ("eval_split", "nan", "found nan"),
        ("eval_split", 1.5, "a count of rows must be whole, found 1.5"),
        ("overwrite", "no", "must be true or false, found 'no'"),
        ("lora", {"r": 8}, "must be a LoraConfig, found dict"),
    ],
)
def test_a_value_out_of_range_names_its_option_and_what_was_found(name: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        options(**{name: value})
    assert str(error.value).startswith(f"{name}: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(0.25, 0.25), ("0.25", 0.25), (20, 20), ("20", 20), ("20.0", 20), ("a.csv", "a.csv"), (Path("a.csv"), "a.csv")],
)
def test_rows_to_validate_on_are_a_share_a_count_or_a_file(given: object, kept: object) -> None:
    found = options(eval_split=given).eval_split
    assert (found, type(found)) == (kept, type(kept))


def test_the_task_gives_the_adapter_its_type_and_the_callers_config_stays_as_it_was() -> None:
    mine = LoraConfig(r=3)
    assert options(lora=mine).lora.task_type is TaskType.SEQ_CLS
    assert mine.task_type is None


def test_all_options_are_plain_json(tmp_path: Path) -> None:
    values = options(model=tmp_path, eval_split=tmp_path / "e.csv").to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["model"] == str(tmp_path)
    assert values["lora"] == LoraConfig(task_type="SEQ_CLS").to_dict()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_steps": 5, "eval_minutes": 1}, "eval_minutes: eval_steps is given as well"),
        ({"save_strategy": "epoch", "save_steps": 5}, "save_steps: does nothing with save_strategy=epoch"),
        ({"eval_strategy": "minutes"}, "eval_strategy: minutes needs eval_minutes"),
        ({"eval_strategy": "no", "early_stopping_patience": 2}, "early_stopping_patience: needs evaluations"),
        ({"save_strategy": "no", "load_best_model_at_end": True}, "load_best_model_at_end: needs checkpoints"),
        ({"max_steps": 5, "warmup_steps": 6}, "warmup_steps: must be at most max_steps (5), found 6"),
    ],
)
def test_options_that_contradict_or_do_nothing_are_errors(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        options(**changes)
    assert str(error.value).startswith(said)


def test_moments_follow_from_what_is_given() -> None:
    assert options().eval_at == options().save_at == "epoch"
    assert options(eval_steps=5).eval_at == "steps"
    assert options(save_minutes=0.5).save_at == "minutes"
    assert options(save_strategy="no").save_at == "no"


def test_sources_are_paths_or_lists_with_weights() -> None:
    assert options(data=Path("a.csv")).data == "a.csv"
    assert options(data=["a", {"path": "b", "weight": 2}]).data == ["a", {"path": "b", "weight": 2}]
    assert options(data={"path": "b"}).data == [{"path": "b", "weight": 1}]
    assert options(eval_split=["a", "b"]).eval_split == ["a", "b"]
