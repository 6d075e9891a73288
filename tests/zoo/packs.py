"""Three adapters of unlike rank, dropout and row lengths that train in a ``Pack``, and each alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.cell import Cell, fill
from zoo.compare import Differs, distance, gradients, outputs
from zoo.inputs import batch_of

#: adapter → (rank, dropout, lengths of its rows, seed of its dropout)
PACKED = {"a": (4, 0.0, (9, 9), 11), "b": (8, 0.3, (5,), 22), "c": (2, 0.1, (7, 7), 33)}


def ignores_padding(cell: Cell) -> bool:
    """Whether a row answers alike with padding behind it: a property of the model, not of adapters."""
    short = batch_of(cell._base, cell.kind, lengths=(5,))
    padded = {k: v for k, v in short.items() if k != "attention_mask"}
    pad = getattr(cell._base.config, "pad_token_id", 0) or 0
    padded["input_ids"] = torch.nn.functional.pad(short["input_ids"], (0, 4), value=pad)
    padded["attention_mask"] = torch.nn.functional.pad(torch.ones_like(short["input_ids"]), (0, 4))
    try:
        a, b = outputs(cell._base, short), outputs(cell._base, padded)
    except Exception:
        return False
    if a.shape != b.shape:
        b = b[:, : a.shape[1]]
    return distance(b, a) < 1e-6


def packed_batch(cell: Cell, name: str, even: bool) -> dict[str, Tensor]:
    _, _, lengths, seed = PACKED[name]
    if even:
        lengths = tuple(8 for _ in lengths)
    batch = batch_of(cell._base, cell.kind, seed=seed, lengths=lengths)
    source = torch.Generator().manual_seed(seed)
    shape = batch["input_ids"].shape
    classes = max(2, getattr(cell._base.config, "num_labels", 2))
    batch["labels"] = {
        "causal": lambda: batch["input_ids"].clone(),
        "seq-cls": lambda: torch.randint(0, classes, shape[:1], generator=source),
        "token-cls": lambda: torch.randint(0, classes, shape, generator=source),
        "question-answering": lambda: torch.randint(0, min(lengths), (shape[0], 2), generator=source),
        "seq2seq": lambda: torch.randint(4, 59, (shape[0], 5), generator=source),
    }[cell.kind]()
    batch.pop("decoder_input_ids", None) if cell.kind == "seq2seq" else None
    return batch


def trained(cell: Cell, batches: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[float, dict[str, Tensor]]]:
    import loraloom

    configs = {
        name: loraloom.LoraConfig(**{**cell.fields, "r": PACKED[name][0], "lora_dropout": PACKED[name][1]})
        for name in batches
    }
    packed = loraloom.Pack(cell.base(), configs, seeds={name: PACKED[name][3] for name in batches})
    for name in batches:
        fill(loraloom.get_peft_model_state_dict(packed.model, name), cell.strength, salt=name)
    losses = packed.backward(batches, dropout_seeds={name: PACKED[name][3] for name in batches})
    if not all(abs(loss) < float("inf") for loss in losses.values()):
        raise Differs(f"losses {losses}")
    return {name: (losses[name], gradients(packed.parameters_of(name))) for name in batches}
