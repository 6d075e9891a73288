"""Tiny models with random weights under the hub names that PEFT's tests load, in a hub cache of their own.

``serve()`` comes before anything imports huggingface_hub; ``fill()`` builds the models, in some seconds. A test that
relies on what such a model has learned fails here, and a name that is not in ``MODELS`` is as missing as ever.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_COMMIT = "0" * 40
_TOKENS = 1024
_DECODER: dict[str, Any] = {
    "vocab_size": _TOKENS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# Padding ends as generating does: the tests take the ends of rows off by that.
_GROUPED: dict[str, Any] = {**_DECODER, "num_key_value_heads": 2, "pad_token_id": 2}
_EXPERTS: dict[str, Any] = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}
_OPT: dict[str, Any] = {**_DECODER, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 5, "pad_token_id": 2}
_GPT2: dict[str, Any] = {"vocab_size": _TOKENS, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 128,
                         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_T5: dict[str, Any] = {"vocab_size": _TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4,
                       "relative_attention_num_buckets": 8, "decoder_start_token_id": 0}  # fmt: skip
_BART: dict[str, Any] = {"vocab_size": _TOKENS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
                         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 4,
                         "decoder_ffn_dim": 4, "max_position_embeddings": 128}  # fmt: skip
_LM, _CLS, _SEQ2SEQ, _BARE = (
    "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForSeq2SeqLM", "AutoModel"
)  # fmt: skip
#: name on the hub → (model type, the auto class, fields of its config)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base-uncased": ("bert", _CLS, _DECODER),
    "facebook/opt-125m": ("opt", _LM, _OPT),
    "google/flan-t5-base": ("t5", _SEQ2SEQ, _T5),
    "google/flan-t5-small": ("t5", _SEQ2SEQ, _T5),
    "gpt2": ("gpt2", _LM, _GPT2),
    "hf-internal-testing/Mixtral-tiny": ("mixtral", _LM, _EXPERTS),
    "hf-internal-testing/tiny-random-BertModel": ("bert", _BARE, _DECODER),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("gemma3_text", _LM, {**_GROUPED, "head_dim": 4}),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", _LM, _GROUPED),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", _LM, {**_GROUPED, "head_dim": 4}),
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", _LM, _GPT2),
    "peft-internal-testing/opt-125m": (
        "opt", _LM, {**_OPT, "hidden_size": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 12}
    ),
    "peft-internal-testing/tiny-clip-text-2": ("clip_text_model", _BARE, _DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", _LM, _GROUPED),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("bart", _SEQ2SEQ, _BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("bert", _CLS, _DECODER),
    "peft-internal-testing/tiny-random-BertModel": ("bert", _BARE, _DECODER),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "bloom", _LM, {"vocab_size": _TOKENS, "hidden_size": 32, "n_layer": 5, "n_head": 4}
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("deberta", _BARE, _DECODER),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("deberta-v2", _BARE, _DECODER),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", _LM, _GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("gptj", _LM, {**_GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("gpt_neox", _LM, _DECODER),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("llama", _LM, _GROUPED),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", _LM, _OPT),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "resnet", "AutoModelForImageClassification",
        {"embedding_size": 10, "hidden_sizes": [10, 20, 30, 40], "depths": [1, 1, 2, 1]},
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("roberta", _CLS, _DECODER),
    "peft-internal-testing/tiny-random-RobertaModel": ("roberta", _BARE, _DECODER),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("t5", _SEQ2SEQ, _T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("t5", _SEQ2SEQ, _T5),
    "peft-internal-testing/tiny-random-gpt2": ("gpt2", _LM, _GPT2),
    "peft-internal-testing/tiny-random-t5": ("t5", _SEQ2SEQ, _T5),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("gpt_oss", _LM, _EXPERTS),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "llama4_text", _LM, {**_EXPERTS, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1}
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": ("llama", _CLS, _GROUPED),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("qwen3", _LM, {**_GROUPED, "head_dim": 4}),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": (
        "qwen3_moe", _LM,
        {**_GROUPED, "head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", _LM, _GROUPED),
}  # fmt: skip


def serve() -> Path:
    """Give huggingface_hub an empty cache, which is removed when the process ends."""
    cache = Path(tempfile.mkdtemp(prefix="peft-suite-hub-"))
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["HF_HUB_CACHE"] = str(cache)
    return cache


def fill(cache: Path) -> None:
    """Build every model of ``MODELS`` and a tokenizer of bytes beside it."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = _tokenizer()
    with torch.random.fork_rng():
        for name, (kind, auto, fields) in MODELS.items():
            repository = cache / f"models--{name.replace('/', '--')}"
            folder = repository / "snapshots" / _COMMIT
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text(_COMMIT, encoding="utf-8")
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(kind, **fields)
            getattr(transformers, auto).from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
