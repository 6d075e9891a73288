"""The base's own embeddings in an adapter's file: after new tokens the adapter is of no use without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraloom import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from loraloom.errors import AdapterError, ConfigError

IDS = torch.arange(60, 68).view(1, 8)
EMBEDDINGS = {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"}


def llama(folder: Path, rows: int | None, **fields: object):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    if not folder.exists():
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, **fields)).save_pretrained(folder)
    base = LlamaForCausalLM.from_pretrained(folder)
    if rows is not None:
        base.resize_token_embeddings(rows)
    return base


def adapted(folder: Path, rows: int | None = 70, tied: bool = False, **fields: object) -> PeftModel:
    made = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False, **fields}
    return get_peft_model(llama(folder, rows, tie_word_embeddings=tied), LoraConfig(**made)).eval()


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def keys(folder: Path) -> set[str]:
    return {key for key in load_file(folder / "adapter_model.safetensors") if "lora_" not in key}


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"], ["lm_head"]], ids=", ".join)
@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_of_the_vocabulary_are_saved_and_come_back(tmp_path: Path, tied: bool, targets: list[str]) -> None:
    model = adapted(tmp_path / "base", tied=tied, target_modules=targets)
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    inside = {key.replace(".base_layer", "") for key in keys(tmp_path / "adapter")}
    assert inside == EMBEDDINGS
    torch.manual_seed(99)  # the new rows of another day are others
    base = llama(tmp_path / "base", None)
    torch.manual_seed(99)
    base.resize_token_embeddings(70)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), before)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), before)


def test_peft_reads_and_writes_the_same_embeddings(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = adapted(tmp_path / "base")
    model.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(tmp_path / "base", 70), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model))
    theirs.save_pretrained(tmp_path / "theirs")
    assert keys(tmp_path / "theirs") == keys(tmp_path / "ours") == EMBEDDINGS


def test_save_embedding_layers_means_what_it_says(tmp_path: Path) -> None:
    same, resized = adapted(tmp_path / "base", None), adapted(tmp_path / "base")
    saved = {
        (model is resized, wanted): (model.save_pretrained(tmp_path / str(number), True, None, wanted), number)[1]
        for number, (model, wanted) in enumerate((m, w) for m in (same, resized) for w in (True, False, "auto"))
    }
    for (grown, wanted), number in saved.items():
        expected = EMBEDDINGS if wanted is True or (wanted == "auto" and grown) else set()
        assert keys(tmp_path / str(number)) == expected, (grown, wanted)
    resized.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="save_embedding_layers: must be True, False or 'auto', found 'yes'"):
        same.save_pretrained(tmp_path / "x", save_embedding_layers="yes")


def test_a_table_that_the_adapter_trains_is_saved_once(tmp_path: Path) -> None:
    model = adapted(tmp_path / "base", modules_to_save=["embed_tokens", "lm_head"])
    with torch.no_grad():
        model.adapter_parameters("default")["base_model.model.model.embed_tokens.weight"].add_(1)
    before = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert keys(tmp_path / "adapter") == EMBEDDINGS
    again = PeftModel.from_pretrained(llama(tmp_path / "base", 70), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), before)


def test_a_state_dict_gathered_elsewhere_is_written(tmp_path: Path) -> None:
    model = adapted(tmp_path / "base")
    wanted = get_peft_model_state_dict(model)
    whole = {f"_fsdp_wrapped_module.{key}": value * 2 for key, value in model.state_dict().items()}
    found = get_peft_model_state_dict(model, whole)
    assert found.keys() == wanted.keys() >= EMBEDDINGS
    assert all(torch.equal(found[key], wanted[key] * 2) for key in wanted)
    alone = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    model.save_pretrained(tmp_path / "adapter", state_dict=alone, save_function=print, max_shard_size="1GB", token=None)
    assert keys(tmp_path / "adapter") == set()
    with pytest.raises(AdapterError, match=r"state_dict: it lacks base_model\.model\.\S*(embed_tokens|lm_head)"):
        model.save_pretrained(tmp_path / "x", state_dict=alone, save_embedding_layers=True)
    # As older scripts do: the model's state dict is that of its adapter.
    old = model.state_dict
    model.state_dict = lambda *_, **__: get_peft_model_state_dict(model, old())
    assert model.state_dict().keys() == wanted.keys()
    model.save_pretrained(tmp_path / "alpaca")
    assert keys(tmp_path / "alpaca") == EMBEDDINGS
