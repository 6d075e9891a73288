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
