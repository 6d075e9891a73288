"""A row is classified in a batch as it is alone, also where the model's own config and its tokenizer disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loraloom import LoraConfig, get_peft_model
from loraloom.data.example import Example
from loraloom.errors import ModelError
from loraloom.models.configs import levels
from loraloom.models.load import load_base, load_tokenizer
from loraloom.tasks import TASKS
from loraloom.tasks.objective import Objective

SMALL = {"vocab_size": 21, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
T5 = {"vocab_size": 21, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
#: model type → its config; the tokenizer ends a text with 2 and, but for models with an encoder, pads with it
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gpt2": {"vocab_size": 21, "n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0},
    "opt": {**SMALL, "word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 64},
    "gemma3": {"text_config": {**SMALL, "num_hidden_layers": 2}, "vision_config": VISION, "mm_tokens_per_image": 4},
    "xlnet": {"vocab_size": 21, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24, "pad_token_id": 0},
    "t5": {**T5, "decoder_start_token_id": 0, "eos_token_id": 1},
    "t5gemma": {"encoder": SMALL, "decoder": SMALL, "pad_token_id": 0, "eos_token_id": 1},
}


def folder(kind: str, tokenizer: Path, to: Path) -> tuple[str, Any]:
    """A classifier of ``kind`` with the tokenizer of another folder."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **FAMILIES[kind])
    AutoModelForSequenceClassification.from_config(config).save_pretrained(to)
    found = load_tokenizer(str(tokenizer))
    if kind.startswith("t5"):
        found.pad_token = "<unk>"
    found.save_pretrained(to)
    return str(to), found


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_row_is_classified_in_a_batch_as_alone(kind: str, decoder_folder: Path, tmp_path: Path) -> None:
    name, tokenizer = folder(kind, decoder_folder, tmp_path)
    said: list[str] = []
    base, _ = load_base(name, TASKS["seq-cls"], "float32", ["a", "b"], tokenizer=tokenizer, log=said.append)
    assert all(one.pad_token_id == tokenizer.pad_token_id for one in levels(base.config) if hasattr(one, "vocab_size"))
    assert any("the tokenizer's is used" in text for text in said) is (kind != "t5gemma")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")).eval()
    objective = Objective(model, TASKS["seq-cls"])
    end = [2] if kind.startswith("t5") else []
    # The last row but one ends in what its folder's config pads with, the last one in the tokenizer's end token.
    texts = [[1, 5, 9], [1, 7, 8, 9, 10, 11, 12, 13], [1, 6, 5, 0], [1, 9, 7, 2]]
    rows = [Example([*text[: len(text) - len(end)], *end], 0, None) for text in texts]

    def logits(chosen: list[Example]) -> torch.Tensor:
        inputs = TASKS["seq-cls"].collate(chosen, tokenizer.pad_token_id)
        inputs.pop("labels")
        with torch.no_grad():
            return objective.forward(inputs)

    alone = torch.cat([logits([row]) for row in rows])
    torch.testing.assert_close(logits(rows), alone, rtol=1e-4, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-4


def test_a_reader_that_finds_the_end_token_needs_another_to_pad_with(decoder_folder: Path, tmp_path: Path) -> None:
    name, tokenizer = folder("t5", decoder_folder, tmp_path)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(ModelError, match=r"pads with the end token \('</s>'\), by which t5 finds where a text ends"):
        load_base(name, TASKS["seq-cls"], "float32", ["a", "b"], tokenizer=tokenizer)
