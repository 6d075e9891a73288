"""Biases that adapters train. Each slot has its own copies, and the model's modules hold those of the active slot.

The base's own biases are never written: switching adapters exchanges parameters, and disabling restores the base's.
In a batch of several slots the modules hold the base's biases, and a hook adds each slot's difference to its rows.
Biases that no module holds are parameters of ``Biases``; every bias is in one of the two places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from loraloom.errors import AdapterError
from loraloom.lora.dispatch import Dispatcher
from loraloom.lora.routing import BASE, leading


class Biases(nn.Module):
    """One child for each slot, and ``BASE`` for the base's own: the biases that no module of the model holds now."""

    def __init__(self) -> None:
        super().__init__()
        #: slot → the names of its biases, such as "model.norm.bias"
        self.slots: dict[str, tuple[str, ...]] = {}
        self._owners: dict[str, nn.Module] = {}
        #: name → the slot whose bias the model holds now
        self._held: dict[str, str] = {}
        self._hooks: list[Any] = []

    def add(self, slot: str, owners: Mapping[str, nn.Module]) -> None:
        """``owners``: parameter name → the module whose ``bias`` it is. Installs nothing."""
        if not owners:
            return
        self._modules.setdefault(BASE, nn.Module())
        self._modules[slot] = nn.Module()
        for name, module in owners.items():
            self._owners[name] = module
            self._held.setdefault(name, BASE)
            base = self._bias(BASE, name)
            self._waiting(slot)[_key(name)] = nn.Parameter(base.detach().clone())
        self.slots[slot] = tuple(owners)

    def remove(self, slot: str) -> None:
        """Forget a slot that is not active."""
        self.slots.pop(slot, None)
        self._modules.pop(slot, None)
        left = {name for names in self.slots.values() for name in names}
        for name in self._owners.keys() - left:
            del self._owners[name], self._held[name]

    def of(self, slot: str) -> dict[str, nn.Parameter]:
        """Name → that slot's bias, installed or not."""
        return {name: self._bias(slot, name) for name in self.slots.get(slot, ())}

    def install(self, active: Sequence[str]) -> None:
        """Put into the model's modules the biases of the active slot that has its own, the base's elsewhere."""
        for name, before in self._held.items():
            slot = self.chosen(name, active)
            if slot != before:
                owner, key = self._owners[name]._parameters, _key(name)
                self._waiting(before)[key] = owner["bias"]
                owner["bias"] = self._waiting(slot).pop(key)
                self._held[name] = slot

    def hook(self, dispatcher: Dispatcher, wrappers: Mapping[str, nn.Module]) -> None:
        """Add a ``ByRow`` hook to every module whose bias some slot trains. To be called when slots or wrappers change.

        ``wrappers``: name of a module → the wrapper that is called in its place.
        """
        self.unhook()
        self._hooks = [
            wrappers.get(name[: -len(".bias")], owner).register_forward_hook(ByRow(self, dispatcher, name))
            for name, owner in self._owners.items()
        ]

    def unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def add_difference(self, name: str, slot: str, rows: Tensor) -> Tensor:
        """``rows`` of a module's output, computed with the base's bias → as if with the bias of ``slot``."""
        if name not in self.slots.get(slot, ()):
            return rows
        delta = self._bias(slot, name) - self._bias(BASE, name)
        return rows + (delta.view(-1, *[1] * (rows.dim() - 2)) if self.channels_first(name) else delta).to(rows.dtype)

    def channels_first(self, name: str) -> bool:
        return isinstance(self._owners[name], _ConvNd | _NormBase | nn.GroupNorm)

    def holds(self, name: str) -> str:
        """The slot whose bias is installed, or ``BASE``."""
        return self._held[name]

    def chosen(self, name: str, active: Sequence[str]) -> str:
        """The slot whose bias belongs into the model while ``active`` are the active slots."""
        return next((slot for slot in active if slot in self.slots and name in self.slots[slot]), BASE)

    def _bias(self, slot: str, name: str) -> nn.Parameter:
        held = self._held[name] == slot
        bias = self._owners[name]._parameters["bias"] if held else self._waiting(slot)[_key(name)]
        assert bias is not None
        return bias

    def _waiting(self, slot: str) -> dict[str, nn.Parameter | None]:
        module = self._modules[slot]
        assert module is not None
        return module._parameters


def _key(name: str) -> str:
    """The name of a parameter in ``Biases``: torch allows no dot in it."""
    return name.replace(".", "/")


class ByRow:
    """Forward hook of a module whose bias slots train. An object and not a closure: copies of a model get their own."""

    def __init__(self, biases: Biases, dispatcher: Dispatcher, name: str) -> None:
        self._biases, self._dispatcher, self._name = biases, dispatcher, name

    def __call__(self, module: nn.Module, inputs: Any, out: Any) -> Any:
        biases, name = self._biases, self._name
        if torch.compiler.is_compiling() and not self._dispatcher.compiled.blocks:
            return None  # the right bias is installed
        plan = self._dispatcher.frame.plan
        if not isinstance(out, Tensor):
            if plan.route.blocks:
                raise AdapterError(
                    f"adapter_names: {name} is in a module with several outputs, whose rows are not known"
                )
            return None
        first = out.shape[:1] if biases.channels_first(name) else leading(out)
        if plan.probe is not None:
            plan.probe.observe(name, out)
        if plan.route.blocks:
            if biases.holds(name) != BASE:
                raise _changed(name)
            times = self._dispatcher.places(name, out, first)
            return plan.route.apply(out, times, lambda slot, rows, where: biases.add_difference(name, slot, rows))
        wanted, held = biases.chosen(name, plan.route.active), biases.holds(name)
        if held == wanted:
            return None
        if held == BASE:  # inside a module of which one slot has a copy, or recomputed after a mixed batch
            return biases.add_difference(name, wanted, out)
        raise _changed(name)


def _changed(name: str) -> AdapterError:
    return AdapterError(
        f"gradient checkpointing: {name} belonged to another adapter in the forward that is to be recomputed; "
        "call backward() before the active adapters change"
    )
