"""Which plan and which dropout seeds a recomputed part of a forward had.

The key is the sequence number of autograd's nodes, which counts up in each thread.
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

#: Forwards of one thread that are remembered for later backwards, and calls of one layer in one forward.
_REMEMBERED, _CALLS = 1024, 256

_number = torch._C._autograd._get_sequence_nr


class SeedLog:
    """The dropout seeds that layers drew in checkpointed regions of a forward, for recomputations of it.

    All threads share torch's generator, so another thread may advance it between its restoration and a layer's draw.
    """

    def __init__(self) -> None:
        #: (slot, layer) → (number of the next autograd node, region or None if without gradients, seed) of each call
        self._calls: dict[tuple[str, str], deque[tuple[int, int | None, int]]] = {}
        #: whether an adapted layer ran in such a region: otherwise nothing is recomputed
        self.regions = False

    def __len__(self) -> int:
        return len(self._calls)

    def write(self, slot: str, layer: str, region: int | None, seed: int) -> None:
        calls = self._calls.setdefault((slot, layer), deque(maxlen=_CALLS))
        calls.append((_number(), region, seed))

    def read(self, slot: str, layer: str, number: int, call: int) -> int | None:
        """The seed of the ``call``-th call of ``layer`` in the region that the node ``number`` recomputes.

        The node belongs to the region and was created after the call; or, if the region ran without gradients, it is
        the one node for the whole region, created before the call.
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
    """How many nested regions of reentrant checkpointing surround the caller; at least 1, for other libraries' own."""
    frame, count = sys._getframe(1), 0
    while frame.f_back is not None:
        frame = frame.f_back
        count += frame.f_code is CheckpointFunction.forward.__code__
    return max(count, 1)


class PlanHistory:
    """The plans of one thread in the order in which they began, by the sequence number of the next autograd node."""

    def __init__(self) -> None:
        self._notes: list[tuple[int, list[Any]]] = []
        #: the sequence number after which the last plan ends, if known before another begins
        self._end: int | None = None
        self.forgot = False
        self._thread = weakref.ref(threading.current_thread())

    @property
    def lives(self) -> bool:
        """Whether its thread has not ended."""
        thread = self._thread()
        return thread is not None and thread.is_alive()

    def note(self, plan: Any, begun: bool = False) -> list[Any]:
        """Later nodes belong to ``plan``, until the returned list is emptied, which any thread may do.

        Args:
            begun: called by a layer. Without gradients it runs inside regions of reentrant checkpointing, whose nodes
                were created earlier.
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
