"""Biases that adapters train. Each slot has its own copies; the model holds those of the active slot.

So the base's own biases are never written, switching adapters switches biases, and disabling brings the base back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


class Biases:
    def __init__(self) -> None:
        #: slot → parameter name → that slot's bias
        self.slots: dict[str, dict[str, nn.Parameter]] = {}
        self._owners: dict[str, nn.Module] = {}
        self._base: dict[str, nn.Parameter] = {}

    def add(self, slot: str, owners: Mapping[str, nn.Module]) -> None:
        """``owners``: parameter name → the module whose ``bias`` it is."""
        if not owners:
            return
        for name, module in owners.items():
            bias = module._parameters["bias"]
            assert bias is not None
            self._owners[name] = module
            self._base.setdefault(name, bias)
        self.slots[slot] = {name: nn.Parameter(self._base[name].detach().clone()) for name in owners}

    def remove(self, slot: str) -> None:
        self.slots.pop(slot, None)

    def install(self, active: Sequence[str]) -> None:
        """Let the model hold the biases of the active slot that has some, and the base's own for the rest."""
        chosen = next((self.slots[slot] for slot in active if slot in self.slots), {})
        for name, module in self._owners.items():
            module._parameters["bias"] = chosen.get(name, self._base[name])

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What ``Module._apply`` does (move, cast), for the biases that the model does not hold now."""
        held = {id(module._parameters["bias"]) for module in self._owners.values()}
        with torch.no_grad():
            for bias in (*self._base.values(), *(b for slot in self.slots.values() for b in slot.values())):
                if id(bias) not in held:
                    grad, bias.grad = bias.grad, None
                    bias.data = fn(bias.data)
                    bias.grad = None if grad is None else fn(grad)
