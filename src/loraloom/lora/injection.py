"""Wrappers put around a model's modules, wherever they hang, and taken off again."""

from __future__ import annotations

from torch import nn

from loraloom.errors import AdapterError
from loraloom.lora.layer import LoraLayer
from loraloom.lora.modules_to_save import ModulesToSaveWrapper, unwrap


class ModuleLocator:
    """Where every base module hangs in a model, found when the first wrapper is placed: later adapters need none."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held: dict[int, list[tuple[nn.Module, str]]] = {}

    def replace(self, module: nn.Module, wrapper: nn.Module) -> None:
        """Put ``wrapper`` around ``module``. A ``ModulesToSaveWrapper`` stays outside a ``LoraLayer``."""
        if not self._held:
            self._find()
        if not self._held.get(id(module)):
            raise AdapterError("target_modules: the model itself cannot be wrapped; put it inside another module")
        for parent, key in self._held[id(module)]:
            held = parent._modules[key]
            if isinstance(wrapper, LoraLayer) and isinstance(inner := _inside(held), LoraLayer):
                wrapper.base_layer = inner  # another parameter of the same module
            if isinstance(held, ModulesToSaveWrapper):
                held.original_module = wrapper
            else:
                if isinstance(wrapper, ModulesToSaveWrapper) and held is not None:
                    wrapper.original_module = held
                parent._modules[key] = wrapper

    def _find(self) -> None:
        """Base module → every (parent, attribute) that holds it, wrapped or not."""
        mine: set[nn.Module] = set()  # the dictionaries of slots; others are the model's own
        for parent in self._model.modules():
            if isinstance(parent, LoraLayer | ModulesToSaveWrapper):
                mine.update(child for child in parent.children() if isinstance(child, nn.ModuleDict))
            elif parent not in mine:
                for key, child in parent._modules.items():
                    if child is not None:
                        self._held.setdefault(id(unwrap(child)), []).append((parent, key))


def _inside(held: nn.Module | None) -> nn.Module | None:
    return held.original_module if isinstance(held, ModulesToSaveWrapper) else held


def strip(model: nn.Module, *, only_empty: bool = False, keep_copies: bool = False) -> None:
    """Take wrappers off: all, or those without a slot. ``keep_copies`` leaves the active copy of saved modules."""
    for parent in list(model.modules()):
        if isinstance(parent, LoraLayer | ModulesToSaveWrapper) and not only_empty:
            continue
        for key, child in list(parent._modules.items()):
            while isinstance(child, LoraLayer | ModulesToSaveWrapper):
                if isinstance(child, LoraLayer):
                    inner: nn.Module = child.base_layer
                    keep = bool(child.slots)
                else:
                    inner = child.in_place_of_original() if keep_copies else child.original_module
                    keep = len(child.modules_to_save) > 0
                if only_empty and keep:
                    break
                inner.train(child.training) if isinstance(child, LoraLayer) else None
                parent._modules[key] = child = inner
