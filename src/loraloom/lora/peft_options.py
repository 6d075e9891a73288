"""PEFT's options that loraloom does not have: those without an effect are accepted, the others refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from loraloom.config.lora import LoraConfig
from loraloom.config.peft_file import HARMLESS, HUB_ONLY
from loraloom.errors import ConfigError, nearest

#: Options of saving that change nothing here: accelerate's and the hub's.
SAVING = (
    *("create_pr", "commit_message", "is_main_process", "max_shard_size", "private", "save_function", "token"),
    "variant",
)
#: Options of loading.
LOADING = ("key_mapping", "subfolder", "strict", "config", *HARMLESS)
_REFUSED = {
    "mixed": "loraloom has LoRA alone, so there is nothing to mix; leave it out",
    "ephemeral_gpu_offload": "only DoRA uses it, which loraloom does not have; leave it out",
    "ignore_mismatched_sizes": "a tensor of another shape cannot be used; leave it out",
    "path_initial_model_for_weight_conversion": (
        "loraloom has no start that rewrites the base, so there is nothing to convert; leave it out"
    ),
    "push_to_hub": "loraloom opens no connection; save_pretrained, and upload the folder with `hf upload`",
    **dict.fromkeys(
        HUB_ONLY, "chooses among files of a hub, and loraloom reads folders alone; fetch that one into a folder"
    ),
}


def check_options(options: Mapping[str, object], known: tuple[str, ...] = LOADING) -> None:
    """Raise ConfigError for an option that is refused, or neither among ``known`` nor PEFT's."""
    for name, value in options.items():
        if name in _REFUSED and value:
            raise ConfigError(f"{name}: {_REFUSED[name]}")
        if name not in (*_REFUSED, *known):
            raise ConfigError(f"{name}: loraloom has no such option{nearest(name, known)}")


def check_config(config: object) -> None:
    """Raise ConfigError if it is no config of loraloom."""
    if isinstance(config, LoraConfig):
        return
    kind = type(config)
    if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
        raise ConfigError(
            f"peft_config: must be loraloom's LoraConfig, found {kind.__module__.partition('.')[0]}'s {kind.__name__}; "
            "LoraConfig.from_dict(theirs.to_dict()) makes one of it"
        )
    raise ConfigError(f"peft_config: must be a loraloom.LoraConfig, found {kind.__name__}")
