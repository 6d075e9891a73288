"""The processes that train together (usually one): sharding of rows, and collectives.

Every process holds the whole adapter and takes its share of the rows of every batch. Gradients are summed before the
step, so all adapters stay equal, and the result is that of one process with the whole batch. Knows torch.distributed,
no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from loraloom.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """``size`` processes; this one is ``rank``. Collectives must be called by all ranks, in the same order."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> ProcessGroup:
        """The group of torch.distributed if it is initialised; otherwise a group of this process."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main_process(self) -> bool:
        """True on rank 0, which writes files and logs."""
        return self.rank == 0

    def shard(self, rows: Sequence[T]) -> list[T]:
        """The rows of this rank."""
        return list(rows[self.rank :: self.size])

    def sum(self, tensor: Tensor) -> None:
        """All-reduce in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def total(self, value: float) -> float:
        """The sum of a number over all ranks."""
        if self.size == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self._device)
        self.sum(held)
        return float(held)

    def any(self, flag: bool) -> bool:
        """True if ``flag`` is true on any rank."""
        return flag if self.size == 1 else self.total(float(flag)) > 0

    def agree(self, flag: bool) -> bool:
        """The flag of rank 0, for decisions that depend on its clock."""
        return flag if self.size == 1 else self.total(float(flag and self.is_main_process)) > 0

    def main_process_first(self, act: Callable[[], object]) -> None:
        """Run ``act`` on rank 0 only, and fail on all ranks if it raises.

        Raises:
            InputError: rank 0 raised one.
        """
        problem: InputError | None = None
        if self.is_main_process:
            try:
                act()
            except InputError as error:
                problem = error
        if self.any(problem is not None):
            raise problem or InputError("rank 0 reports what is wrong")

    def gather(self, found: T) -> list[T]:
        """The objects of all ranks, in order of rank."""
        if self.size == 1:
            return [found]
        everyone: list[T] = [found] * self.size
        torch.distributed.all_gather_object(everyone, found)
        return everyone

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            torch.distributed.barrier()

    @property
    def _device(self) -> torch.device:
        nccl = torch.distributed.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


#: A single process.
SINGLE = ProcessGroup()
