"""Mixtures of experts: the same targets as ``peft``, adapters both ways, and those of transformers 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import loraloom
from loraloom.errors import AdapterError, SaveError
from loraloom.lora.peft_targets import TYPES

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-5
IDS = torch.arange(3, 11)[None]
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 3, "num_experts": 3,
    "n_routed_experts": 3, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "shared_expert_intermediate_size": 8, "max_position_embeddings": 32,
}  # fmt: skip
#: Model type → settings beside those of SIZES that its config has.
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "deepseek_v3": {},  # a dense first layer and shared experts are called as experts were
    "qwen3_next": {"layer_types": ["full_attention", "full_attention"]},
    "afmoe": {"num_dense_layers": 1, "layer_types": ["full_attention", "full_attention"]},  # a router that is a Linear
    "qwen2_moe": {},  # names mean here what they say
    "gpt_oss": {"layer_types": ["full_attention", "full_attention"]},
    "jetmoe": {"kv_channels": 8},
}


def build(model_type: str) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    cls = CONFIG_MAPPING[model_type]
    known = cls()
    settings = {key: value for key, value in SIZES.items() if hasattr(known, key)} | MODELS.get(model_type, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cls(**settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def trained(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


ALL = {"target_modules": "all-linear"}
STACKS = {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
CASES = [
    *((model_type, ALL) for model_type in MODELS),
    ("mixtral", {"target_modules": ["q_proj", "w1", "w3", "gate"]}),
    ("qwen3_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj"], "use_rslora": True}),
    ("deepseek_v3", {"target_modules": ["o_proj", "mlp.experts.down_proj"]}),
    ("gpt_oss", STACKS),
    ("gpt_oss", {"target_parameters": ["gate_up_proj_bias"], "target_modules": []}),
    ("jetmoe", {"target_modules": [], "target_parameters": ["mlp.input_linear.weight"]}),
    ("qwen2_moe", STACKS | {"rank_pattern": {"experts.down_proj": 3}}),
]


@pytest.mark.parametrize(("model_type", "settings"), CASES, ids=[f"{t}-{i}" for i, (t, _) in enumerate(CASES)])
def test_the_same_is_trained_as_in_peft_and_adapters_go_both_ways(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    ours = loraloom.get_peft_model(build(model_type), loraloom.LoraConfig(r=2, lora_alpha=6, **settings))
    theirs = peft.get_peft_model(build(model_type), peft.LoraConfig(r=2, lora_alpha=6, **settings))
    assert trained(ours) == trained(theirs)
    for model, reader in ((shaken(ours), peft), (shaken(theirs), loraloom)):
        wanted = logits(model)
        assert (wanted - logits(build(model_type))).abs().max() > 100 * TOLERANCE
        model.save_pretrained(str(tmp_path))
        copy = reader.PeftModel.from_pretrained(build(model_type), str(tmp_path))
        torch.testing.assert_close(logits(copy), wanted, rtol=0, atol=TOLERANCE)


def test_the_types_whose_names_mean_experts_are_those_of_peft() -> None:
    from peft.utils import transformers_weight_conversion as theirs

    found = {t: theirs._MOE_TARGET_MODULE_MAPPING.get(f) for t, f in theirs._MODEL_TO_CONVERSION_PATTERN.items()}
    modelled = {t: table for t, table in found.items() if table and t.islower()}
    assert dict(TYPES) == modelled


# -- what PEFT reads otherwise --------------------------------------------------------------------------------------


def test_dense_layers_and_shared_experts_are_named_so_that_peft_finds_them(tmp_path: Path) -> None:
    settings = {"target_modules": ["layers.0.mlp.gate_proj", "shared_experts.down_proj", "o_proj"], "lora_dropout": 0.1}
    model = shaken(loraloom.get_peft_model(build("deepseek_v3"), loraloom.LoraConfig(r=2, **settings)))
    assert len(model.lora_layers) == 4
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    for library in (loraloom, peft):
        copy = library.PeftModel.from_pretrained(build("deepseek_v3"), str(tmp_path))
        torch.testing.assert_close(logits(copy), wanted, rtol=0, atol=TOLERANCE)
    again = loraloom.PeftModel.from_pretrained(build("deepseek_v3"), tmp_path)
    assert again.peft_config["default"].lora_dropout == 0.1  # PEFT's config may not name one beside parameters


def test_what_peft_would_not_find_is_not_written_unless_for_loraloom_alone(tmp_path: Path) -> None:
    """PEFT renames Laguna's shared experts as transformers renames those of old checkpoints, to no module's name."""
    model = shaken(loraloom.get_peft_model(build("laguna"), loraloom.LoraConfig(r=2, **ALL)))
    with pytest.raises(SaveError, match=r"would not find .*mlp\.shared_experts\.gate_proj and 2 more.*peft=False"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, peft=False)
    copy = loraloom.PeftModel.from_pretrained(build("laguna"), tmp_path)
    assert torch.equal(logits(copy), logits(model))
    with pytest.raises(KeyError, match="LORALOOM"):
        peft.PeftModel.from_pretrained(build("laguna"), str(tmp_path))


# -- adapters of transformers 4 -----------------------------------------------------------------------------------


def old_adapter(folder: Path, model_type: str, parts: dict[str, str], block: str, **settings: Any) -> nn.Module:
    """Write an adapter of experts that are modules; the base with its updates in the weights."""
    base = build(model_type)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "gate", *parts], **settings}
    scale = loraloom.LoraConfig.from_dict(config).scale(2, 6)
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}

    def add(name: str, weight: Tensor) -> None:
        a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
        weight.data += scale * b @ a

    for name, module in base.named_modules():
        old, leaf = name.replace(".mlp.", f".{block}."), name.rpartition(".")[2]
        router = leaf == "gate" and not isinstance(module, nn.Linear)
        beside = name.endswith(("mlp.gate_proj", "shared_experts.up_proj")) and leaf in parts
        if leaf == "q_proj" or router or beside:
            add(old, module.weight)
        elif leaf == "experts":
            for expert in range(3):
                up = module.gate_up_proj[expert].chunk(2)
                for part, where in parts.items():
                    add(f"{old}.{expert}.{part}", {"g": up[0], "u": up[1], "d": module.down_proj[expert]}[where])
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return base


QWEN, MIXTRAL = {"gate_proj": "g", "up_proj": "u", "down_proj": "d"}, {"w1": "g", "w3": "u", "w2": "d"}


@pytest.mark.parametrize(
    ("model_type", "parts", "block", "settings"),
    [
        ("mixtral", MIXTRAL, "block_sparse_moe", {}),
        ("qwen3_moe", QWEN, "mlp", {"use_rslora": True}),
        ("deepseek_v3", QWEN, "mlp", {"alpha_pattern": {"q_proj": 6}}),  # PEFT drops the dense layer's
        ("qwen3_moe", {"up_proj": "u"}, "mlp", {}),  # PEFT wants gate_proj too
    ],
)
def test_an_adapter_of_experts_that_were_modules_is_read_exactly(
    model_type: str, parts: dict[str, str], block: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    wanted = logits(old_adapter(tmp_path, model_type, parts, block, **settings))
    model = loraloom.PeftModel.from_pretrained(build(model_type), tmp_path)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    assert (wanted - logits(build(model_type))).abs().max() > 0.1
    model.save_pretrained(tmp_path / "new")
    copy = peft.PeftModel.from_pretrained(build(model_type), str(tmp_path / "new"))
    torch.testing.assert_close(logits(copy), logits(model), rtol=0, atol=TOLERANCE)


def test_old_experts_that_no_parameter_can_hold_are_refused_with_the_reason(tmp_path: Path) -> None:
    old_adapter(tmp_path, "qwen3_moe", QWEN, "mlp")
    for model_type, words in (
        ("gpt_oss", "stacks its experts in another order"),
        ("granite", "is a module of its own"),
    ):
        model = build(model_type)
        with pytest.raises(AdapterError, match=words):
            loraloom.PeftModel.from_pretrained(model, tmp_path)
        assert all(p.requires_grad for p in model.parameters())
