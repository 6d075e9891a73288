"""Biases that adapters train. Each slot has its own copies; the model holds those of the active slot.

So the base's own biases are never written, switching adapters switches biases, and disabling brings the base back.
Biases that the model does not hold now wait here, as parameters like all others: each is in one place at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from loraloom.lora.route import BASE


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
