"""Promises of the doctor: what is wrong is found by name, and a healthy training is left in peace."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from loraloom import LoraConfig, PeftModel, get_peft_model
from loraloom.errors import ConfigError
from loraloom.lora import matmul
from loraloom.models import activation_checkpointing
from loraloom.models.load import load_tokenizer
from loraloom.report.sentences import sentence
from loraloom.training.preflight import doctor

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def plain(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes}))


def adapted(base: Any = None, **fields: Any) -> PeftModel:
    return get_peft_model(base or plain(), LoraConfig(task_type="CAUSAL_LM", **fields))


def kinds(model: PeftModel, **more: Any) -> set[str]:
    return {finding.kind for finding in doctor.examine(model, **more)}


def test_a_healthy_training_is_left_in_peace() -> None:
    assert kinds(adapted(), learning_rate=2e-4, rows=100, batch_size=16, steps=20) == set()


def test_an_adapter_that_does_not_train_stops() -> None:
    model = adapted()
    model.set_requires_grad("default", False)
    with pytest.raises(ConfigError, match="nothing of 'default' is trainable: call set_adapter"):
        doctor.examine(model)


def test_an_adapter_frozen_in_part_stops() -> None:
    model = adapted()
    next(iter(model.base_model.lora_layers.values())).factors("default")[0].requires_grad_(False)
    with pytest.raises(ConfigError, match="1 of 8 tensors of 'default' are frozen"):
        doctor.examine(model)


def test_a_frozen_model_that_would_train_stops() -> None:
    model = adapted()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="32 base-model parameters require gradients"):
        doctor.examine(model)


def test_a_model_that_carries_lora_of_another_kind_stops() -> None:
    import peft

    base = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["k_proj"]), plain())
    base.requires_grad_(False)
    with pytest.raises(ConfigError, match="k_proj carries LoRA already"):
        doctor.examine(adapted(base, target_modules=["q_proj"]))


def test_reentrant_checkpointing_stops_and_ours_does_not() -> None:
    model = adapted()
    activation_checkpointing.enable(model)
    assert kinds(model) == set()
    for layer in activation_checkpointing.recomputed(model):
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)
    with pytest.raises(ConfigError, match="reentrant"):
        doctor.examine(model)


def test_one_end_of_tied_embeddings_is_said() -> None:
    both = plain(tie_word_embeddings=True)
    assert "tied" in kinds(adapted(both, target_modules=["q_proj", "embed_tokens"]))
    assert "tied" not in kinds(adapted(plain(tie_word_embeddings=False), target_modules=["q_proj", "embed_tokens"]))


@pytest.mark.parametrize(("rate", "optim", "said"), [(1e-6, "adamw", True), (0.1, "adamw", True), (0.1, "SGD", False)])
def test_a_rate_that_is_unusual_for_lora_is_said(rate: float, optim: str, said: bool) -> None:
    assert ("rate" in kinds(adapted(), learning_rate=rate, optim=optim)) is said


def test_a_tokenizer_that_does_not_fit_is_found(decoder_folder: Path) -> None:
    tokenizer = load_tokenizer(str(decoder_folder))
    with pytest.raises(ConfigError, match="tokens and the model 8: they do not belong together"):
        doctor.examine(adapted(plain(vocab_size=8, eos_token_id=5, bos_token_id=4)), tokenizer=tokenizer)
    large = adapted(plain(vocab_size=len(tokenizer), eos_token_id=5, bos_token_id=4))
    assert "end" in kinds(large, tokenizer=tokenizer)


def test_a_pad_token_that_is_the_end_token_is_said() -> None:
    class Tokenizer(SimpleNamespace):
        def __len__(self) -> int:
            return 64

    tokenizer = Tokenizer(eos_token_id=2, eos_token="</s>", pad_token_id=2, pad_token="</s>")
    assert kinds(adapted(), tokenizer=tokenizer) == {"pad"}


def test_too_little_to_train_on_is_said() -> None:
    assert kinds(adapted(), rows=3, batch_size=4, steps=2) == {"batch", "short"}


@pytest.mark.parametrize(("native", "said"), [(True, "overflows early"), (False, "no instructions for float16")])
def test_half_precision_on_a_cpu_is_said(native: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "native", lambda device, dtype: native or dtype is torch.float32)
    found = doctor.examine(adapted(plain().to(torch.float16)))
    assert [said in sentence(finding) for finding in found] == [True]
    assert doctor.examine(adapted()) == []
