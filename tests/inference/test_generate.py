"""Promises of generation: what is written after a prompt does not depend on its batch, and is the adapter's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from loraloom import LoraConfig, PeftModel, TaskType, get_peft_model, tasks
from loraloom.distributed.launch import find
from loraloom.inference.generate import generate as generate_each
from loraloom.inference.session import Session
from loraloom.lora.routing import BASE
from loraloom.models.fsdp import shard, sharded
from loraloom.models.load import load_tokenizer

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
#: model type → its config, which are positions that are learnt, positions that rotate, and an encoder with a decoder
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24},
    "llama": {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 24},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 24},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 24,
             "decoder_start_token_id": 1, "forced_eos_token_id": 1},
}  # fmt: skip
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 4], [7, 7]]


@pytest.fixture
def tokenizer(decoder_folder: Path) -> Any:
    return load_tokenizer(str(decoder_folder))


def adapted(family: str, tokenizer: Any) -> PeftModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(family, **{**FAMILIES[family], "vocab_size": len(tokenizer), **tokens})
    seq2seq = config.is_encoder_decoder
    base = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_config(config).double()
    for p in base.parameters():
        p.data.normal_(std=0.3)
    task = TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.CAUSAL_LM
    made = LoraConfig(r=4, lora_alpha=16, task_type=task, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, made, adapter_name="a", seed=1)
    model.add_adapter("b", made, seed=2)
    return model


def generate(model: PeftModel, name: str, tokenizer: Any, prompts: list[list[int]], count: int, size: int) -> list[str]:
    session = Session(model=model, task=tasks.get("causal-lm"), tokenizer=tokenizer)
    return generate_each(session, [name] * len(prompts), prompts, count, size)


def alone(model: PeftModel, name: str, prompt: list[int], tokenizer: Any, count: int) -> str:
    """One prompt, without padding, one token after the other."""
    model.set_adapter(name)
    model.eval()
    ids, both = torch.tensor([prompt]), model.get_base_model().config.is_encoder_decoder  # type: ignore[union-attr]
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    text: str = tokenizer.decode(out[0, 0 if both else len(prompt) :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_prompts_text_is_the_same_in_any_batch_and_by_its_adapter(family: str, size: int, tokenizer: Any) -> None:
    model = adapted(family, tokenizer)
    for name in ("a", "b"):
        found = generate(model, name, tokenizer, PROMPTS, 6, size)
        assert found == [alone(model, name, prompt, tokenizer, 6) for prompt in PROMPTS]
    texts = {name: generate(model, name, tokenizer, PROMPTS, 6, 8) for name in ("a", "b", BASE)}
    assert texts["a"] != texts["b"]
    session = Session(model=model, task=tasks.get("causal-lm"), tokenizer=tokenizer)
    asked = [(name, row) for row in range(len(PROMPTS)) for name in texts]
    mixed = generate_each(session, [name for name, _ in asked], [PROMPTS[row] for _, row in asked], 6, size)
    assert mixed == [texts[name][row] for name, row in asked]


def test_a_prompt_that_leaves_no_room_gives_nothing_and_one_that_leaves_some_is_gone_on_with(tokenizer: Any) -> None:
    model = adapted("gpt2", tokenizer)
    found = generate(model, "a", tokenizer, [[5] * 24, [5] * 22, [6]], 10, 1)
    assert found[0] == ""
    assert found[1] == alone(model, "a", [5] * 22, tokenizer, 2)


def test_a_long_prompt_takes_no_room_from_those_in_its_batch(tokenizer: Any) -> None:
    model = adapted("llama", tokenizer)
    prompts = [[5] * 24, [6, 7], [8] * 22, [9] * 22, [5] * 17, [7] * 3]  # of 24 places
    together = generate(model, "a", tokenizer, prompts, 7, 8)
    assert together == [generate(model, "a", tokenizer, [prompt], 7, 8)[0] for prompt in prompts]
    assert [len(text.split()) for text in together] == [0, 7, 2, 2, 7, 7]


def test_what_the_folder_says_of_sampling_is_left_aside(tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    model = adapted("llama", tokenizer)
    plain = generate(model, "a", tokenizer, PROMPTS, 6, 4)
    own: Any = model.get_base_model().generation_config
    own.do_sample, own.temperature, own.top_k, own.repetition_penalty, own.max_length = True, 5.0, 50, 9.0, 3
    assert generate(model, "a", tokenizer, PROMPTS, 6, 4) == plain
    assert capfd.readouterr().err == ""


IN_PARTS = ("gpt2", "llama", "t5", "bart")
#: Rows that end early and late, batches that differ in number, a prompt at the last position that is learnt, and none.
SHARES = [
    ([[5, 6, 7], [8], [9, 10, 11, 12, 13, 4], [7, 7], [4]], [[5] * 22]),
    ([[5] * 24, [6, 6], [12]], []),
    ([], [[8, 9], [3] * 21, [10, 4]]),
]


@pytest.mark.slow
def test_two_processes_that_hold_a_model_in_parts_write_what_one_writes_and_train_on(
    tokenizer: Any, decoder_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, str(decoder_folder), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for family in IN_PARTS:
        model = adapted(family, tokenizer)
        texts = [[generate(model, "a", tokenizer, shares[rank], 10, 2) for shares in SHARES] for rank in range(2)]
        loss = step(model)
        for rank in range(2):
            found = json.loads((tmp_path / f"{family}-{rank}.json").read_bytes())
            assert found["texts"] == texts[rank], family
            assert found["loss"] == pytest.approx(loss, rel=1e-12), family


def step(model: PeftModel) -> float:
    """The loss of a few tokens after a step on them."""
    model.set_adapter("a")
    ids = torch.tensor([[5, 6, 7, 8]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for p in model.adapter_parameters("a").values():
            if p.grad is not None:
                p -= 0.1 * p.grad
                p.grad = None
        return float(model(input_ids=ids, labels=ids).loss)


def in_parts(tokenizer_folder: str, folder: Path) -> None:
    """What each of the two processes does."""
    tokenizer, place = load_tokenizer(tokenizer_folder), find("cpu")
    for family in IN_PARTS:
        model = adapted(family, tokenizer)
        shard(model, place)
        assert sharded(model)
        texts = [generate(model, "a", tokenizer, shares[place.world.rank], 10, 2) for shares in SHARES]
        found = {"texts": texts, "loss": step(model)}
        (folder / f"{family}-{place.world.rank}.json").write_text(json.dumps(found))
        place.world.barrier()


if __name__ == "__main__":
    in_parts(sys.argv[1], Path(sys.argv[2]))
