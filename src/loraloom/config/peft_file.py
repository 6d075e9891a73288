"""An ``adapter_config.json`` as others wrote it: JSON that is safe to read, and fields that can mean nothing.

Knows no types and ranges: those are ``config.LoraConfig``'s. What it leaves out of the file's fields it returns as
notes, so that nothing is dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraloom.errors import ConfigError, short

#: ``peft_type`` of a folder that PEFT would read otherwise than loraloom: PEFT refuses a type that it does not know.
NOT_PEFT = "LORALOOM"
#: Bytes of the largest config that is read: PEFT's have about 1 KB, 100 KB with a name for every module of a model.
MAX_BYTES = 4_000_000

#: PEFT's options of loading that say how it works and not what comes of it.
HARMLESS = (
    "cache_dir", "device_map", "dtype", "force_download", "local_files_only", "low_cpu_mem_usage", "max_memory",
    "offload_buffers", "offload_dir", "offload_folder", "offload_index", "offload_state_dict", "proxies",
    "resume_download", "token", "torch_device", "torch_dtype", "trust_remote_code", "use_auth_token", "user_agent",
    "use_safetensors",
)  # fmt: skip
#: What names another adapter on a hub.
HUB_ONLY = ("revision", "repo_type", "repo_id")

#: Fields that say how a finished adapter began: what they did is in its tensors. (Starts that rewrite the base, such as
#: PiSSA and OLoRA, are refused instead: the adapter belongs to a base that is not in the folder.)
_BEGAN = ("eva_config", "loftq_config", "corda_config", "lora_ga_config")
#: Starts that leave the base alone, and the beginnings of those that rewrite it.
_STARTS = ("eva", "orthogonal", "mica")
_REWRITE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ConfigError: it cannot be read, is too large, is no JSON object, or holds what no config has.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path}: {path.stat().st_size:,} bytes, more than the {MAX_BYTES:,} that a config may have; "
                "is this an adapter folder?"
            )
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); is this an adapter folder?") from None
    return parse(text, source=str(path))


def parse(text: str, *, source: str) -> dict[str, Any]:
    """``text`` as a JSON object without repeated keys and numbers that no config has. ``source`` opens the errors."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in found:
            if key in out:
                raise ConfigError(f"{source}: {short(key)} is given twice; keep one")
            out[key] = value
        return out

    try:
        values = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except ConfigError:
        raise
    except ValueError:
        raise ConfigError(f"{source}: a number of more digits than any config has") from None
    except RecursionError:
        raise ConfigError(f"{source}: lists or objects inside each other deeper than any config has") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: must be a JSON object, found {type(values).__name__}")
    return values


def finished(values: Mapping[str, Any], known: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a trained adapter's config that mean something here, and a note for each that was left out.

    An unknown field that is null, false or empty says nothing, whichever version wrote it.
    """
    out, notes = dict(values), []
    if out.get("peft_type") == NOT_PEFT:
        notes.append(f"peft_type: {NOT_PEFT!r}, because PEFT would not find all of the adapter's tensors")
        out["peft_type"] = "LORA"
    names = set(known)
    for name in [name for name in out if name not in names]:
        if out[name] is None or out[name] is False or (not isinstance(out[name], int | float) and not out[name]):
            notes.append(f"{name}: unknown, and {out.pop(name)!r} says nothing")
    for name in ("fan_in_fan_out", "use_rslora", "inference_mode", "init_lora_weights", "bias", "lora_dropout"):
        if name in out and out[name] is None:
            notes.append(f"{name}: null, read as the default")
            del out[name]
    if out.get("layers_to_transform") == []:
        notes.append("layers_to_transform: empty, read as all layers")
        out["layers_to_transform"] = None
    start = out.get("init_lora_weights")
    if isinstance(start, str) and start in _STARTS:
        notes.append(f"init_lora_weights: {start!r} chose the start of an adapter that is trained now")
        out["init_lora_weights"] = True
    elif isinstance(start, str) and start.startswith(_REWRITE):
        raise ConfigError(
            f"init_lora_weights: {short(start)} rewrote weights of the base that this adapter belongs to, which the "
            "folder does not hold; PEFT's path_initial_model_for_weight_conversion saves it as a plain adapter"
        )
    if not out.get("use_qalora"):
        out.pop("qalora_group_size", None)
    if not out.get("megatron_config"):
        out.pop("megatron_core", None)
    for name in _BEGAN:
        if out.get(name):
            notes.append(f"{name}: chose the start of an adapter that is trained now")
            del out[name]
    return out, notes
