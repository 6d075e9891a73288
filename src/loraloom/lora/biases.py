"""Biases that adapters train. Each slot has its own copies; the model holds those of the active slot.

So the base's own biases are never written, switching adapters switches biases, and disabling brings the base back.
Where rows of several slots go through at once, the model holds the base's, and each slot's difference is added to its
rows.
Biases that the model does not hold now wait here, as parameters like all others: each is in one place at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from loraloom.errors import AdapterError
from loraloom.lora.route import BASE, Router


class Biases(nn.Module):
    """Children are slots, and ``BASE`` for the base's own; each holds those biases of its slot that wait."""

    def __init__(self) -> None:
        super().__init__()
        #: slot → the names of its biases, such as "model.norm.bias"
        self.slots: dict[str, tuple[str, ...]] = {}
        self._owners: dict[str, nn.Module] = {}
        #: name → the slot whose bias the model holds now
        self._held: dict[str, str] = {}

    def add(self, slot: str, owners: Mapping[str, nn.Module]) -> None:
        """``owners``: parameter name → the module whose ``bias`` it is. The model goes on holding what it holds."""
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
        """Name → that slot's bias, wherever it is."""
        return {name: self._bias(slot, name) for name in self.slots.get(slot, ())}

    def install(self, active: Sequence[str]) -> None:
        """Let the model hold the biases of the active slot that has some, and the base's own for the rest."""
        chosen = next((slot for slot in active if slot in self.slots), BASE)
        mine = set(self.slots.get(chosen, ()))
        for name, before in self._held.items():
            slot = chosen if name in mine else BASE
            if slot != before:
                owner, key = self._owners[name]._parameters, _key(name)
                self._waiting(before)[key] = owner["bias"]
                owner["bias"] = self._waiting(slot).pop(key)
                self._held[name] = slot

    @contextmanager
    def by_row(self, router: Router, wrappers: Mapping[str, nn.Module]) -> Iterator[None]:
        """While it lasts, each row gets the biases of its slot; the model holds the base's.

        ``wrappers``: the name of a module → what stands in its place and is called instead.
        """
        mine = [slot for slot in router.route.slots() if slot in self.slots]
        hooks = []
        try:
            for name in dict.fromkeys(name for slot in mine for name in self.slots[slot]):
                owner = self._owners[name]
                called = wrappers.get(name[: -len(".bias")], owner)
                hooks.append(called.register_forward_hook(self._adder(router, name, owner)))
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _adder(self, router: Router, name: str, owner: nn.Module) -> Any:
        channels_first = isinstance(owner, _ConvNd | _NormBase | nn.GroupNorm)

        def differ(slot: str, rows: Tensor) -> Tensor:
            if name not in self.slots.get(slot, ()):
                return rows
            delta = self._bias(slot, name) - self._bias(BASE, name)
            return rows + (delta.view(-1, *[1] * (rows.dim() - 2)) if channels_first else delta).to(rows.dtype)

        def add(module: nn.Module, inputs: Any, out: Any) -> Tensor:
            if not isinstance(out, Tensor):
                raise AdapterError(
                    f"adapter_names: {name} is in a module with several outputs, whose rows cannot be told"
                )
            route = router.route
            if route.blocks:
                out = route.apply(out, lambda slot, rows, where: differ(slot, rows))
            for slot in route.active:  # inside a module of which one slot has a copy
                out = differ(slot, out)
            found: Tensor = out
            return found

        return add

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
    """The name that a parameter waits under, which may hold no dot."""
    return name.replace(".", "/")
