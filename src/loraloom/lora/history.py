"""What a backward has to know of the forward that it repeats a part of: by which plan, with which dropout seeds.

The key is a number that autograd gives each node of its graph, counting up in each thread.
"""

from __future__ import annotations

import sys
import threading
import weakref
from bisect import bisect_right
from collections import deque
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

#: Forwards of one thread that are remembered for backwards to come, and calls of one layer in one of them.
_REMEMBERED, _CALLS = 1024, 256

_number = torch._C._autograd._get_sequence_nr


class SeedLog:
    """The dropout seeds that layers drew in checkpointed regions of a forward, for recomputations of it.

    All threads share torch's generator, so the state restored for a recomputation may be gone when a layer draws.
    """

    def __init__(self) -> None:
        #: (slot, layer) → (number of the next autograd node, region or None if without gradients, seed) of each call
        self._calls: dict[tuple[str, str], deque[tuple[int, int | None, int]]] = {}
        #: whether an adapted layer ran in such a region: else there is nothing to repeat
        self.regions = False

    def __len__(self) -> int:
        return len(self._calls)

    def write(self, slot: str, layer: str, region: int | None, seed: int) -> None:
        calls = self._calls.setdefault((slot, layer), deque(maxlen=_CALLS))
        calls.append((_number(), region, seed))

    def read(self, slot: str, layer: str, number: int, call: int) -> int | None:
        """The seed of the ``call``-th call of ``layer`` in the region that the node ``number`` asks to repeat.

        That is a node of the region, made after the layer was called. Or, where the region ran without gradients, the
        one node that stands for all of it, made before.
        """
        calls = self._calls.get((slot, layer), ())
        regions = [where for when, where, _ in calls if where is not None and when <= number]
        seeds = [
            seed
            for when, where, seed in calls
            if (where == regions[-1] if regions else where is None and when > number)
        ]
        return seeds[call] if call < len(seeds) else None


def _open_regions() -> int:
    """How many regions of reentrant checkpointing the caller is in: one at least, be it of another library."""
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None:
        frame = frame.f_back
        count += frame.f_code is CheckpointFunction.forward.__code__
    return max(count, 1)


class PlanHistory:
    """The plans of one thread in the order in which they began, by the sequence number of the next autograd node."""

    def __init__(self) -> None:
        self._notes: list[tuple[int, list[Any]]] = []
        #: where the last of them ends, if it does before another one begins
        self._end: int | None = None
        self.forgot = False
        self._thread = weakref.ref(threading.current_thread())

    @property
    def lives(self) -> bool:
        """Whether its thread has not ended."""
        thread = self._thread()
        return thread is not None and thread.is_alive()

    def note(self, plan: Any, begun: bool = False) -> list[Any]:
        """From here on it is this plan, unless the list that holds it is emptied: that may be done in any thread.

        Args:
            begun: it is a layer that notes it. Without gradients that layer is inside regions of reentrant
                checkpointing, whose nodes were made before.
        """
        number, held = _number(), [plan]
        if begun and not torch.is_grad_enabled():
            number = max(number - _open_regions(), self._notes[-1][0] if self._notes else 0)
        if self._end is not None and self._end < number:
            self._notes.append((self._end, []))
        self._end = None
        if self._notes and self._notes[-1][0] == number:
            self._notes[-1] = (number, held)
        else:
            self._notes.append((number, held))
        if len(self._notes) > 4 * _REMEMBERED:
            self._notes, self.forgot = self._notes[-2 * _REMEMBERED :], True
        return held

    def ends_after(self, nodes: int) -> None:
        """At most ``nodes`` further nodes belong to the last plan."""
        self._end = _number() + nodes

    def at(self, number: int) -> Any:
        notes, end = self._notes, self._end
        place = bisect_right(notes, number, key=lambda note: note[0])
        if place == len(notes) and end is not None and number >= end:
            return None
        return next(iter(tuple(notes[place - 1][1])), None) if place else None
