"""The frozen model in parts, one on each process (FSDP2): layers are gathered as they run. Adapters stay whole.

Nothing of the base is trained, so nothing of it is reduced: its parts are gathered, used and let go of.
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
    """Spread the frozen tensors of ``model`` over the processes of ``place``; adapters go to its device.

    All processes hold the whole model on the CPU before, and come here together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    base: Any = model.get_base_model()
    kept = {p for name in model.peft_config for p in model.adapter_parameters(name).values()}
    # The loss reads the head's weight itself, a few tokens at a time; gathered for each it would only travel.
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    kept |= set(head.parameters()) if head is not None else set()
    mesh = init_device_mesh(place.device.type, (place.world.size,))
    trunk = getattr(base, getattr(base, "base_model_prefix", ""), base)
    # Without it what is first called would be taken for the last to be let go of, and kept.
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": kept, "reshard_after_forward": True}
    for layer in list(repeated(model)):
        fully_shard(layer, **options)
    fully_shard(trunk, **options)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(place.device)


def sharded(model: nn.Module) -> bool:
    """Whether it is in parts."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextmanager
def whole_but_layers(model: nn.Module) -> Iterator[None]:
    """For a while embeddings, norms and the like are whole on every process, and layers alone gathered as they run.

    Then a part of the model, such as an encoder, can be called by itself, and what every token needs is gathered once.
    The model has run as a whole before; all processes come here together.
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
