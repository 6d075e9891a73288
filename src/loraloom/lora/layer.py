"""A frozen module and the slots that adapt it: what all kinds of layers share. ``layers`` has the kinds.

A layer holds numbers (rank, scale, dropout) and tensors for each slot, never a config. It reads the route from the
model's dispatcher and adds the updates of the route's slots. The names of children are PEFT's (``base_layer``,
``lora_A.<slot>.weight``, ...), so state dicts are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraloom.lora import functional
from loraloom.lora.dispatch import Dispatcher, Frame
from loraloom.lora.dropout import DropoutMask, dropout
from loraloom.lora.injection import Wrapper, register
from loraloom.lora.kinds import forward_of
from loraloom.lora.routing import Route
from loraloom.lora.variants.base import PLAIN, Shapes, Variant


class Factor(nn.Module):
    """A tensor of one slot under PEFT's name for it, ``lora_A.<slot>.weight`` or ``lora_B.<slot>.weight``."""

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter, training: bool) -> None:
        super().__init__()
        register(self, training, {"_parameters": {"weight": weight}})

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"


class LoraLayer(Wrapper):
    """A frozen ``base_layer`` and, for each slot that adapts it, tensors: ``A``, ``B`` and those of its variant."""

    kind = ""
    inside = "base_layer"
    peft_class = ("peft.tuners.lora.layer", "LoraLayer")
    #: The base module's name in the model.
    name: str
    base_layer: nn.Module
    dispatcher: Dispatcher
    r: dict[str, int]
    scaling: dict[str, float]
    #: slot → its variant, where that is not plain LoRA
    variants: dict[str, Variant]
    #: slot → ``nn.Dropout``. Each forward reads its ``p`` and ``training``, through which other code disables dropout.
    lora_dropout: nn.ModuleDict
    #: The slots that are merged into the weight, and the frozen weight meanwhile (in a tuple, so that it is not a
    #: parameter of this module).
    merged: tuple[str, ...]
    _frozen: tuple[Tensor, ...]

    def __init__(self, base_layer: nn.Module, dispatcher: Dispatcher, name: str = "") -> None:
        super().__init__()
        dropouts = nn.ModuleDict()
        register(dropouts, base_layer.training, {})
        register(self, base_layer.training, {"_modules": {"base_layer": base_layer, "lora_dropout": dropouts}})
        vars(self).update(dispatcher=dispatcher, name=name, merged=(), _frozen=(), r={}, scaling={}, variants={})

    # -- shapes and slots ---------------------------------------------------------------------------------------

    @staticmethod
    def shapes(base: nn.Module, r: int, name: str) -> Shapes:
        """The shapes of A and B of rank ``r`` around ``base``, for the target ``name``."""
        raise NotImplementedError

    def shapes_of(self, r: int) -> Shapes:
        """The shapes of A and B of rank ``r`` for this layer."""
        return self.shapes(self.get_base_layer(), r, self.name)

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(self.r)

    def tensors(self, slot: str) -> dict[str, nn.Parameter]:
        """The tensors of a slot by name: ``lora_A``, ``lora_B`` (of an embedding ``lora_embedding_A``, ...) first."""
        modules: Any = self._modules
        names = [name for name in modules if name.startswith("lora_") and name != "lora_dropout"]
        held = {name: modules[name][slot] for name in names if slot in modules[name]}
        return {name: one.weight if isinstance(one, Factor) else one for name, one in held.items()}

    def factors(self, slot: str) -> tuple[nn.Parameter, nn.Parameter]:
        """``A`` [r, in, ...] and ``B`` [out, r, ...]."""
        modules: Any = self._modules
        return modules["lora_A"]._modules[slot].weight, modules["lora_B"]._modules[slot].weight

    def add_slot(
        self,
        slot: str,
        tensors: Mapping[str, nn.Parameter],
        r: int,
        scale: float,
        dropout: float,
        variant: Variant = PLAIN,
    ) -> None:
        self.r[slot], self.scaling[slot] = r, scale
        if variant is not PLAIN:
            self.variants[slot] = variant
        part = nn.Dropout(dropout)
        register(part, self.training, {})
        register(self.lora_dropout, self.training, {"_modules": {slot: part}})
        for name, tensor in tensors.items():
            if name not in self._modules:
                new = nn.ModuleDict() if name in ("lora_A", "lora_B") else nn.ParameterDict()
                register(new, self.training, {})
                register(self, self.training, {"_modules": {name: new}})
            table: Any = self._modules[name]
            if isinstance(table, nn.ModuleDict):
                register(table, self.training, {"_modules": {slot: Factor(tensor, self.training)}})
            else:
                table[slot] = tensor

    def remove_slot(self, slot: str) -> None:
        tables: list[Any] = [table for name, table in self._modules.items() if name.startswith("lora_")]
        for table in (self.r, self.scaling, self.variants, *tables):
            if slot in table:  # not where adding it was cut off
                del table[slot]

    def cache_active(self, active: tuple[str, ...]) -> None:
        """Store the active slot's tensors for compiled code, in layers that support it."""

    # -- forward ------------------------------------------------------------------------------------------------

    def update(self, slot: str, x: Tensor, times: int = 1) -> Tensor:
        """The low-rank update of one slot for its rows ``x``, with ``times`` places of the first dimension per row."""
        raise NotImplementedError

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._updated(self.base_layer(input, *args, **kwargs), input)

    def _updated(self, y: Tensor, x: Tensor) -> Tensor:
        """The frozen layer's output ``y`` for ``x``, plus the updates."""
        if self.merged:
            return y
        if torch.compiler.is_compiling():
            route = self.dispatcher.compiled
        else:
            frame = self.dispatcher.frame
            route = frame.plan.route
            if frame.plan.probe is not None:
                frame.plan.probe.observe(self.name, x)
            frame.inputs.read(self, x)
        if not route.blocks:
            for slot in route.active:
                if slot in self.r:
                    y = self._with_update(slot, y, x, route.times(x))
            return y
        if not self.adapts(route):
            return y
        times = self.dispatcher.places(self.name, x, self.leading(x))

        def one(slot: str, rows: Tensor, where: slice | Tensor) -> Tensor:
            return rows if slot not in self.r else self._with_update(slot, rows, x[where], times)

        return route.apply(y, times, one)

    def _with_update(self, slot: str, y: Tensor, x: Tensor, times: int) -> Tensor:
        """Rows ``y`` of the frozen layer's output for ``x``, with the slot's update and gain."""
        y = y + self.update(slot, x, times).to(y.dtype)
        gain, bias = self.row_gain(slot), getattr(self.base_layer, "bias", None)
        return y if gain is None else functional.scale_rows(y, gain, bias, self.channels)

    def row_gain(self, slot: str) -> Tensor | None:
        """The gain [out] of the slot's variant, None for 1: see ``Variant``."""
        return None if slot not in self.variants else self.variants[slot].row_gain(self, slot)

    def adapts(self, route: Route) -> bool:
        """Whether some row of a mixed batch goes through an adapter of this layer."""
        return any(block.slot in self.r for block in route.blocks)

    @staticmethod
    def leading(x: Tensor) -> torch.Size:
        """The batch dimensions of an input."""
        return x.shape[:-1]

    @property
    def channels(self) -> int:
        """The output's dimension of size ``out``, counted from the end."""
        return -1

    @property
    def input_name(self) -> str:
        """The name from which the dropout seed of this layer's input follows."""
        return self.name

    def has_dropout(self, slot: str) -> bool:
        """Whether the slot has dropout, even if it is off at the moment."""
        return bool(getattr(self.lora_dropout._modules[slot], "p", 0.0))

    def dropout_p(self, slot: str) -> float:
        """The slot's present dropout probability: 0 while its module is in eval mode."""
        drop: Any = self.lora_dropout._modules[slot]
        return getattr(drop, "p", 0.0) if drop.training else 0.0

    def dropout_mask(self, slot: str, times: int = 1, frame: Frame | None = None) -> DropoutMask | None:
        """The dropout of one slot in this forward, None if off. A row has ``times`` places of the first dimension."""
        p = self.dropout_p(slot)
        if not p:
            return None
        return DropoutMask(p, (frame or self.dispatcher.frame).dropout_seed(slot, self.input_name, self.name), times)

    def apply_dropout(self, slot: str, x: Tensor, times: int) -> Tensor:
        if torch.compiler.is_compiling():
            return F.dropout(x, self.dropout_p(slot))
        dropped = self.dropout_mask(slot, times)
        return x if dropped is None else dropout(x, dropped)

    # -- merging: only lora.merge swaps and restores weights ----------------------------------------------------

    def get_delta_weight(self, slot: str) -> Tensor:
        """``scale · B A`` in the shape of the frozen weight, in at least float32."""
        return self.as_stored(self.delta(slot))

    def delta(self, slot: str) -> Tensor:
        """``scale · B A`` [out, in, ...] in at least float32."""
        a, b = self.factors(slot)
        return functional.product(a.detach(), b.detach()) * self.scaling[slot]

    def rows(self) -> Tensor:
        """The frozen weight [out, in, ...], dense."""
        return self.as_stored(self.frozen_weight.detach())

    @staticmethod
    def as_stored(rows: Tensor) -> Tensor:
        """A weight [out, in, ...] as the base stores it, and back."""
        return rows

    def merged_weight(self, slots: tuple[str, ...]) -> Tensor:
        """The frozen weight with ``slots`` merged, as stored; rounded once, at the end."""
        weight = self.rows()
        for slot in slots:
            weight = self.variants.get(slot, PLAIN).merged_weight(self, slot, weight)
        return self.as_stored(weight).to(self.frozen_weight.dtype).contiguous()

    def merge_obstacle(self) -> str | None:
        """Why the updates cannot be merged into the weight, or None."""
        if forward_of(self.base_layer).differs:
            return f"a {type(self.base_layer).__name__}, which changes its weight before using it"
        return None

    def swap_weight(self, weight: nn.Parameter, slots: tuple[str, ...]) -> None:
        """Install a merged weight. The frozen one is kept, so that restoring it is exact to the bit."""
        self._frozen = self._frozen or (self.live_weight,)
        self._put_weight(weight)
        self.merged = slots

    def restore_weight(self) -> None:
        if self._frozen:
            self._put_weight(self._frozen[0])
        self.merged, self._frozen = (), ()

    def _put_weight(self, weight: Any) -> None:
        self.base_layer.weight = weight

    @property
    def frozen_weight(self) -> Tensor:
        return self._frozen[0] if self._frozen else self.live_weight

    @property
    def live_weight(self) -> Tensor:
        """The adapted weight as the model holds it now: frozen or merged."""
        weight: Tensor = self.weight
        return weight

    @property
    def like(self) -> tuple[torch.device, torch.dtype]:
        """The device of a slot's tensors, and the dtype that the layer computes in."""
        return self.frozen_weight.device, self.frozen_weight.dtype

    # -- attributes that models expect of their layer -----------------------------------------------------------

    @property
    def merged_adapters(self) -> list[str]:
        return list(self.merged)

    @property
    def in_features(self) -> int:
        """Width of the input: of a convolution its channels, of an embedding its vocabulary."""
        return next(iter(self.shapes_of(1).values()))[1]

    @property
    def out_features(self) -> int:
        return list(self.shapes_of(1).values())[1][0]

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def removed(self, keep_copies: bool = False) -> nn.Module:
        return self.base_layer.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for weight in self._frozen:
            weight.data = fn(weight.data)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{slot}: r={self.r[slot]}, scale={self.scaling[slot]:g}" for slot in self.r)
