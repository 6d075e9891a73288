"""Which rows of a batch belong to which slot: one ``Route`` for a forward, shared by every layer.

A slot is an adapter's place in the layers and is known here by its name alone. The model sets the route once;
the layers only read it. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraloom.errors import AdapterError
from loraloom.lora.initialize import seed_of
from loraloom.lora.inputs import Inputs

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

    ``rows`` is 0 for the first form. For the second, ``blocks`` tile ``0..rows`` in the order given by
    ``order`` (None when the rows already lie slot by slot), and ``inverse`` leads back.
    """

    active: tuple[str, ...] = ()
    rows: int = 0
    blocks: tuple[Block, ...] = ()
    order: Tensor | None = None
    inverse: Tensor | None = None
    #: slot → the seed of its dropout in this forward; without one it follows torch's generator
    seeds: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, slots: Sequence[str], seeds: Mapping[str, int] | None = None) -> Route:
        """The route of a batch whose row ``i`` belongs to ``slots[i]``; ``seeds`` are those of the slots' dropout."""
        if not slots:
            raise AdapterError("adapter_names: found an empty list, give one name for each row of the batch")
        names = list(dict.fromkeys(slots))
        if len(names) == 1:
            return cls(active=() if names[0] == BASE else (names[0],), seeds=seeds or {})
        by_slot = {name: [row for row, slot in enumerate(slots) if slot == name] for name in names}
        order = [row for rows in by_slot.values() for row in rows]
        blocks, start = [], 0
        for name, rows in by_slot.items():
            blocks.append(Block(name, start, start + len(rows)))
            start += len(rows)
        if order == sorted(order):
            return cls(rows=len(slots), blocks=tuple(blocks), seeds=seeds or {})
        index = torch.tensor(order)
        return cls((), len(slots), tuple(blocks), index, index.argsort(), seeds or {})

    def slots(self) -> tuple[str, ...]:
        return self.active or tuple(block.slot for block in self.blocks if block.slot != BASE)

    def apply(self, x: Tensor, each: Callable[[str, Tensor, slice | Tensor], Tensor]) -> Tensor:
        """Call ``each(slot, rows of x, where they are)`` for every block and put the results back in order.

        ``x`` is [rows, ...]; [1, ...] (broadcast over the batch, like position ids) is repeated, and
        [rows · k, ...] (a batch whose rows were flattened or expanded) gives each row k consecutive places.
        """
        if x.shape[0] == 1:
            x = x.expand(self.rows, *x.shape[1:])
        times, rest = divmod(x.shape[0], self.rows)
        if rest or not times:
            raise AdapterError(
                f"adapter_names: {self.rows} names for a batch in which a layer sees {x.shape[0]} rows; "
                "give one name for each row (layers that reorder rows cannot be routed)"
            )
        order, inverse = (
            self._spread(self.order, times, x.device),
            self._spread(self.inverse, times, x.device),
        )
        if order is not None:
            x = x.index_select(0, order)
        parts = []
        for block in self.blocks:
            where = slice(block.start * times, block.stop * times)
            parts.append(each(block.slot, x[where], where if order is None else order[where]))
        out = torch.cat(parts)
        return out if inverse is None else out.index_select(0, inverse)

    @staticmethod
    def _spread(index: Tensor | None, times: int, device: torch.device) -> Tensor | None:
        if index is None:
            return None
        index = index.to(device)
        return index if times == 1 else (index[:, None] * times + torch.arange(times, device=device)).flatten()


class Router:
    """The one place that holds the current route. Every layer of a model points at the same router."""

    def __init__(self) -> None:
        self.route = Route()
        self.inputs = Inputs()

    def dropout_seed(self, slot: str, name: str) -> int:
        """The seed of ``slot``'s dropout of the current input of ``name``, which is a layer or what its layers share.

        A seed that the route gives is followed by names alone: not by what other slots there are.
        """
        given = self.route.seeds.get(slot)
        if given is not None:
            return seed_of(given, name)
        seed = self.inputs.seeds.get(slot)
        if seed is None:
            # Torch's generator is what gradient checkpointing puts back before it runs a forward again.
            seed = self.inputs.seeds[slot] = int(torch.randint(2**63 - 1, ()))
        return seed

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Follow ``route`` for a while; the earlier one comes back whatever happens."""
        before, self.route = self.route, route
        try:
            yield
        finally:
            self.route = before
