"""Which modules ``target_modules=None`` means, by the model type of a transformers config.

For types that PEFT knows the values are PEFT's (0.21), so that a config without targets means the same in both. The
others follow its habit: the query and value projections of every attention, or the fused projection that holds them.
"""

from __future__ import annotations

#: targets → the model types that have them. A string is a regular expression, as in ``LoraConfig.target_modules``.
_BY_TARGETS: dict[tuple[str, ...] | str, str] = {
    # Decoders with separate projections
    ("q_proj", "v_proj"): """
        llama llama4 llama4_text mistral mistral3 mixtral ministral gemma gemma2 gemma3 gemma3_text qwen2 qwen2_moe
        qwen3 qwen3_moe qwen3_next stablelm opt gptj gpt_neo gpt_oss glm glm4 glm4_moe granite granitemoe olmo olmo2
        olmo3 olmoe cohere cohere2 starcoder2 smollm3 phimoe nemotron exaone4 ernie4_5 minimax seed_oss helium
        apertus arcee bitnet hunyuan_v1_dense falcon_h1 jamba lfm2 biogpt xglm
        bart mbart pegasus marian m2m_100 blenderbot blenderbot-small whisper speech_to_text
        nomic_bert wav2vec2 hubert wavlm clip siglip siglip2 dinov3_vit llava paligemma idefics3 smolvlm""",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    r".*language_model\..*\.(q_proj|v_proj)": "gemma4",
    # Latent attention: the query may be one layer or two, keys and values share one
    ("q_proj", "q_b_proj", "kv_b_proj"): "deepseek_v2 deepseek_v3",
    # Fused projections
    ("c_attn",): "gpt2 gpt_bigcode",
    ("c_proj", "c_attn"): "btlm",
    ("query_key_value",): "bloom gpt_neox falcon RefinedWeb RefinedWebModel chatglm persimmon",
    ("qkv_proj",): "codegen phi3",
    ("Wqkv",): "mpt modernbert",
    ("in_proj",): "deberta",
    # State spaces and recurrences
    ("in_proj", "out_proj"): "bamba",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
    # Encoders
    ("query", "value"): """
        bert roberta xlm-roberta xlm-roberta-xl roberta-prelayernorm camembert electra layoutlm layoutlmv3 ernie esm
        albert rembert big_bird longformer roc_bert mobilebert convbert data2vec-text luke tapas splinter xmod blip""",
    ("query_proj", "value_proj"): "deberta-v2",
    ("q_lin", "v_lin"): "distilbert xlm",
    # Encoders and decoders of T5's kind
    ("q", "v"): "t5 mt5 umt5 longt5 switch_transformers mpnet",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("q_proj", "v_proj", "query", "value"): "led",
    # Images; called query and value in some versions of transformers
    ("query", "value", "q_proj", "v_proj"): "vit vit_mae deit beit dinov2 swin segformer",
    ("pwconv1", "pwconv2"): "convnext",
}

TARGET_MODULES: dict[str, tuple[str, ...] | str] = {
    model_type: targets for targets, types in _BY_TARGETS.items() for model_type in types.split()
}


def preset(model_type: str | None) -> tuple[str, ...] | str | None:
    """The usual targets of a model type, or None for one that is not in the table."""
    return TARGET_MODULES.get(model_type or "")
