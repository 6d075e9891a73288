"""Where a run takes place: its device, and the processes that share it, as torchrun or accelerate started them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from loraloom.errors import ConfigError
from loraloom.train.world import ALONE, World


@dataclass(frozen=True)
class Place:
    device: torch.device
    world: World


def find(device: str | None) -> Place:
    """The device of this process (``None``: an accelerator where there is one), and its world.

    Started by ``torchrun`` or ``accelerate launch``, the processes find each other here, through accelerate.

    Raises:
        ConfigError: no such device. Begins with ``device``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        wanted = _known(device) if device is not None else None
        state = PartialState(cpu=(wanted is not None and wanted.type == "cpu") or not torch.cuda.is_available())
        if wanted is not None and wanted.index is not None:
            raise ConfigError(f"device: each process has one of its own, found {device!r}; give its kind, or nothing")
        return Place(torch.device("cpu") if state.device.type == "cpu" else state.device, World.here())
    return Place(_known(device) if device is not None else _best(), ALONE)


def _best() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _known(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: must be cpu, cuda, cuda:1, mps or the like, found {name!r}") from None
    try:
        torch.empty(0, device=device)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"device: {name} cannot be used here ({said[0]}); leave it out, or give cpu") from None
    if device.type == "meta":
        raise ConfigError("device: meta holds no numbers, so nothing can be trained on it; give cpu or cuda")
    return device
