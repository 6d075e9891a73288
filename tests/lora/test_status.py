"""What is where: the same lines as PEFT's, and errors for what PEFT's model has and this one has not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import loraloom
from loraloom import PeftModel, get_layer_status, get_model_status
from loraloom.errors import ConfigError
from loraloom.lora.adapters import LoraModel

#: PEFT freezes the adapters that it disables, which is undone here.
STATES: dict[str, Callable[[Any], Any]] = {
    "fresh": lambda model: None,
    "merged": lambda model: model.merge_adapter(),
    "disabled": lambda model: (model.base_model.disable_adapter_layers(), model.set_requires_grad("default")),
    "frozen": lambda model: model.set_requires_grad("default", False),
    "frozen in part": lambda model: next(p for p in model.parameters() if p.requires_grad).requires_grad_(False),
}


def pair(llama: nn.Module) -> tuple[Any, Any]:
    fields = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}
    theirs = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(**fields))
    return loraloom.get_peft_model(llama, loraloom.LoraConfig(**fields)), theirs


@pytest.mark.parametrize("change", STATES.values(), ids=STATES)
def test_the_status_of_layers_and_model_is_pefts(llama, change: Callable[[Any], Any]) -> None:
    ours, theirs = pair(llama)
    for model in (ours, theirs):
        change(model)
    mine, wanted = ours.get_layer_status(), theirs.get_layer_status()
    assert mine == get_layer_status(ours)
    saved = "ModulesToSaveWrapper"
    for a, b in zip(mine, wanted, strict=True):
        left, right = dataclasses.asdict(a), dataclasses.asdict(b)
        if b.module_type == saved:  # PEFT never calls a copy merged
            left["merged_adapters"] = right["merged_adapters"]
        assert left == right
    whole, theirs_whole = dataclasses.asdict(get_model_status(ours)), dataclasses.asdict(theirs.get_model_status())
    if theirs_whole["merged_adapters"] == "irregular":
        theirs_whole["merged_adapters"] = ["default"]
    assert whole == theirs_whole


def test_several_adapters_are_told_apart(llama) -> None:
    model, _ = pair(llama)
    model.add_adapter("b", loraloom.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_requires_grad("b", False)
    status = model.get_model_status()
    assert status.available_adapters == ["b", "default"]
    assert status.requires_grad == {"b": False, "default": True}
    layer = next(s for s in model.get_layer_status() if s.name.endswith("0.self_attn.q_proj"))
    assert layer.available_adapters == ["b", "default"]


def test_the_smaller_properties_are_there(llama) -> None:
    model, theirs = pair(llama)
    assert model.modules_to_save == {"norm"}
    assert model.base_model_torch_dtype == theirs.base_model_torch_dtype == torch.float32
    assert sorted(model.targeted_module_names) == sorted(theirs.targeted_module_names)
    assert model.has_active_enabled_adapter
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    assert model.has_active_enabled_adapter


@pytest.mark.parametrize("name", ["add_weighted_adapter", "create_or_update_model_card"])
def test_what_is_not_there_yet_says_so_and_is_never_the_models_own(llama, name: str) -> None:
    model, _ = pair(llama)
    with pytest.raises(AttributeError, match=f"PeftModel has no '{name}' yet"):
        getattr(model, name)
    assert not hasattr(model, name)


def test_an_attribute_that_nothing_has_names_both_models(llama) -> None:
    model, _ = pair(llama)
    with pytest.raises(AttributeError, match="PeftModel has no attribute 'nothing', nor has its LlamaForCausalLM"):
        model.nothing  # noqa: B018
    assert isinstance(model, PeftModel)
    assert model.config is llama.config


@pytest.mark.parametrize("fields", [{}, {"target_modules": ["k_proj"]}], ids=["alone", "beside a module"])
def test_the_weight_of_a_layer_named_as_a_parameter_is_told_as_in_peft(llama, fields: dict[str, Any]) -> None:
    fields = {"target_modules": [], "target_parameters": ["q_proj.weight"], **fields}
    theirs = peft.get_peft_model(copy.deepcopy(llama), peft.LoraConfig(**fields))
    ours = loraloom.get_peft_model(llama, loraloom.LoraConfig(**fields))
    assert [(s.name, s.module_type) for s in ours.get_layer_status()] == [
        (s.name, s.module_type) for s in theirs.get_layer_status()
    ]
    assert ours.targeted_parameter_names == theirs.targeted_parameter_names
    assert ours.targeted_module_names == [n for n in theirs.targeted_module_names if n.endswith("k_proj")]


def test_the_status_of_a_plain_model_with_adapters_in_it_is_pefts(llama) -> None:
    fields = {"r": 4, "target_modules": ["q_proj"]}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**fields), copy.deepcopy(llama))
    with pytest.raises(ConfigError, match="No adapter layers found in the model, a LlamaForCausalLM"):
        get_layer_status(llama)
    ours = loraloom.inject_adapter_in_model(loraloom.LoraConfig(**fields), llama)
    assert [dataclasses.asdict(s) for s in get_layer_status(ours)] == [
        dataclasses.asdict(s) for s in peft.get_layer_status(theirs)
    ]
    mine, wanted = get_model_status(ours), peft.get_model_status(theirs)
    assert dataclasses.asdict(mine) == dataclasses.asdict(wanted) | {"peft_types": mine.peft_types}


def test_the_config_of_a_model_is_a_dictionary(llama) -> None:
    own = dataclasses.make_dataclass("Own", [("width", int)])(3)
    plain = nn.Linear(2, 2)
    assert LoraModel.get_model_config(plain) == peft.tuners.lora.LoraModel.get_model_config(plain)
    for config, wanted in ((own, {"width": 3}), ({"width": 4}, {"width": 4}), (llama.config, llama.config.to_dict())):
        plain.config = config
        assert LoraModel.get_model_config(plain) == wanted
