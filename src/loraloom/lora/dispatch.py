"""What belongs to one forward: its route, which layers are computed together, which input its layers read.

A layer asks its model's ``Dispatcher`` for the ``Frame`` that it runs in. The thread does not determine it: in a
backward, activation checkpointing recomputes a part of a forward, possibly in another thread (autograd has one per CUDA
device). A recomputation uses the ``Plan`` of the forward that it recomputes: the one that created the autograd node
which triggers it, found by the node's sequence number.
"""

from __future__ import annotations

import threading
from asyncio import _get_running_loop
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loraloom.errors import AdapterError
from loraloom.lora.history import PlanHistory, SeedLog
from loraloom.lora.initialize import seed_of
from loraloom.lora.routing import Batch, Route, RowProbe, RowSites, Unproven
from loraloom.lora.shared_inputs import InputTracker, LayerGroups, SlotGroups

#: Autograd nodes that a recomputation may make after its last adapted layer.
_NODES_AFTER = 64

_task = torch._C._current_graph_task_id
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


@dataclass(frozen=True)
class Plan:
    """Decided once for a forward, and reused by every recomputation of a part of it."""

    route: Route
    layer_groups: LayerGroups = field(default_factory=LayerGroups)
    #: shapes of the forward's arguments, if rows go to different slots
    batch: Batch | None = None
    #: set while a probe finds which rows a layer's input holds: see ``lora.routing``
    probe: RowProbe | None = None
    #: inside ``disable_adapter``: routes have no effect
    disabled: bool = False
    seeds: SeedLog = field(default_factory=SeedLog, compare=False)
    #: autograd's ids of the backwards that recomputed parts of it
    recomputed_by: set[int] = field(default_factory=set, compare=False)

    def same(self, other: Plan) -> bool:
        """Whether recomputing under either plan gives the same result."""
        return self is other or (
            self.layer_groups is other.layer_groups
            and self.route == other.route
            and self.disabled == other.disabled
            and (self.seeds is other.seeds or not (self.seeds or other.seeds))
        )


class Frame:
    """One run under a plan: a forward, or the recomputation of a part of it in a backward."""

    __slots__ = ("calls", "differentiated", "inputs", "key", "plan", "task")

    def __init__(self, plan: Plan, task: int, key: tuple[int, int] | None = None) -> None:
        self.plan, self.task, self.key = plan, task, key
        self.inputs = InputTracker()
        self.differentiated = torch.is_grad_enabled()
        #: (slot, layer) → calls so far, in a recomputation
        self.calls: dict[tuple[str, str], int] = {}

    def dropout_seed(self, slot: str, name: str, layer: str) -> int:
        """The seed of ``slot``'s dropout for the current input of ``layer``.

        ``name`` is the layer's own, or that of the module whose layers share dropout. A seed from the route depends on
        this name alone, not on the other slots.
        """
        given = self.plan.route.seeds.get(slot)
        if given is not None:
            return seed_of(given, name)
        seeds = self.inputs.seeds
        if slot not in seeds:
            # Draw in a recomputation too: the model's own dropout must find torch's generator in the same state.
            seeds[slot] = self._logged(slot, layer, int(torch.randint(2**63 - 1, ())))
        return seeds[slot]

    def _logged(self, slot: str, layer: str, seed: int) -> int:
        """``seed``, or in a recomputation the seed that the forward drew."""
        log = self.plan.seeds
        if self.key is None:
            region = self.inputs.region
            if region is not None or (self.differentiated and not torch.is_grad_enabled()):
                log.write(slot, layer, region, seed)
            return seed
        call = self.calls[slot, layer] = self.calls.get((slot, layer), -1) + 1
        found = log.read(slot, layer, self.key[1], call)
        return seed if found is None else found


#: The frames of the running code. Tasks of an event loop share a thread, so the frame that the thread entered last may
#: belong to another task.
_entered: ContextVar[tuple[Frame, ...]] = ContextVar("entered", default=())


class Dispatcher:
    """Gives the layers of one model the frame they run in, and remembers which layers share inputs."""

    def __init__(self, default: Route | None = None) -> None:
        #: the route of a forward that sets none
        self.default = default or Route()
        #: the route for compiled code, which cannot look up the thread
        self.compiled = self.default
        self.layer_groups = LayerGroups()
        self.slot_groups = SlotGroups()
        self.rows = RowSites()
        self.lock = threading.RLock()
        self._stacks: dict[int, list[Frame]] = {}
        self._recomputing: dict[int, Frame] = {}
        #: threads whose last history entry is a recomputation's, not their own forward's
        self._interrupted: set[int] = set()
        self._history: list[PlanHistory] = []
        self._local = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Dispatcher, (self.default,)  # a copied model learns its groups again

    # -- what layers ask ------------------------------------------------------------------------------------------

    @property
    def frame(self) -> Frame:
        """The frame that the calling layer runs in."""
        thread, task = threading.get_ident(), _task()
        top = self._innermost(self._stacks.get(thread))
        if top is not None and top.task == task:
            if thread in self._interrupted:
                self._resume(thread, top)
        elif task == -1:
            top = self._ambient(thread)
        else:
            return self._recomputed(thread, task)
        seeds = top.plan.seeds
        if not seeds.regions and (not torch.is_grad_enabled() or _hooks(False) is not None):
            seeds.regions = True
        return top

    @property
    def route(self) -> Route:
        return self.compiled if torch.compiler.is_compiling() else self.frame.plan.route

    def places(self, site: str, x: Tensor, leading: torch.Size) -> int:
        """How many consecutive places in the first dimension of ``x`` belong to each row of the batch.

        Args:
            site: the name of the layer that reads ``x``.
            leading: the dimensions of ``x`` before those that the layer computes on.

        Raises:
            Unproven: it is not known.
        """
        if torch.compiler.is_compiling():
            if len(leading) > 1 and leading[0] == self.compiled.rows:
                return 1
            raise Unproven(site, x.shape, self.compiled.rows)
        plan = self.frame.plan
        places = None if plan.batch is None else self.rows.places(site, leading, plan.batch)
        if places is None:
            raise Unproven(site, x.shape, plan.route.rows)
        return places

    def indivisible(self, site: str, shape: Iterable[int]) -> Unproven:
        """Note that no batch can be divided at ``site``, and return the error."""
        self.rows.record({}, {site})
        return Unproven(site, shape, self.frame.plan.route.rows)

    # -- entering a forward ---------------------------------------------------------------------------------------

    @contextmanager
    def running(self, plan: Plan) -> Iterator[None]:
        """Follow ``plan`` in this thread until the end of the block, exceptions included."""
        thread = threading.get_ident()
        stack = self._stacks.get(thread)
        if stack is None:
            with self.lock:  # not while another thread changes the layers
                stack = self._stacks[thread] = []
            if (ambient := self._local.__dict__.pop("ambient", None)) is not None:
                self.update_groups(ambient.inputs)
        frame = Frame(plan, _task())
        self.compiled = plan.route
        stack.append(frame)
        _entered.set((*_entered.get(), frame))
        self._own_history.note(plan)
        try:
            yield
        finally:
            _entered.set(tuple([one for one in _entered.get() if one is not frame]))
            stack.remove(frame)
            if stack:
                self._interrupted.add(thread)
            else:
                self._stacks.pop(thread, None)
            self.compiled = next((one[-1].plan.route for one in (stack, *self._stacks.values()) if one), self.default)
            outer = self._innermost(stack) or getattr(self._local, "ambient", None)
            self._own_history.note(None if outer is None else outer.plan)
            self.update_groups(frame.inputs)

    def _innermost(self, stack: list[Frame] | None) -> Frame | None:
        """The last frame that this thread entered; in an event loop, the last of the current task."""
        if not stack:
            return None
        if _get_running_loop() is None:
            return stack[-1]
        mine = _entered.get()
        found = next((frame for frame in reversed(stack) if frame in mine), None)
        if len(stack) > 1 or found is None:  # another task may have run since
            self._interrupted.add(threading.get_ident())
        return found

    @contextmanager
    def with_route(self, route: Route) -> Iterator[None]:
        """Use ``route`` within the block, inside a forward."""
        with self.running(replace(self.current_plan(), route=route)):
            yield

    def current_plan(self) -> Plan:
        """The plan of a forward of this thread that sets no route."""
        top = self._innermost(self._stacks.get(threading.get_ident()))
        if top is not None and top.task == _task():
            return replace(top.plan, layer_groups=self.layer_groups)
        return Plan(self._default_here(), self.layer_groups)

    def update_groups(self, inputs: InputTracker) -> None:
        """Use in later forwards which layers shared an input in this one."""
        if pending := inputs.pending_updates():
            with self.lock:
                self.layer_groups = self.layer_groups.updated(pending)

    def reset(self) -> None:
        """Forget which layers share an input: the model's layers have changed."""
        with self.lock:
            self.layer_groups, self.slot_groups = LayerGroups(), SlotGroups()
            self.rows.separate.clear()
            self._local.ambient = None

    @property
    def enclosing_route(self) -> Route:
        """The route of the forward that this thread runs, else the default."""
        top = self._innermost(self._stacks.get(threading.get_ident()))
        return self.default if top is None else top.plan.route

    # -- threads --------------------------------------------------------------------------------------------------

    def set_default(self, route: Route) -> None:
        """Set the route of forwards that set none, in this thread and in those that never set a default."""
        self.default = self.compiled = route
        self._local.wanted = route.active

    def other_plans(self) -> list[Plan]:
        """The plans of forwards that run in other threads, or in other tasks of this thread's event loop."""
        thread = threading.get_ident()
        mine = _entered.get() if _get_running_loop() is not None else self._stacks.get(thread, ())
        stacks = tuple(self._stacks.items())
        return [f.plan for other, stack in stacks for f in tuple(stack) if other != thread or f not in mine]

    @contextmanager
    def exclusive(self, what: str, slot: str | None = None) -> Iterator[None]:
        """Change the layers, or what they hold of ``slot``, while no other thread runs a forward with it."""
        with self.lock:
            if any(slot is None or slot in plan.route.slots() for plan in self.other_plans()):
                raise AdapterError(
                    f"{what}: another thread runs this model at the moment, which would change under it; "
                    "wait for it, or give each thread a model of its own"
                )
            yield

    def _default_here(self) -> Route:
        wanted = getattr(self._local, "wanted", None)
        if wanted is not None and wanted != self.default.active:
            raise AdapterError(
                f"set_adapter: this thread set {list(wanted)}, and another one {list(self.default.active)} since; "
                "set it again, or give adapter_names with each call, which no other thread can change"
            )
        return self.default

    @property
    def _own_history(self) -> PlanHistory:
        history: PlanHistory | None = getattr(self._local, "history", None)
        if history is None:
            history = self._local.history = PlanHistory()
            self._history = [*self._history[-1023:], history]
        return history

    def _resume(self, thread: int, frame: Frame) -> None:
        """After a backward: the thread's nodes belong to ``frame`` again."""
        self._interrupted.discard(thread)
        self._own_history.note(frame.plan, begun=True)

    def _ambient(self, thread: int) -> Frame:
        """The frame of layers that are called outside a forward of the ``PeftModel``, until the default changes."""
        frame: Frame | None = getattr(self._local, "ambient", None)
        route = self._default_here()
        if frame is None or frame.plan.route is not route:
            frame = self._local.ambient = Frame(Plan(route, self.layer_groups), -1)
            self._own_history.note(frame.plan, begun=True)
        elif thread in self._interrupted:
            self._resume(thread, frame)
        return frame

    def _recomputed(self, thread: int, task: int) -> Frame:
        """The frame of a recomputation: one for each autograd node that triggers one, with the plan of its forward."""
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        frame = self._recomputing.get(thread)
        if frame is None or frame.key != (task, number):
            frame = self._recomputing[thread] = Frame(self._plan_of_node(number, task), task, (task, number))
            self._interrupted.add(thread)
            self._end_with_backward(thread, frame, self._own_history.note(frame.plan, begun=True))
        self._own_history.ends_after(_NODES_AFTER)  # the backward may be the thread's last, and numbers are others' too
        return frame

    def _end_with_backward(self, thread: int, frame: Frame, held: list[Any]) -> None:
        """Forget the frame after its backward: later nodes of other threads may get the same numbers."""

        def end() -> None:
            held.clear()
            if self._recomputing.get(thread) is frame:
                self._recomputing.pop(thread, None)

        torch.autograd.Variable._execution_engine.queue_callback(end)

    def _plan_of_node(self, number: int, task: int) -> Plan:
        """The plan of the forward that created the autograd node of this sequence number. Each thread counts its own.

        If several match, forwards of ended threads that an earlier backward has recomputed are ruled out.
        """
        histories = tuple(self._history)
        at: list[tuple[PlanHistory, Plan | None]] = [(history, history.at(number)) for history in histories]
        known = [(history, plan) for history, plan in at if plan is not None and plan.seeds.regions]
        if not known and not any(history.forgot for history in histories):
            return self._ambient(threading.get_ident()).plan
        found = [plan for history, plan in known if history.lives or plan.recomputed_by <= {task}]
        found = found or [plan for _, plan in known]
        if not found or not all(found[0].same(plan) for plan in found):
            raise AdapterError(
                "gradient checkpointing: it is not known which forward to recompute: several threads ran this model "
                "with different adapters; call backward() before the forwards of other threads"
            )
        found[0].recomputed_by.add(task)
        return found[0]
