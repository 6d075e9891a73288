"""Layers that read one tensor, such as the query, key and value projections: the first computes all of them at once.

Found while the model runs, not from a list of names: layers that are called in succession with the very same tensor are
computed together in later forwards, or one by one if that fails. Outputs have the same bits either way. Gradients are
summed in another order, so a loop that must be reproducible to the bit runs the model once before its first step.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from loraloom.lora.dropout import DropoutMask
from loraloom.lora.frozen import FrozenLinear
from loraloom.lora.functional import RANK_MULTIPLE, SlotGroup, Update, lora_projections
from loraloom.lora.routing import Route

#: Limit of padded ranks times tokens for a slot that shares a batched product with slots of higher rank. A separate
#: product costs more than 64 tokens of 48 ranks, and less than 512 of 16 (two cores, bfloat16).
_MAX_PADDING = 4096
#: The size of the cache of slot groups by route and shape.
_REMEMBERED = 4096


class Projection(Protocol):
    """A ``LoraLinear``, as far as this file uses it."""

    r: dict[str, int]
    variants: dict[str, Any]

    def factors(self, slot: str) -> tuple[Any, Any]: ...
    def dropout_mask(self, slot: str, times: int, frame: Any) -> DropoutMask | None: ...
    def has_dropout(self, slot: str) -> bool: ...
    def update_of(self, slot: str) -> Update: ...
    def fusable(self, x: Tensor, frame: Any) -> FrozenLinear | None: ...
    def shares_dropout(self, first: Any) -> bool: ...


class LayerGroups:
    """Layers that are computed together: the first reader of a tensor → the others. Immutable."""

    def __init__(self, members: Mapping[Any, tuple[Any, ...]] | None = None, ungroupable: frozenset[Any] = frozenset()):
        self.members, self._ungroupable = dict(members or {}), ungroupable

    def updated(self, pending: Mapping[tuple[Any, ...], bool]) -> LayerGroups:
        """The groups after ``pending``: layers → True if they read one tensor, False if grouping them was no use."""
        members, ungroupable = dict(self.members), set(self._ungroupable)
        for layers, together in pending.items():
            if together:
                first, *others = layers
                new = [one for one in others if one is not first and one not in ungroupable]
                members[first] = tuple(dict.fromkeys([*members.get(first, ()), *new]))
            else:
                ungroupable.update(layers)
                members = {first: tuple(o for o in others if o not in ungroupable) for first, others in members.items()}
        return LayerGroups(members, frozenset(ungroupable))


class InputTracker:
    """The tensor that layers read at present, in a forward or in a recomputation of a part of it."""

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None
        self._version: int | None = None
        self._region: Any = None
        self._regions = 0
        self._readers: list[Any] = []
        #: slot → the seed that was drawn for the dropout of its layers that read the tensor
        self.seeds: dict[str, int] = {}
        #: readers that computed it for themselves, in order
        self._computed: list[Any] = []
        #: what the first reader computed for the others, until they ask for it
        self._outputs: dict[Any, Tensor] = {}
        #: see ``LayerGroups.updated``
        self._pending: dict[tuple[Any, ...], bool] = {}

    def read(self, layer: object, x: Tensor) -> bool:
        """Note that ``layer`` reads ``x``. Returns whether the previous layer read the same tensor.

        A tensor counts as another one if it was modified in between, if the layer has read it already (activation
        checkpointing calls it again with the same object), or if it is read in another checkpointed region, since each
        region is recomputed by itself.
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
        self._close()
        if region is not self._region:
            self._region, self._regions = region, self._regions + 1
        self._tensor, self._version, self._readers = weakref.ref(x), version, [layer]
        return False

    @property
    def region(self) -> int | None:
        """The number of the current region of activation checkpointing, None outside."""
        return None if self._region is None else self._regions

    def project(self, layer: Projection, linear: FrozenLinear, x: Tensor, frame: Any, groups: SlotGroups) -> Tensor:
        """The output of ``layer``, around ``linear``, for ``x``: computed now, or already by the first reader of ``x``.

        ``frame``: the one that this tracker belongs to, see ``lora.dispatch``.
        """
        if self.read(layer, x) and (done := self._outputs.pop(layer, None)) is not None:
            return done
        together, frozen = [layer], [linear]
        if not self._computed and torch.is_grad_enabled():  # without a backward there is nothing to share
            for one in frame.plan.layer_groups.members.get(layer, ()):
                if (found := one.fusable(x, frame)) is not None and one.shares_dropout(layer):
                    together.append(one)
                    frozen.append(found)
        self._computed.append(layer)
        out = lora_projections(x, frozen, groups.of(frame, together, x))
        self._outputs.update(zip(together[1:], out[1:], strict=True))
        return out[0]

    def _close(self) -> None:
        """Record the readers of the last tensor."""
        if self._outputs:
            self._pending[tuple(self._outputs)] = False
        elif len(self._computed) > 1:
            self._pending[tuple(self._computed)] = True
        self.seeds, self._computed, self._outputs = {}, [], {}

    def pending_updates(self) -> dict[tuple[Any, ...], bool]:
        """What this forward found, for ``LayerGroups.updated``. Clears the tracker."""
        self._close()
        self._tensor, found, self._pending = None, self._pending, {}
        return found


class SlotGroups:
    """The slot groups of layers that are computed together, cached by route and shape."""

    def __init__(self) -> None:
        self._groups: dict[Any, list[tuple[int, int | None, list[str]]]] = {}

    def of(self, frame: Any, layers: Sequence[Projection], x: Tensor) -> list[SlotGroup]:
        route: Route = frame.plan.route
        if not route.blocks:
            places: Sequence[tuple[int, int | None, list[str]]] = [(0, None, [slot]) for slot in route.active]
        else:
            key = (route.number, tuple(layers), x.shape[:-1])
            found = self._groups.get(key)
            if found is None:
                if len(self._groups) >= _REMEMBERED:
                    self._groups.clear()
                found = self._groups[key] = group_slots(route, layers, x)
            places = found
        times = route.times(x)
        return [
            SlotGroup(start, stop, tuple([owners[0].dropout_mask(slot, times, frame) for slot in slots]), updates)
            for start, stop, slots in places
            if (owners := [one for one in layers if slots[0] in one.r])
            and (updates := tuple(tuple([one.update_of(s) for s in slots]) if one in owners else () for one in layers))
        ]


def group_slots(route: Route, layers: Sequence[Projection], x: Tensor) -> list[tuple[int, int | None, list[str]]]:
    """(start, stop, slots): adjacent blocks of the route that one batched product can compute.

    Their slots adapt the same of ``layers`` with one variant, have equal numbers of rows and similar ranks, and all or
    none have dropout, which rounds differently. ``start:stop`` are rows of ``x``; slots that adapt none are left out.
    """
    times = x.shape[0] // route.rows
    tokens = x.shape[:-1].numel() // route.rows
    found: list[tuple[int, int | None, list[str]]] = []
    last: tuple[Any, ...] = ()
    widest = 0
    for block in route.blocks:
        here = tuple(
            (one, one.factors(block.slot)[0].dtype, one.has_dropout(block.slot), one.variants.get(block.slot))
            for one in layers
            if block.slot in one.r
        )
        size = block.stop - block.start
        width = max([-(-one.r[block.slot] // RANK_MULTIPLE) * RANK_MULTIPLE for one, *_ in here], default=0)
        if here and last == (here, size, block.start) and tokens * size * abs(width - widest) <= _MAX_PADDING:
            start, _, slots = found[-1]
            found[-1] = (start, block.stop * times, [*slots, block.slot])
            widest = max(widest, width)
        elif here:
            found.append((block.start * times, block.stop * times, [block.slot]))
            widest = width
        last = (here, size, block.stop)
    return found
