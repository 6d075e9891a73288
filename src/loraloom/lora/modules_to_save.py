"""A module that adapters train in full (``modules_to_save``): each slot has its own copy beside the original."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.errors import AdapterError
from loraloom.lora.dispatch import Dispatcher
from loraloom.lora.injection import Wrapper, strip, unwrap, unwrapped_state
from loraloom.lora.routing import leading


class ModulesToSaveWrapper(Wrapper):
    """Calls the copy of the route's slot, or the original for slots without one.

    A copy of a half-precision module is kept in float32 for the precision of its updates. Inputs are cast to its dtype,
    outputs back to the original's. Names of children are PEFT's.
    """

    inside, outermost = "original_module", True
    peft_class = ("peft.utils.other", "ModulesToSaveWrapper")

    def __init__(self, original: nn.Module, dispatcher: Dispatcher, name: str = "") -> None:
        super().__init__()
        self.lora_name = name
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.lora_dispatcher = dispatcher
        self.training = self.modules_to_save.training = original.training

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """For peft's own functions, which accelerate calls: of this module's tensors those of one adapter's copy."""
        return {key: state_dict[name] for key, name in self.adapter_state_dict_load_map(adapter_name).items()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """For the same: names in a file → names here."""
        there = self.modules_to_save[adapter_name] if adapter_name in self.modules_to_save else nn.Module()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in there.state_dict()}

    def new_copy(self, dtype: torch.dtype | None) -> nn.Module:
        """A trainable copy of the original without adapters, floating tensors in ``dtype`` (None: as they are)."""
        module = copy.deepcopy(unwrap(self.original_module))
        strip(module)
        module.requires_grad_(True)
        return module if dtype is None else module.to(dtype)

    def own_dtypes(self, slot: str) -> Iterator[tuple[Tensor, torch.dtype]]:
        """Every floating tensor of the slot's copy with the dtype that it has in the original."""
        original = unwrapped_state(self.original_module)
        for key, tensor in self.tensors(slot).items():
            if tensor.is_floating_point() and key in original:
                yield tensor, original[key].dtype

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(self.modules_to_save)

    def tensors(self, slot: str) -> dict[str, Tensor]:
        return self.modules_to_save[slot].state_dict(keep_vars=True)

    def remove_slot(self, slot: str) -> None:
        if slot in self.modules_to_save:
            del self.modules_to_save[slot]

    def removed(self, keep_copies: bool = False) -> nn.Module:
        # A copy gets the dtypes of the original, which callers expect. Its tensors stay the same objects, so copies
        # that share one still share it.
        module = self.current() if keep_copies else self.original_module
        for slot, copied in self.modules_to_save.items():
            if copied is module:
                for tensor, dtype in self.own_dtypes(slot):
                    tensor.data = tensor.data.to(dtype)
        return module

    def current(self) -> nn.Module:
        copies = [slot for slot in self.lora_dispatcher.route.active if slot in self.modules_to_save]
        if len(copies) > 1:
            raise AdapterError(
                f"set_adapter: {' and '.join(map(repr, copies))} each train their own copy of this module, "
                "so they cannot be active together; set one of them, or route rows by adapter_names"
            )
        return self.modules_to_save[copies[0]] if copies else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plan = self.lora_dispatcher.frame.plan
        route = plan.route
        if plan.probe is not None and (args or kwargs):
            plan.probe.observe(self.lora_name, args[0] if args else next(iter(kwargs.values())))
        if not route.blocks:
            return self._call(self.current(), *args, **kwargs)
        if not any(block.slot in self.modules_to_save for block in route.blocks):
            return self.original_module(*args, **kwargs)
        key = "" if args else next(iter(kwargs))  # the input is positional or a keyword
        x = args[0] if args else kwargs[key]

        def one(slot: str, rows: Tensor, where: slice | Tensor) -> Tensor:
            module = self.modules_to_save[slot] if slot in self.modules_to_save else self.original_module  # noqa: SIM401
            placed, named = ((rows, *args[1:]), kwargs) if args else ((), {**kwargs, key: rows})
            with self.lora_dispatcher.with_route(route.alone(slot)):  # for the layers inside
                out: Tensor = self._call(module, *placed, **named)
            return out

        return route.apply(x, self.lora_dispatcher.places(self.lora_name, x, leading(x)), one)

    def _call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inside, outside = _dtypes(module), _dtypes(self.original_module)
        if module is self.original_module or inside == outside:
            return module(*args, **kwargs)
        out = module(*(_cast(a, inside[0]) for a in args), **{k: _cast(v, inside[0]) for k, v in kwargs.items()})
        return _cast(out, outside[-1])  # the last tensor's dtype is that of the output


def _dtypes(module: nn.Module) -> list[torch.dtype]:
    return [tensor.dtype for tensor in unwrapped_state(module).values() if tensor.is_floating_point()]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return value
