"""Which modules a config without targets adapts."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from loraloom import LoraConfig, get_peft_model
from loraloom.errors import TargetError, TargetsWarning
from loraloom.lora.injection import base_modules
from loraloom.lora.matching import matches_name
from loraloom.lora.presets import TARGET_MODULES, preset
from loraloom.lora.targets import plan

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


#: A type that stands in no row → its small config, and what is adapted.
UNKNOWN = {
    "qwen3_5_text": ({"layer_types": ["linear_attention", "full_attention"]}, ["in_proj_qkv", "q_proj", "v_proj"]),
    "qwen2_vl": ({}, ["language_model.layers.0.self_attn.q_proj", "v_proj"]),
    "deepseek_v32": ({}, ["kv_b_proj", "q_b_proj"]),
    "modernbert-decoder": ({}, ["q_proj", "v_proj"]),
    "mamba": ({}, ["in_proj"]),
    "recurrent_gemma": ({}, ["q_proj", "v_proj"]),
    "wavlm": ({}, ["gru_rel_pos_linear", "intermediate_dense", "output_dense"]),
    "fnet": ({}, ["dense"]),
    "resnet": ({}, ["convolution"]),
}


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_a_type_in_no_row_gets_what_is_found_in_the_model_and_it_is_said(model_type: str) -> None:
    model = empty(model_type)
    made = plan(model, LoraConfig(r=2))
    names = [target.name for target in made.targets]
    for wanted in UNKNOWN[model_type][1]:
        assert any(matches_name(wanted, name) for name in names), (wanted, names)
    assert len({name.rpartition(".")[2] for name in names}) == len(UNKNOWN[model_type][1])
    assert not [name for name in names if "visual" in name or "dt_proj" in name or "out_proj" in name]
    assert f"model type {model_type!r} has no preset" in made.note
    assert made.note in str(made)


def test_targets_found_in_the_model_are_warned_of_and_written_out() -> None:
    model = nn.Module()
    model.self_attn = nn.Module()
    model.self_attn.q_proj, model.self_attn.k_proj, model.self_attn.v_proj = (nn.Linear(4, 4) for _ in range(3))
    with pytest.warns(TargetsWarning, match="no model type: q_proj, v_proj were found in the model"):
        adapted = get_peft_model(model, LoraConfig(r=2))
    assert adapted.peft_config["default"].target_modules == ["q_proj", "v_proj"]


def test_a_module_whose_weight_is_read_and_never_called_is_no_default() -> None:
    """An adapter there would train to nothing, in silence."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.v_proj(x) @ self.q_proj.weight

    assert [target.name for target in plan(nn.Sequential(Attention()), LoraConfig(r=2)).targets] == ["0.v_proj"]


def test_no_default_and_nothing_like_one_is_an_error_that_lists_what_could_be_targeted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.words = nn.Linear(4, 4), nn.Embedding(8, 4)
            self.config = {"model_type": "brand_new"}

    with pytest.raises(TargetError, match=r"'brand_new' has no preset.*mix \(1\), words \(1\)"):
        plan(Model(), LoraConfig())


@pytest.mark.parametrize(
    ("model_type", "left_out", "kept"),
    [
        ("mamba", "dt_proj", "x_proj"),
        ("falcon_mamba", "dt_proj", "x_proj"),
        ("wavlm", "q_proj", "output_dense"),
        ("longcat_flash", "classifier", "q_b_proj"),
        ("deberta", "none", "in_proj"),
        ("bloom", "none", "dense_4h_to_h"),
    ],
)
def test_all_linear_leaves_out_what_the_model_never_calls(model_type: str, left_out: str, kept: str) -> None:
    names = {
        t.name.rpartition(".")[2] for t in plan(empty(model_type), LoraConfig(target_modules="all-linear")).targets
    }
    assert left_out not in names
    assert kept in names
