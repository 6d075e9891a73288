"""Layers that read one tensor, such as the query, key and value projections: the first computes for all of them.

Found from the model as it runs and not from a list of names: layers that were called one after another with the very
same tensor are computed together in later forwards. Whenever that turns out not to fit, they are computed one by one.
Answers have the same bits either way. Gradients are summed in another order, so a loop that is to repeat to the bit
lets the model run once before its first step.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from loraloom.lora.dropout import Dropped
from loraloom.lora.frozen import FrozenLinear
from loraloom.lora.functional import RANKS, SlotGroup, Update, lora_projections
from loraloom.lora.routing import Route

#: Zeros that a slot may be filled up with to be computed beside others of greater rank, times its tokens. A product of
#: its own costs more than 64 tokens of 48 ranks, and less than 512 of 16 (two cores, bfloat16).
_WASTE = 4096
#: Routes and shapes for which it is remembered who lies side by side.
_PLACES = 4096


class Projection(Protocol):
    """What this file needs of a linear layer."""

    r: dict[str, int]
    variants: dict[str, Any]

    def factors(self, slot: str) -> tuple[Any, Any]: ...
    def dropped(self, slot: str, times: int, frame: Any) -> Dropped | None: ...
    def drops(self, slot: str) -> bool: ...
    def update_of(self, slot: str) -> Update: ...
    def fusable(self, x: Tensor, frame: Any) -> FrozenLinear | None: ...
    def shares_dropout(self, first: Any) -> bool: ...


class Groups:
    """Who is computed together, as far as it is known: first reader → the others. Never changed, only replaced."""

    def __init__(self, followers: Mapping[Any, tuple[Any, ...]] | None = None, apart: frozenset[Any] = frozenset()):
        self.followers, self._apart = dict(followers or {}), apart

    def learned(self, lessons: Mapping[tuple[Any, ...], bool]) -> Groups:
        """What is known after ``lessons``: layers → whether they read together, or were computed together in vain."""
        followers, apart = dict(self.followers), set(self._apart)
        for layers, together in lessons.items():
            if together:
                first, *others = layers
                known = followers.get(first, ())
                new = [one for one in others if one is not first and one not in known and one not in apart]
                followers[first] = (*known, *new)
            else:
                apart.update(layers)
                followers = {first: tuple(o for o in others if o not in apart) for first, others in followers.items()}
        return Groups(followers, frozenset(apart))


class Reading:
    """The tensor that the layers of one forward, or of one repetition of a part of it, read at the moment."""

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None
        self._version: int | None = None
        self._region: Any = None
        self._regions = 0
        self._readers: list[Any] = []
        #: slot → the seed that was drawn for the dropout of its layers that read the tensor
        self.seeds: dict[str, int] = {}
        #: readers that computed it for themselves, in order
        self._alone: list[Any] = []
        #: what the first reader computed for the others, until they ask for it
        self._ready: dict[Any, Tensor] = {}
        #: layers → True: they read one tensor; False: they were computed together in vain
        self._lessons: dict[tuple[Any, ...], bool] = {}

    def read(self, layer: object, x: Tensor) -> bool:
        """Note that ``layer`` reads ``x``; whether the layer before it read the same.

        Not the same is a tensor that was changed since, one that the layer itself has read already (activation
        checkpointing calls it again with the very same object), and one read in another checkpointed region, since
        each is repeated by itself.
        """
        version = None if x.is_inference() else x._version
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        region = None if hooks is None else hooks[0]
        if (
            self._tensor is not None
            and self._tensor() is x
            and self._version == version
            and self._region is region
            and layer not in self._readers
        ):
            self._readers.append(layer)
            return True
        self._finish()
        if region is not self._region:
            self._region, self._regions = region, self._regions + 1
        self._tensor, self._version, self._readers = weakref.ref(x), version, [layer]
        return False

    @property
    def region(self) -> int | None:
        """The number of the region of activation checkpointing that the layers run in."""
        return None if self._region is None else self._regions

    def project(self, layer: Projection, linear: FrozenLinear, x: Tensor, frame: Any, lanes: Lanes) -> Tensor:
        """What ``layer``, around ``linear``, makes of ``x``, computed now or already by the first reader of ``x``.

        ``frame`` is the one that this is the reading of: see ``lora.dispatch``.
        """
        if self.read(layer, x):
            done = self._ready.pop(layer, None)
            if done is not None:
                return done
        together, frozen = [layer], [linear]
        if not self._alone and torch.is_grad_enabled():  # without a backward there is nothing to share
            followers = frame.plan.groups.followers.get(layer, ())
            for one in followers:
                if (found := one.fusable(x, frame)) is not None and one.shares_dropout(layer):
                    together.append(one)
                    frozen.append(found)
        self._alone.append(layer)
        out = lora_projections(x, frozen, lanes.of(frame, together, x))
        self._ready.update(zip(together[1:], out[1:], strict=True))
        return out[0]

    def _finish(self) -> None:
        """The readers of the last tensor are known now."""
        if self._ready:
            self._lessons[tuple(self._ready)] = False
        elif len(self._alone) > 1:
            self._lessons[tuple(self._alone)] = True
        self.seeds, self._alone, self._ready = {}, [], {}

    def lessons(self) -> dict[tuple[Any, ...], bool]:
        """What is to be learned, once: nothing is kept."""
        self._finish()
        self._tensor, found, self._lessons = None, self._lessons, {}
        return found


class Lanes:
    """Who of a route adapts which of some layers, for which places of their input. Remembers what it found lately."""

    def __init__(self) -> None:
        self._places: dict[Any, list[tuple[int, int | None, list[str]]]] = {}

    def of(self, frame: Any, layers: Sequence[Projection], x: Tensor) -> list[SlotGroup]:
        route: Route = frame.plan.route
        if not route.blocks:
            places: Sequence[tuple[int, int | None, list[str]]] = [(0, None, [slot]) for slot in route.active]
        else:
            key = (route.number, tuple(layers), x.shape[:-1])
            found = self._places.get(key)
            if found is None:
                if len(self._places) >= _PLACES:
                    self._places.clear()
                found = self._places[key] = side_by_side(route, layers, x)
            places = found
        times = route.times(x)
        return [
            SlotGroup(start, stop, tuple([owners[0].dropped(slot, times, frame) for slot in slots]), updates)
            for start, stop, slots in places
            if (owners := [one for one in layers if slots[0] in one.r])
            and (updates := tuple(tuple([one.update_of(s) for s in slots]) if one in owners else () for one in layers))
        ]


def side_by_side(route: Route, layers: Sequence[Projection], x: Tensor) -> list[tuple[int, int | None, list[str]]]:
    """(start, stop, slots): the neighbours of the route that can be computed side by side.

    They adapt the same of ``layers``, by one variant, have equally many rows and ranks not far apart, and all have
    dropout or none has, which is rounded differently. Places are rows of ``x``; slots that adapt none of the layers
    are left out.
    """
    times = x.shape[0] // route.rows
    tokens = x.shape[:-1].numel() // route.rows
    found: list[tuple[int, int | None, list[str]]] = []
    last: tuple[Any, ...] = ()
    widest = 0
    for block in route.blocks:
        here = tuple(
            (one, one.factors(block.slot)[0].dtype, one.drops(block.slot), one.variants.get(block.slot))
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
