"""A small config of any model type: the type's own defaults with every size made small.

Fields are known by the ends of their names; what that rule gets wrong for a type stands in ``fields.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

WIDTH, HEADS, LAYERS, WORDS, EXPERTS, PIXELS, PATCH = 32, 4, 2, 96, 4, 16, 8

#: (pattern of a field's whole name, its small value). The first that matches counts; only numbers are made smaller.
SIZES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size|num_labels|num_channels|in_channels|.*_scale", 10**9),
    (r".*(_token_id|_token_index|_ids?|_idx|ignore_index)", 10**9),
    (r".*(vocab_size|vocabulary_size).*", WORDS),
    (r"(max_|n_|num_)?.*position(s|_embeddings?)(_size)?|n_ctx|max_(seq|sequence)_len.*|seq_length", 64),
    (r"(num_|n_)(mel_bins|mels)|mel_dim|input_feat_size|feature_size", 16),
    (
        r".*num_hidden_layers|n_layers?|num_layers|.*(encoder|decoder)_layers|layers|depth|num_blocks|.*_num_layers"
        r"|num_(encoder|decoder)_layers|.*num_blocks",
        LAYERS,
    ),
    (r".*(key_value_heads|kv_heads|num_kv_heads|multi_query_group_num)", 2),
    (r".*(attention_heads|_heads|n_heads?|_n_head)|heads", HEADS),
    (r".*(head_dim|_head_dim|head_size|d_kv|dim_head|kv_channels|attention_head_size|d_head|dim_per_head)", 8),
    (r".*(experts?_per_tok(en)?|moe_topk|moe_k|top_k_experts|num_selected_experts|top_k|num_experts_per_token)", 2),
    (r".*num_.*experts|.*n_(routed|shared)_experts|num_experts|.*n_routed_experts", EXPERTS),
    (r"n_group|topk_group|num_expert_group.*|.*first_k_dense.*|num_dense_layers|.*n_groups", 1),
    (r".*lora_rank|.*_rank", 8),
    (r".*(image_size|img_size|input_size|crop_size|resolution)", PIXELS),
    (r".*patch_size", PATCH),
    (r".*sliding_window.*|local_attention|.*chunk_size|.*window_size", 16),
    (r".*(intermediate|ffn|mlp|inner|feed_?forward|d_ff).*", 2 * WIDTH),
    (
        r".*(hidden|embed|d_model|width|projection|proj_|_proj|n_embd|emb_dim|dim|out_size|output_size|output_dim|channels).*",
        WIDTH,
    ),
    (r".*(num_codevectors|codebook_size|num_embeddings).*", 16),
    (r".*(num_queries|num_image_tokens|image_seq_length|num_query_tokens|num_latents|max_source_positions)", 8),
)
#: Rates of dropout and the like: a comparison needs models without chance.
CHANCE = re.compile(
    r".*(drop|pdrop|layerdrop|drop_path|dropout).*|mask_(time|feature)_prob|apply_spec_augment|.*jitter.*"
)
COUNTERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
NOT_GIVEN = ("transformers_version", "model_type", "architectures", "id2label", "label2id")
TOKENS = {"pad": 0, "bos": 1, "eos": 2, "sep": 2, "cls": 1, "mask": 3, "image": 90, "video": 91, "audio": 92,
          "boi": 93, "eoi": 94}  # fmt: skip


def shrunken(config: Any, fields: Mapping[str, Any]) -> Any:
    """A config of the same class with small sizes; ``fields`` (``name``, or ``sub_config.name``) override the rule."""
    own = {name: value for name, value in fields.items() if "." not in name}
    small = _given(config)
    for name, value in vars(config).items():  # those too that the class takes under another name
        inner = {key.partition(".")[2]: v for key, v in fields.items() if key.startswith(name + ".")}
        made = value if name.startswith("_") or name in NOT_GIVEN else small_field(name, value, inner)
        if made is not value:
            small[name] = made
    small |= own
    _choose_layers(config, small, own)
    _one_group(small, own)
    return type(config)(**small)


def _given(config: Any) -> dict[str, Any]:
    """What the class takes, as the default config has it."""
    known = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else vars(config)
    return {
        name: value
        for name, value in vars(config).items()
        if name in known and not name.startswith("_") and name not in NOT_GIVEN
    }


def _choose_layers(config: Any, small: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Lists with an entry for each layer keep those of one layer of each kind, two at least."""
    for counter in COUNTERS:
        count = getattr(config, counter, None)
        if not isinstance(count, int) or counter in own:
            continue
        lists = {
            name: list(value)
            for name, value in small.items()
            if isinstance(value, (list, tuple)) and len(value) == count and name not in own
        }
        if not lists:
            continue
        kinds = [value for value in lists.values() if all(isinstance(one, str) for one in value)]
        keys = [tuple(value[i] for value in kinds) for i in range(count)]
        chosen = [i for i, key in enumerate(keys) if key not in keys[:i]][:6]
        chosen = chosen if len(chosen) > 1 else list(range(min(LAYERS, count)))
        for name, value in lists.items():
            small[name] = [small_field(name, value[i], {}) for i in chosen]
        if counter in small:
            small[counter] = len(chosen)


def _one_group(small: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Latent attention: no groups, and a head is two parts."""
    if "qk_nope_head_dim" not in small:
        return
    whole = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    for name, value in (("num_key_value_heads", small.get("num_attention_heads")), ("qk_head_dim", whole)):
        if name in small and name not in own:
            small[name] = value


def small_field(name: str, value: Any, inner: Mapping[str, Any]) -> Any:
    if hasattr(value, "to_dict") and hasattr(value, "model_type"):
        return shrunken(value, inner)
    if CHANCE.fullmatch(name):
        return 0.0 if isinstance(value, float) else False if isinstance(value, bool) else value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: [2, 1, 1] if key == "mrope_section" else small_field(key, v, {}) for key, v in value.items()}
    if isinstance(value, (list, tuple)) and value and all(type(one) is int for one in value):
        return type(value)(_small_list(name, list(value)))
    return _small_number(name, value) if type(value) is int else value


def _small_number(name: str, value: int) -> int:
    if re.fullmatch(r".*(_token_id|_token_index)", name):
        return value if value < WORDS else _token(name)
    return min(value, next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), value))


def _small_list(name: str, value: list[int]) -> list[int]:
    if name.endswith("_token_id"):
        return [min(one, 2) for one in value]
    if name in ("depths", "num_blocks", "stage_numb_of_layers"):
        return [1] * len(value)
    if min(value) >= 8 and max(value) > 2 * WIDTH and re.fullmatch(r".*(size|dim|channel|width|filter).*", name):
        return [max(8, one * 2 * WIDTH // max(value) // 8 * 8) for one in value]
    return value


def _token(name: str) -> int:
    """A number below ``WORDS`` for a special token, another for each name."""
    for word, number in TOKENS.items():
        if name in (f"{word}_token_id", f"{word}_token_index"):
            return number
    return 60 + sum(map(ord, name)) % 29
