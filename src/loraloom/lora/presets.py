"""The modules that ``target_modules=None`` means: by the model type of a transformers config, or found in the model.

For types that PEFT (0.21) knows the values are PEFT's, so that a config without targets means the same in both. Others
follow the same rule: the query and value projections of every attention, or the fused projection that holds them.
``find_targets`` applies the rule to types that are not in the table.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from typing import Any

from torch import nn

#: targets → the model types that have them. A string is a regular expression, as in ``LoraConfig.target_modules``.
_BY_TARGETS: dict[tuple[str, ...] | str, str] = {
    # Decoders with separate projections
    ("q_proj", "v_proj"): """
        llama llama4 llama4_text mistral mistral3 mixtral ministral gemma gemma2 gemma3 gemma3_text qwen2 qwen2_moe
        qwen3 qwen3_moe qwen3_next stablelm opt gptj gpt_neo gpt_oss glm glm4 glm4_moe granite granitemoe olmo olmo2
        olmo3 olmoe cohere cohere2 starcoder2 smollm3 phimoe nemotron exaone4 ernie4_5 minimax seed_oss helium
        apertus arcee bitnet hunyuan_v1_dense falcon_h1 jamba lfm2 biogpt xglm
        bart mbart pegasus marian m2m_100 blenderbot blenderbot-small whisper speech_to_text
        nomic_bert wav2vec2 hubert clip siglip siglip2 dinov3_vit llava paligemma idefics3 smolvlm""",
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


# -- found in the model --------------------------------------------------------------------------------------------

#: Names of a projection to queries or values, or to them and the keys together; "kv_b_proj" is latent attention's.
_QUERY_VALUE = re.compile(
    r"(.*_)?(q|v|kv|query|queries|value|values|key_value|keys_values)(_b)?(_(proj|lin|linear|head|global|layer))?"
    r"|w[qv]|.*(qkv|query_key_value|c_attn).*"
)
_ATTENTION = re.compile(r".*(att|delta_?net|lstm|retention).*")
_READS_INPUT = re.compile("in_proj|linear_x")
_MIXER = re.compile(r".*(mixer|mamba|ssm|recurren|rwkv).*")


def find_targets(
    model: nn.Module, modules: dict[str, nn.Module], linear: Iterable[str], pointwise: Iterable[str], heads: set[str]
) -> list[str]:
    """The usual targets of a model whose type is not in the table: names among ``modules``, empty if there are none.

    Query and value projections of attention, in the text part of a composite model; without attention the input
    projections of state spaces or recurrences; without either the linear layers of the repeated blocks.

    Args:
        linear: names of the linear layers, which LoRA can adapt.
        pointwise: names of the convolutions that are linear layers over channels, used where no linear layer fits.
        heads: names of output layers.
    """
    text = _text_part(model, modules)
    rules: list[Callable[[str], bool]] = [
        lambda name: _lies_in(modules, name, _ATTENTION) and _fits(_QUERY_VALUE, name),
        lambda name: _lies_in(modules, name, _MIXER) and _fits(_READS_INPUT, name),
        lambda name: re.search(r"\.\d+\.", f".{name}") is not None,
    ]
    layers = [
        [name for name in able if name not in heads and not weight_is_read(model, modules, name)]
        for able in (linear, pointwise)
    ]
    for rule, usable in product(rules, layers):
        chosen = [name for name in usable if rule(name)]
        inside = [name for name in chosen if text is not None and name.startswith(text + ".")]
        if chosen:
            return inside or chosen
    return []


def _fits(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.fullmatch(name.rpartition(".")[2].lower()) is not None


def _lies_in(modules: dict[str, nn.Module], name: str, pattern: re.Pattern[str]) -> bool:
    """Whether the name or class of the parent of ``name``, or of the parent's parent, matches ``pattern``."""
    inner = name.rpartition(".")[0]
    around = [path for path in (inner, inner.rpartition(".")[0]) if path in modules]
    words = [word for path in around for word in (path.rpartition(".")[2], _class_name(modules[path]))]
    return any(pattern.fullmatch(word.lower()) for word in words)


def _class_name(module: nn.Module) -> str:
    """The class's name without the task at its end, such as "ForCausalLM", which says nothing about the module."""
    name = type(module).__name__
    return name.rpartition("For")[0] or name


def _text_part(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    """The name of the text model in a composite model."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    try:
        text = None if get is None else get()
    except ValueError:  # more than one, as where a text leads a decoder of music
        return None
    if text is None or text is config:
        return None
    return next((name for name, module in modules.items() if getattr(module, "config", None) is text), None)


def weight_is_read(model: nn.Module, modules: dict[str, nn.Module], name: str) -> bool:
    """Whether the parent of ``name`` multiplies with its weight and does not call it: an adapter would have no effect.

    Found in the source of the parent's class: WavLM's attention, Mamba's dt_proj (called only where it is quantised).
    """
    parent, _, leaf = name.rpartition(".")
    around: Any = type(modules.get(parent, model))
    source, weight = _source(around), rf"self\.{re.escape(leaf)}\.weight\b"
    read = re.search(rf"{weight}(?!\.(dtype|device|shape))", source) is not None
    return read and (f"self.{leaf}(" not in source or re.search(rf"{weight} @", source) is not None)


@cache
def _source(cls: Any) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # defined interactively
        return ""
