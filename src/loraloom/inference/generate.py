"""Texts that an adapter writes: in batches, always the likeliest token.

This file knows padding for generation, the model's room, and what a model in parts asks of processes that write texts
of different length. It does not know rows or metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from loraloom.data.batches import evaluation_batches
from loraloom.distributed.process_group import ProcessGroup
from loraloom.engine.pack import evaluating
from loraloom.inference import batching
from loraloom.lora.model import PeftModel
from loraloom.models.configs import has_decoder_and_encoder, tokens_at_most
from loraloom.models.fsdp import sharded, whole_but_layers


def generate(
    model: PeftModel,
    name: str,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """What the adapter ``name`` writes after each prompt, special tokens left out, in the order of the prompts.

    A prompt that leaves no room within what the model reads at once gives ``""``. With a model in parts (FSDP2) all
    processes come here together, each with prompts of its own, of which there may be none.
    """
    base: Any = model.get_base_model()
    device = next(model.parameters()).device
    both = has_decoder_and_encoder(base.config)
    limit = tokens_at_most(base.config)
    written = [""] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    rooms = [max_new_tokens if limit is None else min(max_new_tokens, limit - (1 if both else n)) for n in lengths]

    def ask(given: Sequence[Sequence[int]], room: int, **options: Any) -> Any:
        inputs = _padded(given, tokenizer.pad_token_id, left=not both)
        with _greedy(base, tokenizer, room):
            return model.generate(
                **{key: value.to(device) for key, value in inputs.items()}, **options, adapter_names=[name] * len(given)
            )

    def first_logits(rows: Sequence[int]) -> Tensor:
        given = [prompts[row] for row in rows]
        found: Tensor = ask(given, 1, return_dict_in_generate=True, output_logits=True).logits[0][0]
        return found

    def write(given: Sequence[Sequence[int]], room: int) -> list[str]:
        out = ask(given, room)
        width = max(map(len, given))
        new = out if both else out[:, width:]
        texts: list[str] = tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts

    parts = sharded(model)
    # What is gathered in inference mode could not be trained through afterwards.
    mode = torch.no_grad() if parts else torch.inference_mode()
    with evaluating(model, mode):
        fitting = [room >= 1 for room in rooms]
        able = [length for length, fits in zip(lengths, fitting, strict=True) if fits]
        places = [row for row, fits in enumerate(fitting) if fits]
        alike = not parts and batching.is_seen(
            base, "generation", able, lambda rows: first_logits([places[row] for row in rows])
        )
        batches = _batches(lengths, rooms, max_new_tokens, batch_size, alike=alike)
        company = _Company(model, name) if parts else None
        more = company.most(len(batches)) - len(batches) if company else 0
        with whole_but_layers(model) if parts else nullcontext():
            for rows, room in batches:
                with company.together() if company else nullcontext():
                    texts = write([prompts[row] for row in rows], room)
                for row, text in zip(rows, texts, strict=True):
                    written[row] = text
            for _ in range(more):  # other processes have more batches: a token that nobody reads
                assert company is not None
                with company.together():
                    write([[0]], 1)
    return written


def _batches(
    lengths: Sequence[int], rooms: Sequence[int], most: int, batch_size: int, *, alike: bool
) -> list[tuple[list[int], int]]:
    """Rows that are written together, each with the room that it has by itself; those without any are left out.

    So rows that have room for less than ``most`` tokens share a batch only with others as long.
    """
    found = []
    for full in (True, False):
        rows = [row for row, room in enumerate(rooms) if room >= 1 and (room == most) is full]
        cut = evaluation_batches([lengths[row] for row in rows], batch_size, alike=alike or not full)
        found += [([rows[place] for place in batch], rooms[rows[batch[0]]]) for batch in cut]
    return found


class _Company:
    """The processes that hold a model in parts, whose layers are gathered by all of them together.

    So each runs through the layers as often as the others. Texts end where they end: before each forward a process
    tells the others that it has something to write, and one that has nothing left goes along, with a token that nobody
    reads, until that is so of all.
    """

    def __init__(self, model: PeftModel, name: str) -> None:
        self._model, self._name, self._world = model, name, ProcessGroup.here()
        self._base: Any = model.get_base_model()
        both = has_decoder_and_encoder(self._base.config)
        token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        self._idle: dict[str, Any] = {"input_ids": token}
        # Parts can be called by themselves, as an encoder is below, only after the model was as a whole.
        if both:
            from transformers.modeling_outputs import BaseModelOutput

            read = self._forward(input_ids=token, decoder_input_ids=token).encoder_last_hidden_state
            # The encoder runs once for a batch, and the decoder alone for each token.
            self._idle = {"encoder_outputs": BaseModelOutput(last_hidden_state=read), "decoder_input_ids": token}
        else:
            self._forward(input_ids=token)

    def most(self, count: int) -> int:
        """The largest ``count`` of any process."""
        return max(self._world.gather(count))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it every forward of the model waits for the others'; at its end all have done what they had to."""
        hook = self._base.register_forward_pre_hook(self._more, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        while self._world.any(False):
            self._forward(**self._idle)

    def _more(self, module: Any, inputs: Any) -> None:
        self._world.any(True)

    def _forward(self, **inputs: Any) -> Any:
        with self._model.base_model.lora_routed([self._name]):
            return self._base(**inputs, use_cache=False)


def _padded(prompts: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> dict[str, torch.Tensor]:
    """A decoder continues from the end of a prompt, so all ends stand side by side: its padding is on the left."""
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
