"""The parts of adapters: tensors in layers, copies of modules, biases, and the keys of all these in a file.

Does not know which adapters are active, merged or disabled: see ``routed`` and ``adapters``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from loraloom.lora.biases import Biases
from loraloom.lora.dispatch import Dispatcher
from loraloom.lora.frozen import HALF, adapter_dtype
from loraloom.lora.initialize import seed_of
from loraloom.lora.injection import ModuleLocator, strip
from loraloom.lora.keys import file_key, places, tensor_key
from loraloom.lora.layer import LoraLayer
from loraloom.lora.layers import layer_class
from loraloom.lora.modules_to_save import ModulesToSaveWrapper
from loraloom.lora.parameters import LoraParameter
from loraloom.lora.targets import Plan, Target
from loraloom.lora.variants import variant_of


class Slots:
    """The slots of all adapters in ``model``, whose modules are wrapped in place."""

    def __init__(self, model: nn.Module, dispatcher: Dispatcher) -> None:
        self._model, self._dispatcher = model, dispatcher
        #: by the names of the modules that they wrap, or of the parameters that they adapt
        self.layers: dict[str, LoraLayer] = {}
        self.saved: dict[str, ModulesToSaveWrapper] = {}
        self.biases = Biases()

    def add(
        self,
        slot: str,
        made: Plan,
        modules: dict[str, nn.Module],
        seed: int,
        autocast: bool,
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Give ``slot`` its place in every layer of ``made``.

        Args:
            modules: the base's, by name.
            autocast: keep a slot's tensors in float32 where the layer computes in half precision.
            tensors: a file's. The slot's tensors of the same key and shape start uninitialised: the caller fills them.
        """
        self._dispatcher.reset()
        locator, variant = ModuleLocator(self._model), variant_of(made.config)
        there = places([(target.name, target.kind) for target in made.targets])
        for target in made.targets:
            layer = self._layer(target, modules, locator)
            shapes = variant.shapes(layer.shapes_of(target.r))
            given = {name: tensors.get(tensor_key(there[target.name], name)) for name in shapes}
            if {name: tuple(t.shape) for name, t in given.items() if t is not None} == shapes:
                new = {name: torch.empty(shape) for name, shape in shapes.items()}
            else:  # the caller reports tensors of other shapes
                new = variant.start(layer, shapes, made.config, target.r, seed_of(seed, target.name))
            device, dtype = layer.like
            to, trained = (device, adapter_dtype(dtype, autocast)), not made.config.inference_mode
            parameters = {name: nn.Parameter(tensor.to(*to), trained) for name, tensor in new.items()}
            layer.add_slot(slot, parameters, target.r, target.scale, made.config.lora_dropout, variant)
        self.biases.install(())  # a copy starts from the base's biases
        self._add_copies(slot, [extra.name for extra in made.saved], modules, locator, autocast)
        self.biases.add(slot, {extra.name: modules[extra.name[: -len(".bias")]] for extra in made.biases})
        self.biases.hook(self._dispatcher, self.layers)

    def _layer(self, target: Target, modules: Mapping[str, nn.Module], locator: ModuleLocator) -> LoraLayer:
        layer = self.layers.get(target.name)
        if layer is None:
            parameter = target.kind == LoraParameter.kind
            module = modules[target.name.rpartition(".")[0] if parameter else target.name]
            cls = LoraParameter if parameter else layer_class(module)
            assert cls is not None
            layer = cls(module, self._dispatcher, target.name)
            locator.wrap(module, layer)
            self.layers[target.name] = layer
        return layer

    def _add_copies(
        self, slot: str, names: Iterable[str], modules: dict[str, nn.Module], locator: ModuleLocator, autocast: bool
    ) -> None:
        twins: dict[int, nn.Parameter] = {}
        for name in names:
            wrapper = self.saved.get(name)
            if wrapper is None:
                wrapper = self.saved[name] = ModulesToSaveWrapper(modules[name], self._dispatcher, name)
                locator.wrap(modules[name], wrapper)
            half = any(p.dtype in HALF for p in modules[name].parameters())
            module = wrapper.new_copy(torch.float32 if autocast and half else None)
            # Parameters that are tied in the base are tied in the copies.
            for leaf, original in modules[name]._parameters.items():
                mine = module._parameters[leaf]
                if original is not None and mine is not None:
                    module._parameters[leaf] = twins.setdefault(original.data_ptr() or id(original), mine)
            wrapper.modules_to_save[slot] = module

    def remove(self, slot: str) -> None:
        """Remove an inactive slot, also one that was added only in part, and the wrappers that have no slot left."""
        for wrapper in (*self.layers.values(), *self.saved.values()):
            wrapper.remove_slot(slot)
        self.biases.remove(slot)
        strip(self._model, only_empty=True)
        self.layers = {name: layer for name, layer in self.layers.items() if layer.slots}
        self.saved = {name: wrapper for name, wrapper in self.saved.items() if wrapper.slots}
        self.biases.hook(self._dispatcher, self.layers)
        self._dispatcher.reset()

    def clear(self) -> None:
        """Forget all slots, after their wrappers were removed from the model."""
        self.biases.unhook()
        self.layers, self.saved, self.biases = {}, {}, Biases()
        self._dispatcher.reset()

    def exclusive(self, what: str, made: Plan) -> AbstractContextManager[None]:
        """A lock for adding ``made``. Other threads may run the model meanwhile, unless biases of it change."""
        return self._dispatcher.exclusive(what) if self.biases.slots or made.biases else nullcontext()

    def tensors_of(self, slot: str) -> dict[str, Tensor]:
        """Every tensor of one slot, live, under PEFT's key for it in a file (with ``base_model.model.``)."""
        out: dict[str, Tensor] = {}
        mine = {name: layer for name, layer in self.layers.items() if slot in layer.slots}
        there = places([(name, layer.kind) for name, layer in mine.items()])
        for name, layer in mine.items():
            out.update({tensor_key(there[name], key): tensor for key, tensor in layer.tensors(slot).items()})
        for name, wrapper in self.saved.items():
            if slot in wrapper.slots:
                out.update({file_key(f"{name}.{key}"): tensor for key, tensor in wrapper.tensors(slot).items()})
        for name, bias in self.biases.of(slot).items():
            owner = name[: -len(".bias")]
            out[file_key(f"{owner}{'.base_layer' if owner in mine else ''}.bias")] = bias
        return out

    def owners(self) -> dict[str, set[str]]:
        """What slots have own copies of → these slots. Two with copies of the same thing cannot be active together."""
        copies = {name: set(wrapper.slots) for name, wrapper in self.saved.items()}
        return {"biases": set(self.biases.slots), **copies}
