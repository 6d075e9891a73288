"""What belongs to one forward: its route, who is computed together, what its layers have read so far.

A layer asks its model's ``Router`` for the ``Frame`` that it runs in. That is never a matter of the thread alone:
during a backward a layer runs because activation checkpointing repeats a part of a forward, maybe in another thread
(autograd has one for each CUDA device). The repetition takes its ``Plan`` from the forward that it repeats: the one in
which the autograd node was made that asks for it, which the node's sequence number tells.
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
from loraloom.lora.history import SeedBook, Timeline
from loraloom.lora.initialize import seed_of
from loraloom.lora.routing import Route
from loraloom.lora.rows import Batch, RowProbe, Unproven
from loraloom.lora.shared_inputs import Groups, Lanes, Reading

#: Autograd nodes that a repetition may make after its last adapted layer.
_AFTER = 64

_task = torch._C._current_graph_task_id
_hooks = torch._C._autograd._top_saved_tensors_default_hooks


@dataclass(frozen=True)
class Plan:
    """What is decided once for a forward, and holds for every recomputation of a part of it."""

    route: Route
    groups: Groups = field(default_factory=Groups)
    #: what is known of the batch, where rows go to different slots
    batch: Batch | None = None
    #: set while it is looked at whose rows are where: see ``lora.rows``
    probe: RowProbe | None = None
    #: the adapters are disabled, and no route is followed inside
    disabled: bool = False
    drawn: SeedBook = field(default_factory=SeedBook, compare=False)
    #: the backwards that asked for a repetition
    repeated: set[int] = field(default_factory=set, compare=False)

    def same(self, other: Plan) -> bool:
        """Whether a repetition comes to the same by either."""
        return self is other or (
            self.groups is other.groups
            and self.route == other.route
            and self.disabled == other.disabled
            and (self.drawn is other.drawn or not (self.drawn or other.drawn))
        )


class Frame:
    """One run under a plan: a forward, or the repetition of a part of it in a backward."""

    __slots__ = ("calls", "differentiated", "key", "plan", "reading", "task")

    def __init__(self, plan: Plan, task: int, key: tuple[int, int] | None = None) -> None:
        self.plan, self.task, self.key = plan, task, key
        self.reading = Reading()
        self.differentiated = torch.is_grad_enabled()
        #: (slot, layer) → calls so far, in a repetition
        self.calls: dict[tuple[str, str], int] = {}

    def dropout_seed(self, slot: str, name: str, layer: str) -> int:
        """The seed of ``slot``'s dropout of the current input of ``name``, which is ``layer`` or what layers share.

        A seed that the route gives is followed by names alone: not by what other slots there are.
        """
        given = self.plan.route.seeds.get(slot)
        if given is not None:
            return seed_of(given, name)
        seeds = self.reading.seeds
        if slot not in seeds:
            # In a repetition as well, which is to leave torch's generator to the model's own dropout as it was.
            seeds[slot] = self._drawn(slot, layer, int(torch.randint(2**63 - 1, ())))
        return seeds[slot]

    def _drawn(self, slot: str, layer: str, seed: int) -> int:
        """``seed``, or in a repetition what stood in its place in the forward."""
        book = self.plan.drawn
        if self.key is None:
            region = self.reading.region
            if region is not None or (self.differentiated and not torch.is_grad_enabled()):
                book.write(slot, layer, region, seed)
            return seed
        call = self.calls[slot, layer] = self.calls.get((slot, layer), -1) + 1
        found = book.read(slot, layer, self.key[1], call)
        return seed if found is None else found


#: The frames that the code which runs now is in. Tasks of an event loop take turns in one thread, so the last frame
#: that the thread entered may be that of another task.
_entered: ContextVar[tuple[Frame, ...]] = ContextVar("entered", default=())


class Router:
    """Where the layers of one model find the frame they run in, and what the model's forwards have in common."""

    def __init__(self, resting: Route | None = None) -> None:
        #: of a forward that asks for nothing else
        self.resting = resting or Route()
        #: what compiled code reads, which may ask for no thread
        self.compiled = self.resting
        self.groups = Groups()
        self.lanes = Lanes()
        #: site → places for each row that a probe has proven, and where it has shown that rows cannot be divided
        self._proven: dict[str, int] = {}
        self._refuted: set[str] = set()
        #: slots that therefore do not go through one forward together
        self._apart: set[frozenset[str]] = set()
        self.lock = threading.RLock()
        self._stacks: dict[int, list[Frame]] = {}
        self._repeats: dict[int, Frame] = {}
        #: threads whose timeline a repetition has written in since their own forward did
        self._interrupted: set[int] = set()
        self._history: list[Timeline] = []
        self._own = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Router, (self.resting,)  # a copy of the model learns for itself

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
            return self._repeated(thread, task)
        drawn = top.plan.drawn
        if not drawn.regions and (not torch.is_grad_enabled() or _hooks(False) is not None):
            drawn.regions = True
        return top

    @property
    def route(self) -> Route:
        return self.compiled if torch.compiler.is_compiling() else self.frame.plan.route

    def places(self, site: str, x: Tensor, leading: torch.Size) -> int:
        """How many consecutive places of the first dimension of ``x`` each row of the batch has.

        Args:
            leading: the dimensions of ``x`` before those that ``site`` computes on.

        Raises:
            Unproven: it is not known.
        """
        if torch.compiler.is_compiling():
            if len(leading) > 1 and leading[0] == self.compiled.rows:
                return 1
            raise Unproven(site, x.shape, self.compiled.rows)
        plan = self.frame.plan
        rows, batch = plan.route.rows, plan.batch
        if batch is not None and leading:
            if batch.certain(leading):
                return leading[0] // rows
            per_row = self._proven.get(site)
            if per_row is not None and batch.plausible(leading[0], per_row):
                return leading[0] // rows
        raise Unproven(site, x.shape, rows)

    def learn_rows(self, probe: RowProbe) -> None:
        with self.lock:
            self._proven = {**self._proven, **probe.proven}
            self._refuted = self._refuted | probe.failed
            for site in probe.failed:
                self._proven.pop(site, None)

    def together(self, slots: Iterable[str]) -> bool:
        """Whether these may go through one forward, as far as it is known."""
        return not self._apart or frozenset(slots) not in self._apart

    def indivisible(self, site: str, shape: Iterable[int]) -> Unproven:
        """The error of a site that no batch can be divided at."""
        with self.lock:
            self._refuted = self._refuted | {site}
        return Unproven(site, shape, self.frame.plan.route.rows)

    def is_refuted(self, site: str) -> bool:
        return site in self._refuted

    def refute(self, site: str, slots: Iterable[str]) -> None:
        """``slots`` could not share a forward because of ``site``: for good, if a probe has shown it."""
        if site in self._refuted:
            self._apart.add(frozenset(slots))

    # -- entering a forward ---------------------------------------------------------------------------------------

    @contextmanager
    def running(self, plan: Plan) -> Iterator[None]:
        """Follow ``plan`` in this thread until the end of the block, exceptions included."""
        thread = threading.get_ident()
        stack = self._stacks.get(thread)
        if stack is None:
            with self.lock:  # not while another thread changes the layers
                stack = self._stacks[thread] = []
            self._learn_from_ambient()
        frame = Frame(plan, _task())
        self.compiled = plan.route
        stack.append(frame)
        _entered.set((*_entered.get(), frame))
        self._timeline.note(plan)
        try:
            yield
        finally:
            _entered.set(tuple([one for one in _entered.get() if one is not frame]))
            stack.remove(frame)
            if stack:
                self._interrupted.add(thread)
            else:
                self._stacks.pop(thread, None)
            self.compiled = self._left()
            self._timeline.note(self._top(stack))
            self.learn(frame.reading)

    def _innermost(self, stack: list[Frame] | None) -> Frame | None:
        """The last frame that was entered of a thread's, by the task that runs now if there are several."""
        if not stack:
            return None
        if _get_running_loop() is None:
            return stack[-1]
        mine = _entered.get()
        found = next((frame for frame in reversed(stack) if frame in mine), None)
        if len(stack) > 1 or found is None:  # another task may have run since
            self._interrupted.add(threading.get_ident())
        return found

    def _left(self) -> Route:
        """The route of a forward that is under way, of this thread if there is one, or what the model is set to."""
        stacks = [self._stacks.get(threading.get_ident()), *tuple(self._stacks.values())]
        return next((stack[-1].plan.route for stack in stacks if stack), self.resting)

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Follow ``route`` for a while, inside a forward."""
        with self.running(replace(self.plan_here(), route=route)):
            yield

    def plan_here(self) -> Plan:
        """The plan that a forward which asks for nothing else follows in this thread."""
        top = self._innermost(self._stacks.get(threading.get_ident()))
        if top is not None and top.task == _task():
            return replace(top.plan, groups=self.groups)
        return Plan(self._resting_here(), self.groups)

    def learn(self, reading: Reading) -> None:
        """Use in later forwards what this one has shown."""
        lessons = reading.lessons()
        if lessons:
            with self.lock:
                self.groups = self.groups.learned(lessons)

    def _learn_from_ambient(self) -> None:
        ambient: Frame | None = getattr(self._own, "ambient", None)
        if ambient is not None:
            self.learn(ambient.reading)
            self._own.ambient = None

    def forget(self) -> None:
        """The model has other layers: what was found of who reads what does not hold any more."""
        with self.lock:
            self.groups, self.lanes, self._apart = Groups(), Lanes(), set()
            self._own.ambient = None

    @property
    def outer(self) -> Route:
        """The route of the forward that this thread is in, or else what the model is set to."""
        top = self._innermost(self._stacks.get(threading.get_ident()))
        return self.resting if top is None else top.plan.route

    # -- threads --------------------------------------------------------------------------------------------------

    def rest(self, route: Route) -> None:
        """What forwards follow from now on that ask for nothing else, in this thread and in those that never ask."""
        self.resting = self.compiled = route
        self._own.wanted = route.active

    def elsewhere(self) -> list[Plan]:
        """The plans of forwards that are under way in other threads, or in other tasks of this one's event loop."""
        thread = threading.get_ident()
        mine = _entered.get() if _get_running_loop() is not None else self._stacks.get(thread, ())
        stacks = tuple(self._stacks.items())
        return [f.plan for other, stack in stacks for f in tuple(stack) if other != thread or f not in mine]

    @contextmanager
    def changing(self, what: str, slot: str | None = None) -> Iterator[None]:
        """Change the layers, or what they hold of ``slot``, while no other thread runs a forward with it."""
        with self.lock:
            if any(slot is None or slot in plan.route.slots() for plan in self.elsewhere()):
                raise AdapterError(
                    f"{what}: another thread runs this model at the moment, which would change under it; "
                    "wait for it, or give each thread a model of its own"
                )
            yield

    def _resting_here(self) -> Route:
        wanted = getattr(self._own, "wanted", None)
        if wanted is not None and wanted != self.resting.active:
            raise AdapterError(
                f"set_adapter: this thread set {list(wanted)}, and another one {list(self.resting.active)} since; "
                "set it again, or give adapter_names with each call, which no other thread can change"
            )
        return self.resting

    @property
    def _timeline(self) -> Timeline:
        timeline: Timeline | None = getattr(self._own, "timeline", None)
        if timeline is None:
            timeline = self._own.timeline = Timeline()
            self._history = [*self._history[-1023:], timeline]
        return timeline

    def _top(self, stack: list[Frame]) -> Plan | None:
        top = self._innermost(stack)
        if top is not None:
            return top.plan
        ambient = getattr(self._own, "ambient", None)
        return None if ambient is None else ambient.plan

    def _resume(self, thread: int, frame: Frame) -> None:
        """A backward is over, and the forward around it, or what the model is set to, holds again."""
        self._interrupted.discard(thread)
        self._timeline.note(frame.plan, begun=True)

    def _ambient(self, thread: int) -> Frame:
        """Of a layer that is called past the ``PeftModel``: its plan lasts as long as what the model is set to."""
        frame: Frame | None = getattr(self._own, "ambient", None)
        route = self._resting_here()
        if frame is None or frame.plan.route is not route:
            frame = self._own.ambient = Frame(Plan(route, self.groups), -1)
            self._timeline.note(frame.plan, begun=True)
        elif thread in self._interrupted:
            self._resume(thread, frame)
        return frame

    def _repeated(self, thread: int, task: int) -> Frame:
        """The frame of a repetition: one for each node that asks for one, with the plan of its forward."""
        node = torch._C._current_autograd_node()
        number = -1 if node is None else node._sequence_nr()
        frame = self._repeats.get(thread)
        if frame is None or frame.key != (task, number):
            frame = self._repeats[thread] = Frame(self._made_in(number, task), task, (task, number))
            self._interrupted.add(thread)
            self._until_the_end(thread, frame, self._timeline.note(frame.plan, begun=True))
        self._timeline.ends_after(_AFTER)  # the backward may be the thread's last, and numbers are others' too
        return frame

    def _until_the_end(self, thread: int, frame: Frame, held: list[Any]) -> None:
        """Nothing asks for a repetition's nodes after its backward, when the numbers are those of others' nodes."""

        def end() -> None:
            held.clear()
            if self._repeats.get(thread) is frame:
                self._repeats.pop(thread, None)

        torch.autograd.Variable._execution_engine.queue_callback(end)

    def _made_in(self, number: int, task: int) -> Plan:
        """The plan of the forward that made the autograd node of this sequence number, which each thread counts.

        A forward of a thread that has ended, and of which an earlier backward repeated parts, makes way for others.
        """
        history = tuple(self._history)
        known: list[tuple[Timeline, Plan]] = []
        for timeline in history:
            plan: Plan | None = timeline.at(number)
            if plan is not None and plan.drawn.regions:
                known.append((timeline, plan))
        found = [plan for timeline, plan in known if timeline.lives or plan.repeated <= {task}]
        found = found or [plan for _, plan in known]
        if not known and not any(timeline.forgot for timeline in history):
            return self._ambient(threading.get_ident()).plan
        if not found or not all(found[0].same(plan) for plan in found):
            raise AdapterError(
                "gradient checkpointing: a part of a forward is to be computed again, and it is not known of which: "
                "several threads ran this model with different adapters; call backward() before other threads' forwards"
            )
        found[0].repeated.add(task)
        return found[0]
