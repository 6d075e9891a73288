"""Promises of gradient checkpointing: the same gradients to the bit, and layers that keep their input alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from loraloom import LoraConfig, TaskType, get_peft_model
from loraloom.engine.pack import Pack
from loraloom.errors import ModelError
from loraloom.models import activation_checkpointing

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[Any, Any, TaskType, list[str], str]] = {
    "llama": (
        transformers.LlamaConfig(vocab_size=96, **LLAMA),
        transformers.LlamaForCausalLM,
        TaskType.CAUSAL_LM,
        ["q_proj", "k_proj", "v_proj", "down_proj"],
        "LlamaAttention",
    ),
    "bert": (
        transformers.BertConfig(vocab_size=96, max_position_embeddings=64, num_labels=3, **LLAMA),
        transformers.BertForSequenceClassification,
        TaskType.SEQ_CLS,
        ["query", "value", "output.dense"],
        "BertIntermediate",
    ),
    "opt": (  # its layers draw dropout by a function that looks at their mode
        transformers.OPTConfig(
            vocab_size=96,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            dropout=0.5,
            attention_dropout=0.0,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        ),
        transformers.OPTForCausalLM,
        TaskType.CAUSAL_LM,
        ["q_proj", "v_proj", "fc1"],
        "OPTAttention",
    ),
    "t5": (
        transformers.T5Config(
            vocab_size=96,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            dropout_rate=0.5,
        ),
        transformers.T5ForConditionalGeneration,
        TaskType.SEQ_2_SEQ_LM,
        ["q", "v", "wi"],
        "T5LayerSelfAttention",
    ),
}


def built(family: str, dtype: torch.dtype = torch.float32) -> tuple[Pack, dict[str, dict[str, Tensor]]]:
    config, cls, task, targets, _ = FAMILIES[family]
    torch.manual_seed(0)
    base = cls(config).to(dtype)
    lora = {"target_modules": targets, "task_type": task, "init_lora_weights": False, "lora_dropout": 0.1}
    configs = {name: LoraConfig(r=r, **lora) for name, r in (("a", 4), ("b", 8))}
    source = torch.Generator().manual_seed(1)
    batches = {}
    for name in configs:
        ids = torch.randint(3, 96, (3, 9), generator=source)
        labels = torch.randint(0, 3, (3,), generator=source) if task is TaskType.SEQ_CLS else ids
        batches[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Pack(base, configs), batches


def trained(
    family: str, again: bool, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, float], dict[str, Tensor], int]:
    """Losses, gradients, and how often a part inside the layers ran."""
    pack, batches = built(family, dtype)
    if again:
        activation_checkpointing.enable(pack.model)
    runs = 0

    def count(*_: Any) -> None:
        nonlocal runs
        runs += 1

    pack.backward(batches, dropout_seeds={"a": 1, "b": 2})
    pack.model.zero_grad()
    for module in pack.model.modules():
        if type(module).__name__ == FAMILIES[family][4]:
            module.register_forward_hook(count)
    losses = pack.backward(batches, dropout_seeds={"a": 1, "b": 2})
    gradients = {name: p.grad for name, p in pack.model.named_parameters() if p.grad is not None}
    return losses, gradients, runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_to_the_bit_and_layers_run_twice(family: str, dtype: torch.dtype) -> None:
    losses, gradients, runs = trained(family, again=False, dtype=dtype)
    again, same, twice = trained(family, again=True, dtype=dtype)
    assert again == losses
    assert same.keys() == gradients.keys()
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    assert twice == 2 * runs > 0


def test_only_the_layers_are_in_training_mode() -> None:
    pack, batches = built("bert")
    activation_checkpointing.enable(pack.model)
    pack.backward(batches)
    training = [(name, m) for name, m in pack.model.get_base_model().named_modules() if m.training]
    names = {type(m).__name__ for name, m in training if ".lora_dropout" not in name}
    assert "BertLayer" in names
    assert not names & {"Dropout", "BertModel", "BertAttention", "LayerNorm"}


def test_a_model_that_cannot_says_so() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(ModelError, match="gradient_checkpointing: the layers of Sequential do not support it"):
        activation_checkpointing.enable(model)


def test_a_model_that_transformers_will_not_checkpoint_is_refused_by_name() -> None:
    """Its layers are of the kind that could compute again."""
    config = transformers.JetMoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=2,
        num_experts_per_tok=2,
    )
    model = get_peft_model(transformers.JetMoeForCausalLM(config), LoraConfig(target_modules=["kv_proj"]))
    with pytest.raises(ModelError, match="gradient_checkpointing: the layers of JetMoeForCausalLM do not support it"):
        activation_checkpointing.enable(model)
