"""Which rows of a batch belong to which slot: one ``Route`` for a forward, shared by every layer.

A slot is an adapter's place in the layers and is known here by its name alone. Knows nothing of weights, of the model,
or of who follows the route: see ``lora.dispatch``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from loraloom.errors import AdapterError

_numbers = itertools.count(1)
#: The name by which a row asks for the frozen model alone, as in PEFT.
BASE = "__base__"


@dataclass(frozen=True)
class Block:
    """The rows of one slot: ``start:stop`` after the rows were put in the route's order."""

    slot: str
    start: int
    stop: int


@dataclass(frozen=True)
class Route:
    """Either every row goes through all of ``active``, or each row through the slot of its block.

    ``rows`` counts the batch's rows, 0 where they are not known. With ``blocks``, these tile ``0..rows`` in the order
    given by ``order`` (None when the rows already lie slot by slot), and ``inverse`` leads back.
    """

    active: tuple[str, ...] = ()
    rows: int = 0
    blocks: tuple[Block, ...] = ()
    #: of these blocks, which are many to compare
    number: int = 0
    #: the slot of each row as given, from which the order follows
    names: tuple[str, ...] = ()
    order: Tensor | None = field(default=None, compare=False)
    inverse: Tensor | None = field(default=None, compare=False)
    #: slot → the seed of its dropout in this forward; without one it follows torch's generator
    seeds: Mapping[str, int] = field(default_factory=dict)
    #: order and inverse where layers have asked for them, since moving them waits for the device
    _moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    @classmethod
    def of_rows(cls, slots: Sequence[str], seeds: Mapping[str, int] | None = None) -> Route:
        """The route of a batch whose row ``i`` belongs to ``slots[i]``; ``seeds`` are those of the slots' dropout."""
        if not slots:
            raise AdapterError("adapter_names: found an empty list, give one name for each row of the batch")
        names = list(dict.fromkeys(slots))
        if len(names) == 1:
            return cls(active=() if names[0] == BASE else (names[0],), rows=len(slots), seeds=seeds or {})
        by_slot = {name: [row for row, slot in enumerate(slots) if slot == name] for name in names}
        order = [row for rows in by_slot.values() for row in rows]
        blocks, start = [], 0
        for name, rows in by_slot.items():
            blocks.append(Block(name, start, start + len(rows)))
            start += len(rows)
        if order == sorted(order):
            return cls((), len(slots), tuple(blocks), _numbered(tuple(blocks)), seeds=seeds or {})
        index, number = torch.tensor(order), _numbered(tuple(blocks))
        return cls((), len(slots), tuple(blocks), number, tuple(slots), index, index.argsort(), seeds or {})

    def slots(self) -> tuple[str, ...]:
        return self.active or tuple(block.slot for block in self.blocks if block.slot != BASE)

    def alone(self, slot: str) -> Route:
        """The route of the rows of ``slot`` by themselves."""
        rows = next((block.stop - block.start for block in self.blocks if block.slot == slot), 0)
        return Route(active=() if slot == BASE else (slot,), rows=rows, seeds=self.seeds)

    def times(self, x: Tensor) -> int:
        """How many places of the first dimension of ``x`` a row has, where all rows go the same way."""
        return x.shape[0] // self.rows if self.rows and x.dim() and x.shape[0] % self.rows == 0 else 1

    def apply(self, x: Tensor, times: int, each: Callable[[str, Tensor, slice | Tensor], Tensor]) -> Tensor:
        """Call ``each(slot, rows of x, where they are)`` for every block and put the results back in order.

        ``x`` is [rows · times, ...]: each row of the batch has ``times`` consecutive places.
        """
        order, inverse = self._places(times, x.device)
        if order is not None:
            x = x.index_select(0, order)
        parts = []
        for block in self.blocks:
            where = slice(block.start * times, block.stop * times)
            parts.append(each(block.slot, x[where], where if order is None else order[where]))
        out = torch.cat(parts)
        return out if inverse is None else out.index_select(0, inverse)

    def _places(self, times: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """``order`` and ``inverse`` of rows that have ``times`` places each."""
        if self.order is None or self.inverse is None:
            return None, None
        found = self._moved.get((times, device))
        if found is None:
            order, inverse = (_spread(index.to(device), times) for index in (self.order, self.inverse))
            found = self._moved[times, device] = order, inverse
        return found


@lru_cache(4096)
def _numbered(blocks: tuple[Block, ...]) -> int:
    return next(_numbers)


def _spread(index: Tensor, times: int) -> Tensor:
    if times == 1:
        return index
    return (index[:, None] * times + torch.arange(times, device=index.device)).flatten()
