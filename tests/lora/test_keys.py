"""Keys that other tools and older versions wrote are read as PEFT writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loraloom import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from loraloom.errors import AdapterError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.linear(self.table(x)))


CONFIG = LoraConfig(target_modules=["table", "linear"], modules_to_save=["head"], init_lora_weights=False)
X = torch.arange(6).view(2, 3)


def named(key: str, name: str) -> str:
    if "lora_embedding" in key:
        return f"{key}.{name}"
    if "lora_" in key:
        return key.replace(".weight", f".{name}.weight")
    return key.replace("head.", f"head.modules_to_save.{name}.")


@pytest.mark.parametrize("name", ["default", "my-own", "weight"])
def test_the_adapters_name_may_stand_inside_where_all_keys_agree(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    net = Net()
    start = {key: value.clone() for key, value in net.state_dict().items()}
    model = get_peft_model(net, CONFIG)
    wanted = model(X)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({named(key, name): value for key, value in tensors.items()}, path)
    assert load_peft_weights(tmp_path).keys() == tensors.keys()
    fresh = Net()
    fresh.load_state_dict(start)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(X), wanted)
    assert len(loaded.load_report.renamed) == len(tensors)


def test_keys_that_disagree_are_refused(tmp_path: Path) -> None:
    get_peft_model(Net(), CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({named(key, str(i)): value for i, (key, value) in enumerate(load_file(path).items())}, path)
    with pytest.raises(AdapterError, match="another base"):
        PeftModel.from_pretrained(Net(), tmp_path)


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**sizes, vocab_size=40))
    )


@pytest.mark.parametrize("table", ["transformers 5", "transformers 4"])
def test_adapters_of_older_image_text_models_follow_the_bases_renamings(tmp_path: Path, table: str) -> None:
    torch.manual_seed(0)
    base = llava()
    start = {key: value.clone() for key, value in base.state_dict().items()}
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base.eval(), config)
    ids = torch.arange(8).view(1, 8)
    wanted = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    old = {
        key.replace("model.model.language_model.", "model.language_model.model.")
        .replace("model.model.vision_tower.", "model.vision_tower."): value
        for key, value in load_file(path).items()
    }  # fmt: skip
    assert old.keys().isdisjoint(load_file(path))
    save_file(old, path)
    fresh = llava()
    fresh.load_state_dict(start)
    if table == "transformers 4":
        fresh._checkpoint_conversion_mapping = {
            "^language_model.model": "model.language_model", "^vision_tower": "model.vision_tower",
        }  # fmt: skip
    loaded = PeftModel.from_pretrained(fresh.eval(), tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, wanted)
    assert loaded.load_report.renamed.keys() == old.keys()
