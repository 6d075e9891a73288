"""The frozen model sharded over the processes (FSDP2): layers are gathered as they run. Adapters are replicated.

The base has no gradients to reduce: its shards are gathered, used and freed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from loraloom.distributed.launch import Placement
from loraloom.lora.model import PeftModel
from loraloom.models.activation_checkpointing import repeated


def shard(model: PeftModel, place: Placement) -> None:
    """Shard the frozen tensors of ``model`` over the processes of ``place``; adapters go to its device.

    Collective. Before the call every process holds the whole model on the CPU.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    base: Any = model.get_base_model()
    kept = {p for name in model.peft_config for p in model.adapter_parameters(name).values()}
    # The loss reads the head's weight in chunks of tokens, and would gather it for each chunk.
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    kept |= set(head.parameters()) if head is not None else set()
    mesh = init_device_mesh(place.device.type, (place.world.size,))
    trunk = getattr(base, getattr(base, "base_model_prefix", ""), base)
    # By default FSDP2 does not reshard the root's modules after the forward.
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": kept, "reshard_after_forward": True}
    for layer in list(repeated(model)):
        fully_shard(layer, **options)
    fully_shard(trunk, **options)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(place.device)


def sharded(model: nn.Module) -> bool:
    """Whether the model is sharded."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def whole_but_layers(model: nn.Module) -> Iterator[None]:
    """Context in which modules outside the layers (embeddings, norms) stay gathered on every process.

    A part of the model, such as an encoder, can then be called by itself, and weights that every token needs are
    gathered once. Collective. The model must have run as a whole before.
    """
    from torch.distributed.fsdp import FSDPModule

    root = next(module for module in model.modules() if isinstance(module, FSDPModule))
    root.set_reshard_after_forward(False, recurse=False)
    root.unshard()
    try:
        yield
    finally:
        root.set_reshard_after_forward(True, recurse=False)
        root.reshard()
