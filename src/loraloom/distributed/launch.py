"""The device of a run, and the processes that torchrun, accelerate or MPI started for it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from loraloom.distributed.process_group import SINGLE, ProcessGroup
from loraloom.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    device: torch.device
    world: ProcessGroup


def find(device: str | None) -> Placement:
    """The device of this process (``None``: an accelerator if any), and its process group.

    Initialises the process group through accelerate if ``torchrun``, ``accelerate launch`` or MPI started several
    processes.

    Raises:
        ConfigError: no such device, or no group can be formed. Begins with ``device``.
    """
    if device is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):  # accelerate launch --cpu
        device = "cpu"
    if (size := started()) > 1:
        if "MASTER_ADDR" not in os.environ:
            raise ConfigError(
                f"device: MPI started {size} processes without an address to meet at; set MASTER_ADDR to the "
                "address of the machine of rank 0 (127.0.0.1 for a single machine)"
            )
        from accelerate import PartialState

        wanted = _known(device) if device is not None else None
        state = PartialState(cpu=(wanted is not None and wanted.type == "cpu") or not torch.cuda.is_available())
        if wanted is not None and wanted.index is not None:
            raise ConfigError(
                f"device: each process has its own, found {device!r}; give only the kind, such as cuda, or leave it out"
            )
        world = ProcessGroup.here()
        if world.size != size:  # each would train separately, into the same folder
            raise ConfigError(
                f"device: MPI started {size} processes, which can form a group only on a CPU; give cpu, or start them "
                "with torchrun"
            )
        return Placement(torch.device("cpu") if state.device.type == "cpu" else state.device, world)
    return Placement(_known(device) if device is not None else _best(), SINGLE)


#: Environment variables of torchrun and of the implementations of MPI.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def started() -> int:
    """Number of processes that were started, including this one."""
    return _told(_SIZES, 1)


def rank() -> int:
    """Rank of this process, known before the process group is initialised."""
    return _told(_RANKS, 0)


def _told(names: tuple[str, ...], otherwise: int) -> int:
    found = (os.environ.get(name, "") for name in names)
    return next((int(value) for value in found if value.isdigit()), otherwise)


def single_process_warning() -> str:
    """A warning if ``accelerate launch`` was given several processes and started one, as on a CPU; otherwise empty.

    It then sets the address of a process group, but no number of processes.
    """
    alone = started() == 1 and "WORLD_SIZE" not in os.environ
    if not alone or not {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return ""
    return (
        "accelerate launch started only one process: on a CPU it ignores --num_processes; for several, give it "
        "--multi_gpu, which works on a CPU too, or use torchrun --nproc-per-node"
    )


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
