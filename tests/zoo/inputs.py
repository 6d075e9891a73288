"""Rows for a model of any kind: random numbers in the shapes that its forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.images import with_pictures

ROWS = 3
LENGTHS = (8, 5, 7)
FIRST, LAST = 4, 59  # ordinary words, below the special tokens of shrink.py


def batch_of(model: nn.Module, kind: str, seed: int = 0, lengths: Sequence[int] = LENGTHS) -> dict[str, Tensor]:
    """The arguments of a forward, ``lengths`` tokens in each row of text, padded on the right."""
    source = torch.Generator().manual_seed(seed)
    config: Any = model.config
    known = inspect.signature(model.forward).parameters
    if kind == "vision":
        if hasattr(model, "get_image_features") and "input_ids" in known:
            text = {"input_ids": words(len(lengths), max(lengths), source)}
            return with_pictures(model, text, source) or text
        return pictures(model, len(lengths), source)
    if kind == "audio":
        return sound(model, len(lengths), source)
    if kind == "speech":
        out = sound(model, len(lengths), source)
        out["decoder_input_ids"] = words(len(lengths), 5, source)
        if channels := getattr(getattr(config, "decoder_config", None), "num_channels", None):
            out["decoder_input_ids"] = out["decoder_input_ids"][..., None].repeat(1, 1, channels)
        return {name: value for name, value in out.items() if name in known}
    out = {"input_ids": words(len(lengths), max(lengths), source)}
    if kind == "seq-cls" and getattr(config, "is_encoder_decoder", False):  # the last </s> is what is classified
        end = config.eos_token_id if isinstance(config.eos_token_id, int) else 2
        out["input_ids"][torch.arange(len(lengths)), torch.tensor(lengths) - 1] = end
    if len(set(lengths)) > 1:
        mask = torch.stack([torch.arange(max(lengths)) < length for length in lengths]).long()
        pad = getattr(config, "pad_token_id", 0) or 0
        out = {"input_ids": out["input_ids"].masked_fill(mask == 0, pad), "attention_mask": mask}
    if "visual_feats" in known:
        out["visual_feats"] = _real((len(lengths), 4, config.visual_feat_dim), model, source)
        out["visual_pos"] = _real((len(lengths), 4, config.visual_pos_dim), model, source)
    if "bbox" in known:
        width = 8 if type(model).__name__.startswith("Bros") else 4
        whole = width == 4 and config.model_type != "udop"
        out["bbox"] = torch.zeros(len(lengths), max(lengths), width, dtype=torch.long if whole else None)
    if "mm_token_type_ids" in known:
        out["mm_token_type_ids"] = torch.zeros_like(out["input_ids"])
    if kind == "image-text":
        return with_pictures(model, out, source) or out
    if kind == "seq2seq":
        out["decoder_input_ids"] = words(len(lengths), 5, source)
    return out


def words(rows: int, length: int, source: torch.Generator) -> Tensor:
    return torch.randint(FIRST, LAST, (rows, length), generator=source)


def _real(shape: Sequence[int], model: nn.Module, source: torch.Generator) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.randn(tuple(shape), generator=source, dtype=torch.float64).to(dtype)


def pictures(model: nn.Module, rows: int, source: torch.Generator) -> dict[str, Tensor]:
    config: Any = model.config
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    shape: tuple[int, ...] = (rows, channels, height, width)
    if frames := getattr(config, "num_frames", None):
        shape = (rows, frames, channels, height, width)
    if "spatial_shapes" in inspect.signature(model.forward).parameters:  # patches that are cut already
        patches = _real((rows, config.num_patches, channels * config.patch_size**2), model, source)
        side = int(config.num_patches**0.5)
        return {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(rows, config.num_patches, dtype=torch.long),
            "spatial_shapes": torch.tensor([[side, side]] * rows),
        }
    out = {"pixel_values": _real(shape, model, source)}
    if "input_ids" in inspect.signature(model.forward).parameters:
        out["input_ids"] = words(rows, 7, source)
    return out


def sound(model: nn.Module, rows: int, source: torch.Generator) -> dict[str, Tensor]:
    known = inspect.signature(model.forward).parameters
    config: Any = model.config
    if "input_values" in known and "spectrogram" not in type(config).model_type:
        return {"input_values": _real((rows, 4000), model, source)}
    if "input_features" not in known and "input_values" not in known:
        return {"input_ids": words(rows, 7, source)}
    if "input_values" in known:
        return {"input_values": _real((rows, config.max_length, config.num_mel_bins), model, source)}
    shapes = [(rows, *shape) for mel in MELS for shape in ((32, mel), (mel, 32), (mel, 2 * config_frames(config)))]
    return next((batch for shape in shapes if _heard(model, batch := {"input_features": _real(shape, model, source)})),
                {"input_features": _real((rows, 32, 16), model, source)})  # fmt: skip


MELS = (16, 32, 64, 80, 128, 160)


def config_frames(config: Any) -> int:
    """Frames of Whisper's kin, whose number is fixed, before they are halved."""
    return getattr(config, "max_source_positions", None) or 16


def _heard(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    """Whether the model takes sound of this shape: how many bands it hears stands under many names."""
    known = inspect.signature(model.forward).parameters
    batch = {**batch, "decoder_input_ids": torch.full((len(batch["input_features"]), 1), FIRST)} if (
        "decoder_input_ids" in known) else batch  # fmt: skip
    try:
        with torch.no_grad():
            model(**batch)
    except Exception:
        return False
    return True
