"""PEFT's functions around a model: the base found from the folder, adapters put into a plain model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import loraloom
from loraloom import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from loraloom.errors import ConfigError


def config(**fields: object) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["q_proj"], "init_lora_weights": False, **fields})


def test_the_base_is_found_from_the_folder(llama_folder, tokens, logits, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(llama_folder)
    wanted = get_peft_model(base, config(task_type="CAUSAL_LM")).eval()
    wanted.save_pretrained(tmp_path)
    for cls in (AutoPeftModel, AutoPeftModelForCausalLM):
        found = cls.from_pretrained(tmp_path, is_trainable=True, dtype=torch.float32)
        assert isinstance(found, loraloom.PeftModelForCausalLM)
        assert torch.equal(logits(found, tokens), logits(wanted, tokens))
        assert all(p.requires_grad for p in found.adapter_parameters("default").values())
    assert load_peft_weights(tmp_path).keys() == get_peft_model_state_dict(wanted).keys()
    with pytest.raises(OSError, match="is made by from_pretrained"):
        AutoPeftModelForCausalLM()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_model_name_or_path": None}, "does not say what base it is of"),
        ({"auto_mapping": None}, "neither its task nor a model class"),
        ({"auto_mapping": {"base_model_class": "run", "parent_library": "subprocess"}}, "neither its task nor"),
        ({"auto_mapping": {"base_model_class": "Path", "parent_library": "transformers"}}, "neither its task nor"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_say_its_base_is_refused_and_imports_nothing(llama, tmp_path, fields, words) -> None:
    get_peft_model(llama, config()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "x", **fields}))
    with pytest.raises(ConfigError, match=words):
        AutoPeftModel.from_pretrained(tmp_path)


def test_adapters_are_put_into_a_plain_model(llama, tokens, logits) -> None:
    base = logits(llama, tokens)
    assert inject_adapter_in_model(config(), llama) is llama
    first = logits(llama, tokens)
    state = get_peft_model_state_dict(llama)
    assert all(key.startswith("model.layers.") for key in state)
    inject_adapter_in_model(config(r=2), llama, "other")
    assert not torch.allclose(logits(llama, tokens), first)
    report = set_peft_model_state_dict(llama, {key: value * 0 for key, value in state.items()})
    assert len(report.used) == len(state)
    assert not any(bool(value.any()) for value in get_peft_model_state_dict(llama).values())
    assert not torch.allclose(first, base)
    assert [name for name, p in llama.named_parameters() if p.requires_grad and "lora_" not in name] == []
    assert sum(name.startswith("model.layers.0.self_attn.q_proj.lora_") for name, _ in llama.named_parameters()) == 4


def test_injecting_what_fits_nothing_leaves_the_model_as_it_was(llama) -> None:
    before = set(vars(llama))
    with pytest.raises(ConfigError, match="matches no module"):
        inject_adapter_in_model(config(target_modules=["nothing"]), llama)
    assert set(vars(llama)) == before
    assert all(p.requires_grad for p in llama.parameters())
    inject_adapter_in_model(config(), llama)


def test_a_quantised_base_is_readied_as_peft_does() -> None:
    from peft import prepare_model_for_kbit_training as theirs

    found = []
    for prepare in (prepare_model_for_kbit_training, theirs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4).half(), nn.LayerNorm(4).bfloat16(), nn.Linear(4, 4).double())
        assert prepare(model) is model
        found.append([(name, p.dtype, p.requires_grad) for name, p in model.named_parameters()])
    assert found[0] == found[1]


@pytest.mark.parametrize("clear", [True, False])
def test_the_memory_of_what_was_cast_goes_back_to_cuda(monkeypatch: pytest.MonkeyPatch, clear: bool) -> None:
    cleared = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append(True))
    prepare_model_for_kbit_training(nn.Linear(2, 2).half(), auto_clear_cache=clear)
    assert cleared == [True] * clear


@pytest.mark.parametrize("quantised", [True, False])
def test_checkpointing_is_for_quantised_models(llama, quantised: bool) -> None:
    llama.is_loaded_in_4bit = quantised
    prepare_model_for_kbit_training(llama, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert llama.is_gradient_checkpointing == quantised


def test_a_dictionary_becomes_a_config() -> None:
    assert get_peft_config({"peft_type": "LORA", "r": 3, "unknown": None}) == LoraConfig(r=3)
