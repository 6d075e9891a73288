"""Configs as others write them: what says nothing passes, what is damaged gets one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loraloom import LoraConfig, PeftConfig
from loraloom.config.lora import PeftType
from loraloom.errors import ConfigError

#: As PEFT 0.2 wrote it.
OLD = {
    "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
    "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05, "merge_weights": False,
    "modules_to_save": None, "peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "noted"),
    [
        ({}, {"enable_lora", "merge_weights"}),
        ({"new_field": None, "newer": {}, "newest": "", "also": []}, {"new_field", "newer", "newest", "also"}),
        ({"fan_in_fan_out": None, "layers_to_transform": []}, {"fan_in_fan_out", "layers_to_transform"}),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}, {"init_lora_weights", "eva_config"}),
        ({"init_lora_weights": "orthogonal"}, {"init_lora_weights"}),
        ({"corda_config": {"a": "kpm"}, "loftq_config": {"loftq_bits": 4}}, {"corda_config", "loftq_config"}),
        ({"megatron_core": None, "qalora_group_size": 32, "use_qalora": False}, set()),
        ({"peft_type": None, "runtime_config": None}, set()),
    ],
)  # fmt: skip
def test_what_says_nothing_new_is_read_with_a_note(tmp_path: Path, fields: dict[str, Any], noted: set[str]) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**OLD, **fields}))
    config = LoraConfig.from_pretrained(tmp_path)
    assert {note.partition(":")[0] for note in config.notes} == {"enable_lora", "merge_weights", *noted}
    wanted = {key: value for key, value in OLD.items() if key not in ("enable_lora", "merge_weights")}
    assert config == LoraConfig(**wanted)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (json.dumps({**OLD, "new_field": 0}), "new_field: LoraConfig has no such field"),
        (json.dumps({**OLD, "enable_lora": [True]}), "enable_lora: LoraConfig has no such field"),
        (json.dumps({**OLD, "init_lora_weights": "pissa_niter_4"}), "'pissa_niter_4' rewrote weights of the base"),
        (json.dumps({**OLD, "use_dora": True}), "use_dora: not implemented"),
        ('{"r": 8, "lora_alpha": 1, "r": 9}', "'r' is given twice"),
        ('{"rank_pattern": {"q": 8, "q": 9}}', "'q' is given twice"),
        ("[" * 100_000, "deeper than any config"),
        ('{"a": ' * 100_000, "deeper than any config"),
        ('{"r": ' + "1" * 5000 + "}", "a number of more digits than"),
        ('{"lora_alpha": ' + "1" * 250 + "}", "lora_alpha: 1+… times an update is no number in float32"),
        ('{"r": ' + "1" * 250 + "}", "r: must be a whole number of at most 2147483647, found 1+…"),
        ('{"lora_alpha": 1e308}', r"lora_alpha: 1e\+308 times an update is no number in float32"),
        ('{"lora_alpha": 1e-320}', "lora_alpha: .* no number in float32"),
        ('{"lora_alpha": NaN}', "lora_alpha: must be a finite number"),
        ('{"alpha_pattern": {"q": 1e300}}', "alpha_pattern.*no number in float32"),
        ('{"r": true}', "r: must be a whole number of at least 1, found True"),
        ('{"target_modules": "' + "a|" * 600_000 + '"}', "an? regular expression of 1,200,000 characters"),
        (json.dumps({"target_modules": ["a" * 2000]}), "an entry of 2,000 characters, 'a+…, is no module's name"),
        (json.dumps({"rank_pattern": {"(?i)q": 4}}), "rank_pattern: .*not a regular expression"),
        (json.dumps({"layers_to_transform": [1], "layers_pattern": "("}), "layers_pattern: .*not a regular expression"),
        ("[]", "must be a JSON object, found list"),
        ('{"r" 8}', "line 1: not valid JSON"),
        ('{"x": "' + "y" * 5_000_000 + '"}', "5,000,009 bytes, more than the 4,000,000"),
    ],
    ids=range(23),  # the texts are too long for names
)  # fmt: skip
def test_a_damaged_config_gets_one_clear_and_short_error(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        LoraConfig.from_pretrained(tmp_path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 900


def test_pefts_ways_to_read_a_config_are_there(tmp_path: Path) -> None:
    made = LoraConfig(r=4, target_modules=["q"], task_type="CAUSAL_LM", revision="v2")
    made.save_pretrained(tmp_path / "inside", auto_mapping_dict={"base_model_class": "X"})
    for read in (LoraConfig.from_pretrained, PeftConfig.from_pretrained):
        config = read(tmp_path, subfolder="inside", token=None, cache_dir="x", revision=None, inference_mode=True)
        assert config == made.copy(auto_mapping={"base_model_class": "X"}, inference_mode=True)
    assert LoraConfig.from_json_file(tmp_path / "inside" / "adapter_config.json")["r"] == 4
    assert PeftConfig.from_peft_type(peft_type="LORA", r=3) == LoraConfig(r=3)
    assert isinstance(config, PeftConfig)
    assert (config.peft_type, config.peft_type.value) == (PeftType.LORA, "LORA")
    assert config.peft_type == "LORA"
    assert not config.is_prompt_learning
    assert not config.is_adaption_prompt
    assert not config.runtime_config.ephemeral_gpu_offload
    with pytest.raises(ConfigError, match="revision: chooses among files of a hub"):
        LoraConfig.from_pretrained(tmp_path, subfolder="inside", revision="main")
    with pytest.raises(ConfigError, match="subfoldr: loraloom has no such option"):
        LoraConfig.from_pretrained(tmp_path, subfoldr="inside")
    with pytest.raises(ConfigError, match="push_to_hub: loraloom opens no connection"):
        config.push_to_hub("x")
