"""A frozen model whose layers follow a route: which adapters a forward uses, by default or within a block.

Knows which slots are active, merged and disabled. ``adapters`` adds and deletes slots.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from loraloom.config.lora import LoraConfig
from loraloom.errors import AdapterError, nearest
from loraloom.lora.dispatch import Dispatcher, Plan
from loraloom.lora.layer import LoraLayer
from loraloom.lora.modules_to_save import ModulesToSaveWrapper
from loraloom.lora.routing import BASE, Batch, Route
from loraloom.lora.slots import Slots

#: Names that this class had before, when they hid attributes of models → names of today.
EARLIER = {
    **{name: f"lora_{name}" for name in ("layers", "enabled", "saved_modules", "routed")},
    "router": "lora_dispatcher",
}


class RoutedModel(nn.Module):
    """``model`` and the route of its forwards. Attributes that it lacks are looked up in ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, LoraConfig] = {}
        self.lora_dispatcher = Dispatcher()
        self.training = model.training
        self._slots = Slots(model, self.lora_dispatcher)
        self._active: tuple[str, ...] = ()
        self._merged: tuple[str, ...] = ()
        self._enabled = True
        self._compiled = False

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name when one is active, else the list."""
        return self._active[0] if len(self._active) == 1 else list(self._active)

    @property
    def lora_enabled(self) -> bool:
        """Whether the active adapters apply: not inside ``disable_adapter``, which each thread enters for itself."""
        return self._enabled and not self.lora_dispatcher.current_plan().disabled

    @property
    def merged_adapters(self) -> list[str]:
        return list(self._merged)

    @property
    def lora_layers(self) -> Mapping[str, LoraLayer]:
        """The adapted layers by the name of the module that they wrap."""
        return self._slots.layers

    @property
    def lora_saved_modules(self) -> Mapping[str, ModulesToSaveWrapper]:
        """The wrappers of modules that adapters train in full, by the module's name."""
        return self._slots.saved

    # -- the default route --------------------------------------------------------------------------------------

    def _set(self, active: tuple[str, ...]) -> None:
        self._active = active
        self._follow(by_hand=True)

    def _follow(self, by_hand: bool = False) -> None:
        """Set the default route. If adapters are merged, exactly these apply, active or not."""
        route = Route(active=self._merged or (self._active if self._enabled else ()))
        if by_hand or route.active != self.lora_dispatcher.default.active:
            self.lora_dispatcher.set_default(route)
        self._install(self.lora_dispatcher.default)
        if self._slots.biases.slots:
            self._modules["biases"] = self._slots.biases
        else:
            self._modules.pop("biases", None)

    def _install(self, route: Route, what: str | None = None) -> None:
        """Put into the model what ``route`` needs: its biases, and the tensors that compiled code reads.

        If another thread's forward needs others, this is an error of the operation ``what``; with None it is left to
        the next forward.
        """
        # Once a compile was seen, keep updating: dynamo may reset its counters while layers still hold old factors.
        self._compiled = self._compiled or _compiles()
        biases = self._slots.biases
        if not (biases.slots or self._compiled):
            return
        if any(plan.route.active != route.active or plan.route.blocks for plan in self.lora_dispatcher.other_plans()):
            if what is None:
                return
            raise AdapterError(
                f"{what}: another thread runs this model by other adapters at the moment, and "
                f"{'biases that adapters train' if biases.slots else 'a compiled model'} can follow one of them alone; "
                "wait for it, or give each thread a model of its own"
            )
        biases.install(route.active)
        if self._compiled:
            for layer in self.lora_layers.values():
                layer.cache_active(route.active)

    def enable_adapter_layers(self) -> None:
        self._enabled = True
        self._follow(by_hand=True)

    def disable_adapter_layers(self) -> None:
        """Every row goes through the frozen model alone, until ``enable_adapter_layers``."""
        self._check_unmerged("disable_adapter_layers")
        self._enabled = False
        self._follow(by_hand=True)

    # -- one forward --------------------------------------------------------------------------------------------

    @contextmanager
    def lora_routed(
        self,
        adapter_names: Sequence[str] | None,
        dropout_seeds: Mapping[str, int] | None = None,
        inputs: Iterable[Any] = (),
    ) -> Iterator[None]:
        """Row ``i`` of the next batches goes through adapter ``adapter_names[i]``; ``"__base__"`` means none.

        Args:
            dropout_seeds: adapter → the seed of its dropout mask, which then depends on nothing else; without one it
                follows torch's generator.
            inputs: the arguments of the forward, if it is not that of the whole model.
        """
        if adapter_names is None:
            if torch.compiler.is_compiling():
                yield
                return
            with self.following(self.lora_dispatcher.current_plan()):
                yield
            return
        names = list(adapter_names)
        self._check_names([name for name in dict.fromkeys(names) if name != BASE])
        if not self.lora_enabled:
            yield
            return
        self._check_unmerged("adapter_names")
        route = Route.of_rows(names, dropout_seeds or {})
        batch = Batch(route.rows) if route.blocks else None
        plan = replace(self.lora_dispatcher.current_plan(), route=route, batch=batch)
        with self.following(plan, "adapter_names"), self._noting(batch, inputs):
            yield

    @contextmanager
    def following(self, plan: Plan, what: str = "forward") -> Iterator[None]:
        """Run forwards of this thread under ``plan`` within the block."""
        with ExitStack() as stack:
            with self.lora_dispatcher.lock:
                self._install(plan.route, what)
                stack.enter_context(self.lora_dispatcher.running(plan))
            try:
                yield
            finally:
                stack.close()
                self._install(self.lora_dispatcher.enclosing_route)

    @contextmanager
    def _noting(self, batch: Batch | None, inputs: Iterable[Any]) -> Iterator[None]:
        """Tell ``batch`` the shapes of ``inputs``, and of the arguments of each forward of the model in the block."""
        if batch is None:
            yield
            return
        tokens = media_tokens(self.model)
        batch.note(inputs, tokens)

        # Another thread that runs the model while this hook is removed may call it without kwargs.
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
            if self.lora_dispatcher.frame.plan.batch is batch:  # not of another thread
                batch.note((*args, *kwargs.values()), tokens)

        handle = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        try:
            return getattr(self.model, name)
        except AttributeError:
            if name in EARLIER:  # unless the model has something of that name
                return getattr(self, EARLIER[name])
            raise

    # -- checks -------------------------------------------------------------------------------------------------

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise AdapterError(
                    f"adapter {name!r} does not exist{nearest(str(name), self.peft_config)}; "
                    f"there are: {listed(self.peft_config) or 'none'}"
                )

    def _check_unmerged(self, what: str) -> None:
        if self.merged_adapters:
            raise AdapterError(f"{what}: {listed(self.merged_adapters)} are merged; call unmerge_adapter() first")


def media_tokens(model: nn.Module) -> list[int]:
    """The token ids that stand for images, videos and sounds, or parts of them, in a model's input."""
    config = getattr(model, "config", None)
    names = [f"{medium}_token_{kind}" for medium in ("image", "video", "audio") for kind in ("id", "index")]
    return [token for name in names if isinstance(token := getattr(config, name, None), int)]


def _compiles() -> bool:
    """Whether this process has compiled anything: until then layers need not keep tensors for compiled code."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo is not None and bool(dynamo.counters.get("frames"))


def listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
