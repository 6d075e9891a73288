"""Pictures beside text: as many image tokens in each row as its picture has features, found by asking the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


def with_pictures(model: nn.Module, text: Batch, source: torch.Generator) -> Batch | None:
    """``text`` [rows, length] and a picture for each row, of unlike sizes where the model can; None if it fails."""
    for make in (_patches, _tiles, _squares):
        for batch in make(model, text, source):
            try:
                with torch.no_grad():
                    model(**batch)
            except Exception:
                continue
            return batch
    return None


def _real(shape: tuple[int, ...], model: nn.Module, source: torch.Generator) -> Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)


def _placed(model: nn.Module, text: Batch, counts: list[int]) -> Batch:
    """``counts[i]`` image tokens in front of row ``i``; shorter rows are padded on the right."""
    config: Any = model.config
    token = next(
        (v for n in ("image_token_id", "image_token_index", "media_placeholder_token_id")
         if isinstance(v := getattr(config, n, None), int)), 90)  # fmt: skip
    ids, mask = text["input_ids"], text.get("attention_mask", torch.ones_like(text["input_ids"]))
    width = max(counts) + ids.shape[1]
    start = getattr(config, "vision_start_token_id", None)
    out_ids = torch.zeros(len(ids), width + 1, dtype=ids.dtype)
    out_mask = torch.zeros_like(out_ids)
    for row, count in enumerate(counts):
        kept = ids[row][mask[row] > 0]
        first = torch.tensor([start if isinstance(start, int) else 5])
        line = torch.cat([first, torch.full((count,), token, dtype=ids.dtype), kept])
        out_ids[row, : len(line)], out_mask[row, : len(line)] = line, 1
    batch = {"input_ids": out_ids, "attention_mask": out_mask}
    known = inspect.signature(model.forward).parameters
    if "mm_token_type_ids" in known:
        batch["mm_token_type_ids"] = (out_ids == token).long()
    if "token_type_ids" in known:
        batch["token_type_ids"] = (out_ids == token).long()
    return batch


def _patches(model: nn.Module, text: Batch, source: torch.Generator) -> Iterator[Batch]:
    """Qwen's way: patches of all pictures in one list, and each picture's grid."""
    if "image_grid_thw" not in inspect.signature(model.forward).parameters:
        return
    vision: Any = getattr(model.config, "vision_config", model.config)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None) or 2
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    time = getattr(vision, "temporal_patch_size", None) or 1
    shapes = [(2, 2), (1, 2), (2, 1)][: len(text["input_ids"])]
    grid = torch.tensor([[1, h * merge, w * merge] for h, w in shapes])
    number = int(grid.prod(-1).sum())
    placed = _placed(model, text, [h * w for h, w in shapes])
    size = vision.patch_size
    for shape in ((number, channels * time * size * size), (number, channels, size, size)):
        yield {**placed, "pixel_values": _real(shape, model, source), "image_grid_thw": grid}


def _squares(model: nn.Module, text: Batch, source: torch.Generator) -> Iterator[Batch]:
    """LLaVA's way: a square picture for each row."""
    known = inspect.signature(model.forward).parameters
    if "pixel_values" not in known or "target_sizes" in known:  # with sizes alone that only its processor knows
        return
    vision: Any = getattr(model.config, "vision_config", None) or getattr(model.config, "encoder", model.config)
    sizes = [getattr(vision, "image_size", None), 32, 64, 16]
    for size in dict.fromkeys(s[0] if isinstance(s, (list, tuple)) else s for s in sizes if s):
        rows = len(text["input_ids"])
        for shape in ((rows, 3, size, size), (rows, 1, 3, size, size)):
            pixels = _real(shape, model, source)
            if "image_sizes" in known:
                yield from _counted(
                    model, text, {"pixel_values": pixels, "image_sizes": torch.tensor([[size, size]] * rows)}
                )
            yield from _counted(model, text, {"pixel_values": pixels})


def _tiles(model: nn.Module, text: Batch, source: torch.Generator) -> Iterator[Batch]:
    """Pictures that are cut already: [pictures, tiles, 3, size, size], or patches flattened by the caller."""
    known = inspect.signature(model.forward).parameters
    rows = len(text["input_ids"])
    if "flattened_patches" in known:
        vision: Any = model.config.vision_config
        patches = _real((rows, 4, vision.patch_embed_hidden_size + 2), model, source)
        patches[..., :2] = torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 1.0], [2.0, 2.0]]).to(patches.dtype)
        yield {"flattened_patches": patches, "decoder_input_ids": text["input_ids"]}
    if "qformer_input_ids" in known:
        size = model.config.vision_config.image_size
        shape = (rows, 3, size, size) if "video" not in model.config.model_type else (rows, 2, 3, size, size)
        pixels = {"pixel_values": _real(shape, model, source), "qformer_input_ids": text["input_ids"]}
        for count in (8, 16, model.config.num_query_tokens, 4 * model.config.num_query_tokens):
            yield {**_placed(model, text, [count] * rows), **pixels}


def _counted(model: nn.Module, text: Batch, pictures: Batch) -> Iterator[Batch]:
    rows = len(text["input_ids"])
    number = _features(model, pictures)
    if number is not None and number % rows == 0:
        yield {**_placed(model, text, [number // rows] * rows), **pictures}
    known = inspect.signature(model.forward).parameters
    if "input_ids" in known:
        length = text["input_ids"].shape[1]
        if "image_attention_mask" in known:
            text = {**text, "image_attention_mask": torch.ones(rows, length, 1, dtype=torch.long)}
        if "image_embeds_position_mask" in known:
            where = torch.zeros(rows, length, dtype=torch.long)
            where[:, : getattr(model.config, "latent_query_num", 0)] = 1
            text = {**text, "image_embeds_position_mask": where}
        yield {**text, **pictures}
    if "decoder_input_ids" in known:
        yield {**pictures, "decoder_input_ids": text["input_ids"]}


def _features(model: Any, pictures: Batch) -> int | None:
    """How many tokens the model's own pictures take, all rows together."""
    get: Callable[..., Any] | None = getattr(model, "get_image_features", None)
    if get is None:
        return None
    known = inspect.signature(get).parameters
    options = {"vision_feature_layer": model.config.vision_feature_layer} if hasattr(
        model.config, "vision_feature_layer") else {}  # fmt: skip
    given = {**pictures, **options}
    try:
        with torch.no_grad():
            found = get(**{k: v for k, v in given.items() if k in known})
    except Exception:
        return None
    found = getattr(found, "pooler_output", found)
    if isinstance(found, (list, tuple)):
        return sum(one.shape[:-1].numel() for one in found)
    return found.shape[:-1].numel() if isinstance(found, Tensor) else None
