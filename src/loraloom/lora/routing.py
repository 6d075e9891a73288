"""Which rows of a batch belong to which slot, and which part of a layer's input belongs to which row.

One ``Route`` for a forward, shared by every layer. Slots are known here by name alone. Knows nothing of weights, of the
model, or of the layers that read the route: see ``lora.dispatch``.

A layer sees a tensor and not its origin. The shape [rows, length, dim] with the batch's length identifies the rows.
Other shapes do not: [rows · length, dim] may hold the rows one after another or interleaved, [n, dim] the tokens that
a router chose, or the patches of all images. These count only once a ``RowProbe`` has seen that a row's part of the
input holds, in the batch, the same values as for that row alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from loraloom.errors import AdapterError

_numbers = itertools.count(1)
#: In ``adapter_names``: the frozen model alone, as in PEFT.
BASE = "__base__"


@dataclass(frozen=True)
class Block:
    """The rows of one slot: ``start:stop`` in the route's order."""

    slot: str
    start: int
    stop: int


@dataclass(frozen=True)
class Route:
    """Either every row goes through all of ``active``, or each row through the slot of its block.

    ``rows``: the number of rows of the batch, 0 if unknown. ``blocks`` tile ``0..rows`` of the rows indexed by
    ``order``; ``inverse`` undoes that. Both are None if the rows are already ordered by slot.
    """

    active: tuple[str, ...] = ()
    rows: int = 0
    blocks: tuple[Block, ...] = ()
    #: an id of these blocks, quicker to compare
    number: int = 0
    #: the slot of each row, as given
    names: tuple[str, ...] = ()
    order: Tensor | None = field(default=None, compare=False)
    inverse: Tensor | None = field(default=None, compare=False)
    #: slot → the seed of its dropout in this forward; without one it is drawn from torch's generator
    seeds: Mapping[str, int] = field(default_factory=dict)
    #: order and inverse on the devices of layers, because a copy to a device synchronises
    _moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False)

    @classmethod
    def of_rows(cls, slots: Sequence[str], seeds: Mapping[str, int] | None = None) -> Route:
        """The route of a batch whose row ``i`` belongs to ``slots[i]``. ``seeds``: of the slots' dropout."""
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
        """Places of a row in the first dimension of ``x``, if all rows use the same slots."""
        return x.shape[0] // self.rows if self.rows and x.dim() and x.shape[0] % self.rows == 0 else 1

    def apply(self, x: Tensor, times: int, each: Callable[[str, Tensor, slice | Tensor], Tensor]) -> Tensor:
        """Call ``each(slot, rows of x, their index)`` for every block and restore the order of the results.

        ``x`` [rows · times, ...]: each row of the batch has ``times`` consecutive places.
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
        """``order`` and ``inverse`` of places, with ``times`` places for each row."""
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


class Unproven(AdapterError):
    """A layer's input cannot be divided among the batch's rows: the forward has to go adapter by adapter."""

    def __init__(self, site: str, shape: Iterable[int], rows: int) -> None:
        self.site = site
        super().__init__(
            f"adapter_names: {site} sees a tensor of shape {tuple(shape)} in a batch of {rows} rows, and nothing says "
            "which of it belongs to which row; call the model with the rows of one adapter at a time"
        )


@dataclass
class Batch:
    """The shapes of a forward's arguments."""

    rows: int
    #: (rows, length) of arguments whose first dimension is the batch's
    pairs: set[tuple[int, int]] = field(default_factory=set)
    #: every argument of two or more dimensions has the batch's rows first, so no other dimension leads in a layer
    only_rows: bool = True
    #: False if rows have different numbers of images, videos or sounds: their first dimension is not the batch's
    aligned: bool = True

    def note(self, arguments: Iterable[Any], media_tokens: Iterable[int] = ()) -> None:
        """Add the arguments of a forward. ``media_tokens``: ids that stand for parts of images and the like."""
        given = list(tensors(arguments))
        aligned = all(_media_by_row(given, token) for token in media_tokens)
        self.aligned = self.aligned and aligned
        for tensor in given:
            if tensor.dim() < 2 or tensor.shape[0] == 1 != self.rows:
                continue
            if tensor.shape[0] % self.rows or (tensor.dim() >= 4 and not aligned):
                self.only_rows = False
            else:
                self.pairs.add((tensor.shape[0], tensor.shape[1]))

    def certain(self, leading: torch.Size) -> bool:
        """Whether the shape alone shows that the first dimension is the batch's."""
        return len(leading) > 1 and leading[0] != leading[1] and tuple(leading[:2]) in self.pairs

    def plausible(self, places: int, per_row: int) -> bool:
        """Whether a layer that a probe saw with ``per_row`` places a row can have ``places`` in all for this batch."""
        if not self.aligned:
            return False
        counts = {rows for rows, _ in self.pairs} or {self.rows}
        if places in counts:
            return True
        if per_row == 1 or places % self.rows:
            return False
        return self.only_rows or places in {rows * length for rows, length in self.pairs}


class RowSites:
    """What probes have found about a model's sites (layers by name), and which slots cannot share a forward."""

    def __init__(self) -> None:
        self._proven: dict[str, int] = {}
        self.indivisible: frozenset[str] = frozenset()
        self.separate: set[frozenset[str]] = set()

    def places(self, site: str, leading: torch.Size, batch: Batch) -> int | None:
        """Places of a row of ``batch`` in the first dimension of the input of ``site``, None if unknown."""
        if not leading:
            return None
        proven = self._proven.get(site)
        known = batch.certain(leading) or (proven is not None and batch.plausible(leading[0], proven))
        return leading[0] // batch.rows if known else None

    def record(self, proven: Mapping[str, int], failed: Iterable[str]) -> None:
        self.indivisible = self.indivisible | {*failed}
        self._proven = {site: n for site, n in {**self._proven, **proven}.items() if site not in {*failed}}

    def may_share_forward(self, slots: Iterable[str]) -> bool:
        """Whether these may share a forward, as far as is known."""
        return not self.separate or frozenset(slots) not in self.separate

    def note_failure(self, site: str, slots: Iterable[str]) -> None:
        """``slots`` could not share a forward because of ``site``: permanently, if a probe has shown it."""
        if site in self.indivisible:
            self.separate.add(frozenset(slots))


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among ``values``, those inside lists and mappings as well."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def _media_by_row(given: list[Tensor], token: int) -> bool:
    """Whether image ``i`` belongs to row ``i``: each row's text has the same number of places for images."""
    for ids in given:
        if ids.dim() == 2 and not ids.is_floating_point() and not ids.is_meta:
            counts = (ids == token).sum(1)
            if counts.any():
                return bool((counts == counts[0]).all())
    return True


class RowProbe:
    """Three forwards of the frozen model: the first row alone, row ``other`` alone, and the batch of ``rows``.

    Every site calls ``observe`` in each of them. Afterwards ``proven`` maps each site whose input in the batch holds
    the two rows' values at the expected places to the number of places of a row.
    """

    #: A row in the batch must be this much nearer to itself alone than the two rows are to each other.
    NEARER = 0.1

    def __init__(self, rows: int, other: int) -> None:
        self._rows, self._other = rows, other
        self._seen: list[dict[str, list[Tensor]]] = [{}, {}]
        self._turn = 0
        self._calls: dict[str, int] = {}
        self.proven: dict[str, int] = {}
        self.failed: set[str] = set()

    def begin(self, number: int) -> RowProbe:
        self._turn = number
        return self

    def observe(self, site: str, x: Tensor) -> None:
        if self._turn < 2:
            self._seen[self._turn].setdefault(site, []).append(x.detach().clone())
            return
        call = self._calls[site] = self._calls.get(site, -1) + 1
        places = self._compare(site, call, x.detach())
        if places is None or self.proven.setdefault(site, places) != places:
            self.failed.add(site)

    def finish(self) -> None:
        for site in {*self._seen[0], *self._seen[1]}:
            if any(len(seen.get(site, ())) != self._calls.get(site, -1) + 1 for seen in self._seen):
                self.failed.add(site)
        for site in self.failed:
            self.proven.pop(site, None)

    def _compare(self, site: str, call: int, x: Tensor) -> int | None:
        """Places of a row in ``x``, or None if ``x`` does not hold the rows one after another."""
        try:
            first, last = (seen[site][call] for seen in self._seen)
        except (KeyError, IndexError):
            return None
        places, start = first.shape[0], self._other * first.shape[0]
        if first.shape != last.shape or x.shape != (self._rows * places, *first.shape[1:]):
            return None
        right = _distance(x[:places], first) + _distance(x[start : start + places], last)
        return places if right <= self.NEARER * _distance(first, last) and not torch.equal(first, last) else None


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().sum())


def leading(x: Tensor) -> torch.Size:
    """The batch dimensions of a module's input: all of ids, all but the last of floats."""
    return x.shape[:-1] if x.is_floating_point() else x.shape


def rows_of(value: Any, which: slice | Tensor, rows: int) -> Any:
    """Some rows of ``value``, an argument of a batch of ``rows``. Tensors with another first dimension stay whole."""
    if isinstance(value, Tensor):
        which = which.to(value.device) if isinstance(which, Tensor) else which
        return value[which] if value.dim() and value.shape[0] == rows else value
    if isinstance(value, Mapping):  # outputs of transformers are some, of a class of their own
        return type(value)(**{key: rows_of(one, which, rows) for key, one in value.items()})
    if isinstance(value, list | tuple) and any(isinstance(one, Tensor | list | tuple) for one in value):
        return type(value)(rows_of(one, which, rows) for one in value)
    return value
