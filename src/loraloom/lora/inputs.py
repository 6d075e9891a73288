"""Layers that read one tensor, such as the query, key and value projections: the first computes for all of them.

Found from the model as it runs and not from a list of names: layers that were called one after another with the very
same tensor are computed together the next time. Whenever that turns out not to fit, they are computed one by one.
Answers have the same bits either way. Gradients are summed in another order, so a loop that is to repeat to the bit
lets the model run once before its first step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraloom.lora.functional import RANKS, Lane, lora_projections

if TYPE_CHECKING:
    from loraloom.lora.layers import LoraLinear
    from loraloom.lora.route import Route

#: Zeros that a slot may be filled up with to be computed beside others of greater rank, times its tokens. A product of
#: its own costs more than 64 tokens of 48 ranks, and less than 512 of 16 (two cores, bfloat16).
_WASTE = 4096
#: Routes and shapes for which it is remembered who lies side by side.
_PLACES = 4096


class Inputs:
    """The tensor that layers read at the moment, and what was learned of who reads together."""

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None
        self._version: int | None = None
        #: slot → the seed that was drawn for the dropout of its layers that read the tensor
        self.seeds: dict[str, int] = {}
        #: layers that read the tensor and computed it for themselves, in order
        self._readers: list[LoraLinear] = []
        #: what the first reader computed for the others, until they ask for it
        self._ready: dict[LoraLinear, Tensor] = {}
        self._followers: dict[LoraLinear, list[LoraLinear]] = {}
        self._apart: set[LoraLinear] = set()
        #: what was noted and is not in use yet: layers → what to do with them
        self._lessons: dict[tuple[LoraLinear, ...], Callable[..., None]] = {}
        #: which slots lie side by side, for the routes and shapes seen lately
        self._places: dict[Any, list[tuple[int, int | None, list[str]]]] = {}
        #: the graphs that wait for their backward and were made meanwhile
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def __reduce__(self) -> tuple[Any, ...]:
        return Inputs, ()  # a copy of the model learns for itself

    def project(self, layer: LoraLinear, x: Tensor) -> Tensor:
        """What ``layer`` makes of ``x`` on the current route, computed now or already by the first reader of ``x``."""
        if self.read(x):
            done = self._ready.pop(layer, None)
            if done is not None:
                return done
        together = [layer]
        if not self._readers and torch.is_grad_enabled():  # without a backward there is nothing to share
            together += [one for one in self._followers.get(layer, ()) if one.fits(x) and one.shares_dropout(layer)]
        self._readers.append(layer)
        out = lora_projections(x, [one.frozen for one in together], self._lanes(together, x))
        self._ready.update(zip(together[1:], out[1:], strict=True))
        if len(self._readers) > 1 and out[0].grad_fn is not None:
            self._graphs.add(out[0].grad_fn)
        return out[0]

    def _lanes(self, layers: Sequence[LoraLinear], x: Tensor) -> list[Lane]:
        """Who of the current route adapts which of ``layers``, for which rows of ``x``."""
        route = layers[0].router.route
        if not route.blocks:
            places: Sequence[tuple[int, int | None, list[str]]] = [(0, None, [slot]) for slot in route.active]
        else:
            key = (route.blocks, tuple(layers), x.shape[:-1])
            found = self._places.get(key)
            if found is None:
                if len(self._places) >= _PLACES:
                    self._places.clear()
                found = self._places[key] = side_by_side(route, layers, x)
            places = found
        return [
            Lane(start, stop, tuple([owners[0].dropped(slot) for slot in slots]), updates)
            for start, stop, slots in places
            if (owners := [one for one in layers if slots[0] in one.r])
            and (updates := tuple(tuple([one.update_of(s) for s in slots]) if one in owners else () for one in layers))
        ]

    def read(self, x: Tensor) -> bool:
        """Note that a layer reads ``x``; whether the layer before it read the same."""
        version = None if x.is_inference() else x._version
        if self._tensor is not None and self._tensor() is x and self._version == version:
            return True
        self._note()
        self._tensor, self._version = weakref.ref(x), version
        return False

    def _note(self) -> None:
        """The readers of the last tensor are known now."""
        if self._ready:
            self._lessons[tuple(self._ready)] = self._part
        elif len(self._readers) > 1:
            self._lessons[tuple(self._readers)] = self._join
        self.seeds, self._readers, self._ready = {}, [], {}

    def learn(self) -> None:
        """Use what was noted, between one forward of the model and the next.

        Not while a graph waits that was made without it: gradient checkpointing runs such a forward again, and must
        find it as it was.
        """
        self._note()
        if self._lessons and not self._graphs:
            for layers, lesson in self._lessons.items():
                lesson(*layers)
            self._lessons = {}

    def forget(self) -> None:
        """Begin anew: the model has other layers."""
        self.__init__()  # type: ignore[misc]

    def _join(self, first: LoraLinear, *others: LoraLinear) -> None:
        known = self._followers.setdefault(first, [])
        known += [one for one in others if one is not first and one not in known and one not in self._apart]

    def _part(self, *layers: LoraLinear) -> None:
        """They were computed in vain."""
        self._apart.update(layers)
        for followers in self._followers.values():
            followers[:] = [one for one in followers if one not in self._apart]


def side_by_side(route: Route, layers: Sequence[LoraLinear], x: Tensor) -> list[tuple[int, int | None, list[str]]]:
    """(start, stop, slots): the neighbours of the route that can be computed side by side.

    They adapt the same of ``layers``, have equally many rows and ranks not far apart, and all have dropout or none has,
    which is rounded differently. Places are rows of ``x``; slots that adapt none of the layers are left out.
    """
    times = x.shape[0] // route.rows
    tokens = x.shape[:-1].numel() // route.rows
    found: list[tuple[int, int | None, list[str]]] = []
    last: tuple[Any, ...] = ()
    widest = 0
    for block in route.blocks:
        here = tuple(
            (one, one.factors(block.slot)[0].dtype, getattr(one.lora_dropout[block.slot], "p", 0.0) > 0)
            for one in layers
            if block.slot in one.r
        )
        size = block.stop - block.start
        width = max([-(-one.r[block.slot] // RANKS) * RANKS for one, *_ in here], default=0)
        if here and last == (here, size, block.start) and tokens * size * abs(width - widest) <= _WASTE:
            start, _, slots = found[-1]
            found[-1] = (start, block.stop * times, [*slots, block.slot])
            widest = max(widest, width)
        elif here:
            found.append((block.start * times, block.stop * times, [block.slot]))
            widest = width
        last = (here, size, block.stop)
    return found
