"""The processes that train together, of which there is mostly one: who has which rows, and what they add up.

Every process holds the whole adapter and takes its share of the rows of every batch; the gradients are summed before
the step, so that all stay the same, and the result is that of one process with the whole batch. Knows
torch.distributed, no model.
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
    """``size`` processes, this one being ``rank``. Every method is called by all of them, in the same order."""

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> ProcessGroup:
        """That of torch.distributed, where it was initialised; else this process alone."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def shard(self, rows: Sequence[T]) -> list[T]:
        """The rows of this process."""
        return list(rows[self.rank :: self.size])

    def sum(self, tensor: Tensor) -> None:
        """In place, over all processes."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)

    def total(self, value: float) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return value
        held = torch.tensor([value], dtype=torch.float64, device=self._device)
        self.sum(held)
        return float(held)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.size == 1 else self.total(float(flag)) > 0

    def agree(self, flag: bool) -> bool:
        """What the first process says, whose clock counts."""
        return flag if self.size == 1 else self.total(float(flag and self.is_main_process)) > 0

    def main_process_first(self, act: Callable[[], object]) -> None:
        """Let the first process ``act`` for all. What it raises, ends all of them.

        Raises:
            InputError: the first process did.
        """
        problem: InputError | None = None
        if self.is_main_process:
            try:
                act()
            except InputError as error:
                problem = error
        if self.any(problem is not None):
            raise problem or InputError("the first process says what is wrong")

    def gather(self, found: T) -> list[T]:
        """What each process found, in the order of their ranks."""
        if self.size == 1:
            return [found]
        everyone: list[T] = [found] * self.size
        torch.distributed.all_gather_object(everyone, found)
        return everyone

    def barrier(self) -> None:
        """For all others to come here."""
        if self.size > 1:
            torch.distributed.barrier()

    @property
    def _device(self) -> torch.device:
        nccl = torch.distributed.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


#: The usual one.
SINGLE = ProcessGroup()
