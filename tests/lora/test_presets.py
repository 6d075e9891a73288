"""Which modules a config without targets adapts."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from loraloom import LoraConfig
from loraloom.errors import TargetError
from loraloom.lora.presets import TARGET_MODULES, preset
from loraloom.lora.targets import base_modules, matches_name, plan

#: Fields without which a config's own defaults give no model.
FIELDS = {
    "esm": {"vocab_size": 33},
    "nemotron": {"num_key_value_heads": 48},
    "hunyuan_v1_dense": {"head_dim": 128},
    "ministral": {"head_dim": 128},
}
#: Types whose code comes with the weights, not with transformers.
ELSEWHERE = {"chatglm", "btlm", "rwkv7", "RefinedWeb", "RefinedWebModel"}
#: Types with names for several of their forms, of which a model has one.
SEVERAL = {
    "blip-2",
    "led",
    "deepseek_v2",
    "deepseek_v3",
    "vit",
    "vit_mae",
    "deit",
    "beit",
    "dinov2",
    "swin",
    "segformer",
}


def empty(model_type: str) -> nn.Module:
    """The model of the type's default config, without numbers."""
    from transformers import AutoConfig, AutoModel

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        return AutoModel.from_config(AutoConfig.for_model(model_type, **FIELDS.get(model_type, {})))


def test_the_table_says_what_peft_says_for_every_type_that_peft_knows() -> None:
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT

    wanted = {name: value if isinstance(value, str) else tuple(value) for name, value in PEFT.items()}
    assert {name: TARGET_MODULES.get(name) for name in wanted} == wanted
    assert len(TARGET_MODULES) >= len(wanted) + 20


def test_no_type_stands_in_two_rows() -> None:
    from loraloom.lora import presets

    names = " ".join(presets._BY_TARGETS.values()).split()
    assert len(names) == len(set(names))


@pytest.mark.parametrize("model_type", sorted(TARGET_MODULES.keys() - ELSEWHERE))
def test_every_type_adapts_attention(model_type: str) -> None:
    model = empty(model_type)
    found = [target.name for target in plan(model, LoraConfig(r=2)).targets]
    assert found
    targets = preset(model_type)
    assert targets is not None
    if isinstance(targets, tuple) and model_type not in SEVERAL:
        names = [name for name, _ in base_modules(model)]
        assert [t for t in targets if not any(matches_name(t, name) for name in names)] == []


def test_an_unknown_type_is_an_error_that_lists_what_could_be_targeted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"mix": nn.Linear(4, 4)}) for _ in range(3))
            self.words = nn.Embedding(8, 4)
            self.config = {"model_type": "brand_new"}

    with pytest.raises(TargetError, match=r"model type 'brand_new' has no preset; .*mix \(3\), words \(1\)"):
        plan(Model(), LoraConfig())
