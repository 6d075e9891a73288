"""Texts that adapters write: in batches, by greedy decoding.

Knows padding for generation, the model's limit, and how processes that hold a sharded model write texts of different
lengths. Does not know rows or metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from loraloom.data.batches import evaluation_batches
from loraloom.distributed.process_group import ProcessGroup
from loraloom.inference import batching
from loraloom.inference.session import Session
from loraloom.lora.model import PeftModel
from loraloom.lora.routing import BASE
from loraloom.models.configs import has_decoder_and_encoder, tokens_at_most
from loraloom.models.fsdp import sharded, whole_but_layers


def generate(
    session: Session,
    adapters: Sequence[str],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """What ``adapters[i]`` writes after ``prompts[i]``, special tokens left out, in the order of the prompts.

    A prompt that leaves no room within the model's limit gives ``""``. With a sharded model (FSDP2) all processes call
    this together, each with other prompts, perhaps none.
    """
    model, tokenizer, base = session.model, session.tokenizer, cast(Any, session.base)
    both = has_decoder_and_encoder(base.config)
    limit = tokens_at_most(base.config)
    written = [""] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    rooms = [max_new_tokens if limit is None else min(max_new_tokens, limit - (1 if both else n)) for n in lengths]

    def ask(names: Sequence[str], given: Sequence[Sequence[int]], room: int, **options: Any) -> Any:
        inputs = _padded(given, tokenizer.pad_token_id, left=not both)
        with _greedy(base, tokenizer, room):
            return model.generate(
                **{key: value.to(session.device) for key, value in inputs.items()}, **options, adapter_names=list(names)
            )

    def first_logits(rows: Sequence[int]) -> Tensor:
        names, given = [adapters[rows[0]]] * len(rows), [prompts[row] for row in rows]
        found: Tensor = ask(names, given, 1, return_dict_in_generate=True, output_logits=True).logits[0][0]
        return found

    parts = sharded(model)
    with session.evaluating():
        places = [row for row, room in enumerate(rooms) if room >= 1]
        alike = not parts and batching.is_seen(
            base, "generation", [lengths[row] for row in places], lambda rows: first_logits([places[r] for r in rows])
        )
        batches = _batches(lengths, rooms, max_new_tokens, batch_size, alike=alike)
        company = _Company(model) if parts else None
        more = company.most(len(batches)) - len(batches) if company else 0
        with whole_but_layers(model) if parts else nullcontext():
            for rows, room in batches:
                given = [prompts[row] for row in rows]
                with company.together() if company else nullcontext():
                    out = ask([adapters[row] for row in rows], given, room)
                new = out if both else out[:, max(map(len, given)) :]
                for row, text in zip(rows, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                    written[row] = text
            for _ in range(more):  # other processes have more batches: a token that nobody reads
                assert company is not None
                with company.together():
                    ask([BASE], [[0]], 1)
    return written


def _batches(
    lengths: Sequence[int], rooms: Sequence[int], most: int, batch_size: int, *, alike: bool
) -> list[tuple[list[int], int]]:
    """Rows of one batch, with the number of tokens that each has room for; rows without room are left out.

    Rows with room for less than ``most`` tokens share a batch only with others of the same length.
    """
    found = []
    for full in (True, False):
        rows = [row for row, room in enumerate(rooms) if room >= 1 and (room == most) is full]
        cut = evaluation_batches([lengths[row] for row in rows], batch_size, alike=alike or not full)
        found += [([rows[place] for place in batch], rooms[rows[batch[0]]]) for batch in cut]
    return found


class _Company:
    """The processes that hold a sharded model, whose layers all of them gather together.

    So each process has to run the layers as often as the others, though its texts may be shorter. Before each forward a
    process signals that it still writes. A process that is done runs a token that nobody reads, until all are done.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model, self._world = model, ProcessGroup.here()
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
        """Context in which every forward waits for those of the other processes; at its end all are done."""
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
        with self._model.base_model.lora_routed([BASE]):
            return self._base(**inputs, use_cache=False)


def _padded(prompts: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> dict[str, torch.Tensor]:
    """The batch of ``prompts``, padded on the ``left`` for a decoder, which continues from the end of each."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if left else slice(0, len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def _greedy(base: Any, tokenizer: Any, room: int) -> Iterator[None]:
    """Context with a generation config for greedy decoding that keeps the model's start and end tokens alone.

    The model's own config is put aside: transformers takes what the given one leaves open from it.
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
