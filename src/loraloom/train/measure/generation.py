"""Texts that an adapter writes: in batches, always the likeliest token.

This file knows padding for generation and the model's room. It does not know rows or metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from loraloom.data.batches import evaluation_batches
from loraloom.lora.model import PeftModel
from loraloom.train.pack import evaluating
from loraloom.train.start.load import tokens_at_most


def generate(
    model: PeftModel,
    name: str,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """What the adapter ``name`` writes after each prompt, special tokens left out, in the order of the prompts.

    A prompt that leaves no room within what the model reads at once gives ``""``.
    """
    base: Any = model.get_base_model()
    device = next(model.parameters()).device
    both = bool(getattr(base.config, "is_encoder_decoder", False))
    limit = tokens_at_most(base.config)
    written = [""] * len(prompts)
    with evaluating(model, torch.inference_mode()):
        for rows in evaluation_batches([len(prompt) for prompt in prompts], batch_size):
            width = len(prompts[rows[0]])
            room = max_new_tokens if limit is None else min(max_new_tokens, limit - (1 if both else width))
            if room < 1:
                continue
            inputs = _padded([prompts[row] for row in rows], tokenizer.pad_token_id, left=not both)
            with _greedy(base, tokenizer, room):
                out = model.generate(
                    **{key: value.to(device) for key, value in inputs.items()}, adapter_names=[name] * len(rows)
                )
            texts = tokenizer.batch_decode(out if both else out[:, width:], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                written[row] = text
    return written


def _padded(prompts: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> dict[str, torch.Tensor]:
    """A decoder goes on from a prompt's end, so all ends are to stand side by side: its padding is on the left."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def _greedy(base: Any, tokenizer: Any, room: int) -> Iterator[None]:
    """The model's own tokens to begin and end with, and nothing else of its taste, for a while.

    Its own config is put aside: what another leaves open would be taken from it.
    """
    from transformers import GenerationConfig

    own = base.generation_config
    ends = {int(end) for end in [*_list(own.eos_token_id), *_list(tokenizer.eos_token_id)]}
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=room,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends) or None,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=own.decoder_start_token_id,
    )
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        setattr(config, name, getattr(own, name, None))
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own


def _list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
