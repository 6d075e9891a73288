from __future__ import annotations

import json
import math

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom import LoraConfig, TaskType
from loraloom.errors import ConfigError


def test_names_and_defaults_are_those_of_peft() -> None:
    assert LoraConfig().to_dict() == peft.LoraConfig().to_dict()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rr": 3}, "did you mean 'r'"),
        ({"target_module": ["q"]}, "did you mean 'target_modules'"),
        ({"r": 0}, "r: must be a whole number of at least 1, found 0"),
        ({"r": 2.5}, "r: must be a whole number of at least 1, found 2.5"),
        ({"r": True}, "r: must be a whole number"),
        ({"r": "8"}, "r: must be a whole number"),
        ({"lora_alpha": math.nan}, "lora_alpha: must be a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha: must be a finite number"),
        ({"lora_alpha": math.inf}, "lora_alpha: must be a finite number"),
        ({"lora_alpha": 0}, "lora_alpha: 0"),
        ({"lora_alpha": "16"}, "lora_alpha: must be a finite number"),
        ({"lora_dropout": 1.0}, "lora_dropout: must be a number of at least 0 and below 1"),
        ({"lora_dropout": -0.1}, "lora_dropout: must be a number of at least 0 and below 1"),
        ({"lora_dropout": math.nan}, "lora_dropout: must be a number of at least 0 and below 1"),
        ({"bias": "lora-only"}, "did you mean 'lora_only'"),
        ({"bias": True}, "bias: must be one of"),
        ({"task_type": "seq_cls"}, "did you mean 'SEQ_CLS'"),
        ({"task_type": 3}, "task_type: must be one of"),
        ({"modules_to_save": "classifier"}, "modules_to_save: must be a list"),
        ({"target_modules": 5}, "target_modules: must be a list"),
        ({"target_modules": ["q", 1]}, "target_modules: every entry"),
        ({"target_modules": ""}, "target_modules: an empty string"),
        ({"target_modules": "(q"}, "target_modules: '(q' is not a regular expression"),
        ({"exclude_modules": "[x"}, "exclude_modules: '[x' is not a regular expression"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: must be one of"),
        ({"init_lora_weights": 1}, "init_lora_weights: must be one of"),
        ({"use_rslora": "yes"}, "use_rslora: must be true or false"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q']: must be a whole number of at least 1"),
        ({"rank_pattern": ["q"]}, "rank_pattern: must map"),
        ({"alpha_pattern": {"q": math.inf}}, "alpha_pattern['q']: must be a finite number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is not a regular expression"),
        (
            {"layers_to_transform": [0], "target_modules": "q"},
            "layers_to_transform: needs target_modules as a list",
        ),
        ({"layers_to_transform": -1}, "layers_to_transform: must be a whole number of at least 0"),
        ({"layers_to_transform": []}, "layers_to_transform: the list is empty"),
        ({"layers_pattern": "h"}, "layers_pattern: has no effect without layers_to_transform"),
        ({"use_dora": True}, "use_dora: not implemented"),
        ({"target_parameters": "w"}, "target_parameters: must be a list"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config: not implemented"),
        ({"peft_type": "IA3"}, "peft_type: loraloom reads LORA"),
        ({"revision": 3}, "revision: must be a string"),
    ],
)
def test_a_wrong_field_is_refused_and_named_when_the_config_is_made(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(**fields)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.mark.parametrize("name", [name for name in peft.LoraConfig().to_dict() if name not in ("peft_version",)])
def test_every_field_that_peft_writes_at_its_default_is_read(name: str) -> None:
    values = peft.LoraConfig().to_dict()
    assert LoraConfig.from_dict({name: values[name]}) == LoraConfig()


def test_what_peft_writes_is_read_and_written_again_the_same(tmp_path) -> None:
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["v", "q"],
        task_type="SEQ_CLS",
        rank_pattern={"q": 2},
        bias="lora_only",
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = LoraConfig.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    a, b = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    a["target_modules"] = sorted(a["target_modules"])
    assert a == b
    assert peft.LoraConfig.from_pretrained(tmp_path / "ours").to_dict() == theirs.to_dict()


def test_a_file_that_is_not_json_is_named_with_its_line(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text('{\n "r": 8,,\n}')
    with pytest.raises(ConfigError, match=r"adapter_config\.json, line 2"):
        LoraConfig.from_pretrained(tmp_path)


def test_an_unknown_key_in_a_file_is_named_with_the_file(tmp_path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"lora_alfa": 8}')
    with pytest.raises(ConfigError, match=r"adapter_config\.json.*lora_alfa.*did you mean 'lora_alpha'"):
        LoraConfig.from_pretrained(tmp_path)


def test_the_callers_lists_are_copied() -> None:
    targets, ranks = ["q", "v"], {"q": 4}
    config = LoraConfig(target_modules=targets, rank_pattern=ranks)
    targets.append("x")
    ranks["v"] = 1
    assert config.target_modules == ["q", "v"]
    assert config.rank_pattern == {"q": 4}


@given(
    r=st.integers(1, 512),
    alpha=st.floats(0.1, 1e4),
    dropout=st.floats(0, 0.999),
    targets=st.one_of(st.none(), st.sets(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1)),
    task=st.sampled_from([None, *TaskType]),
    rslora=st.booleans(),
)
def test_json_and_back_is_the_same_config_and_equal_configs_give_equal_bytes(
    r: int, alpha: float, dropout: float, targets: set[str] | None, task: TaskType | None, rslora: bool
) -> None:
    def make(order: list[str] | None) -> LoraConfig:
        return LoraConfig(
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=order,
            task_type=task,
            use_rslora=rslora,
        )

    order = None if targets is None else sorted(targets)
    config = make(order)
    assert LoraConfig.from_dict(json.loads(config.to_json())) == config
    assert make(None if order is None else order[::-1]).to_json() == config.to_json()


def test_scale_is_alpha_over_r_and_over_its_root_with_rslora() -> None:
    assert LoraConfig().scale(16, 32) == 2
    assert LoraConfig(use_rslora=True).scale(16, 32) == 8
