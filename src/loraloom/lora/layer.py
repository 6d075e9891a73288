"""One frozen module and the slots that adapt it: what every kind of layer has in common. ``layers`` has the kinds.

A layer holds numbers (rank, scale, dropout) and tensors for each slot, never a config. It reads the route from the
model's router and adds the update of the slots that the route names. In-memory names are PEFT's
(``base_layer``, ``lora_A.<slot>.weight``, ...), so state dicts look the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraloom.lora import functional
from loraloom.lora.dispatch import Frame, Router
from loraloom.lora.dropout import DropoutMask, dropout
from loraloom.lora.injection import Wrapper
from loraloom.lora.kinds import forward_of
from loraloom.lora.routing import Route
from loraloom.lora.variants.base import PLAIN, Shapes, Variant

M = TypeVar("M", bound=nn.Module)


class Factor(nn.Module):
    """A tensor of one slot under PEFT's name for it, ``lora_A.<slot>.weight`` or ``lora_B.<slot>.weight``."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

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
    router: Router
    r: dict[str, int]
    scaling: dict[str, float]
    #: slot → its variant, where that is not plain LoRA
    variants: dict[str, Variant]
    #: slot → ``nn.Dropout``, whose ``p`` and ``training`` each forward reads: other code switches dropout off by them.
    lora_dropout: nn.ModuleDict
    #: The slots whose update the weight holds now, and the frozen weight that waits aside meanwhile (in a tuple, so
    #: that it is no parameter of this module).
    merged: tuple[str, ...]
    _frozen: tuple[Tensor, ...]

    def __init__(self, base_layer: nn.Module, router: Router, name: str = "") -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer, self.lora_dropout = base_layer, self._in_my_mode(nn.ModuleDict())
        self.router, self.name, self.merged, self._frozen = router, name, (), ()
        self.r, self.scaling, self.variants = {}, {}, {}

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
        self.lora_dropout[slot] = self._in_my_mode(nn.Dropout(dropout))
        for name, tensor in tensors.items():
            table = nn.ModuleDict if name in ("lora_A", "lora_B") else nn.ParameterDict
            if name not in self._modules:
                setattr(self, name, self._in_my_mode(table()))
            held: Any = self._modules[name]
            held[slot] = self._in_my_mode(Factor(tensor)) if table is nn.ModuleDict else tensor

    def _in_my_mode(self, module: M) -> M:
        """A new part of this layer in its train or eval mode."""
        module.training = self.training
        return module

    def remove_slot(self, slot: str) -> None:
        tables: list[Any] = [table for name, table in self._modules.items() if name.startswith("lora_")]
        for table in (self.r, self.scaling, self.variants, *tables):
            if slot in table:  # not where adding it was cut off
                del table[slot]

    def follow(self, active: tuple[str, ...]) -> None:
        """Note which slots are in use, where a compiled model needs to know."""

    # -- forward ------------------------------------------------------------------------------------------------

    def update(self, slot: str, x: Tensor, times: int = 1) -> Tensor:
        """The low-rank update of one slot for its rows ``x``, each ``times`` places of the first dimension."""
        raise NotImplementedError

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._updated(self.base_layer(input, *args, **kwargs), input)

    def _updated(self, y: Tensor, x: Tensor) -> Tensor:
        """What the frozen layer made of ``x``, plus the updates."""
        if self.merged:
            return y
        if torch.compiler.is_compiling():
            route = self.router.compiled
        else:
            frame = self.router.frame
            route = frame.plan.route
            if frame.plan.probe is not None:
                frame.plan.probe.look(self.name, x)
            frame.inputs.read(self, x)
        if not route.blocks:
            for slot in route.active:
                if slot in self.r:
                    y = self._with_update(slot, y, x, route.times(x))
            return y
        if not self.adapts(route):
            return y
        times = self.router.places(self.name, x, self.leading(x))

        def one(slot: str, rows: Tensor, where: slice | Tensor) -> Tensor:
            return rows if slot not in self.r else self._with_update(slot, rows, x[where], times)

        return route.apply(y, times, one)

    def _with_update(self, slot: str, y: Tensor, x: Tensor, times: int) -> Tensor:
        """What the slot makes of rows ``y`` of the frozen layer's output for ``x``."""
        y = y + self.update(slot, x, times).to(y.dtype)
        gain, bias = self.row_gain(slot), getattr(self.base_layer, "bias", None)
        return y if gain is None else functional.scale_rows(y, gain, bias, self.channels)

    def row_gain(self, slot: str) -> Tensor | None:
        """What the slot's variant multiplies outputs with: see ``Variant``."""
        return None if slot not in self.variants else self.variants[slot].row_gain(self, slot)

    def adapts(self, route: Route) -> bool:
        """Whether some row of a mixed batch goes through an adapter of this layer."""
        return any(block.slot in self.r for block in route.blocks)

    @staticmethod
    def leading(x: Tensor) -> torch.Size:
        """The dimensions of an input that the layer does not compute on."""
        return x.shape[:-1]

    @property
    def channels(self) -> int:
        """The dimension of an output that holds the rows of the weight, from the end."""
        return -1

    @property
    def input_name(self) -> str:
        """What names the dropout of this layer's input."""
        return self.name

    def has_dropout(self, slot: str) -> bool:
        """Whether the slot has dropout, be it off at the moment."""
        return bool(getattr(self.lora_dropout._modules[slot], "p", 0.0))

    def dropout_p(self, slot: str) -> float:
        """The probability that one slot's dropout acts with now: 0 while its module is in eval mode."""
        drop: Any = self.lora_dropout._modules[slot]
        return getattr(drop, "p", 0.0) if drop.training else 0.0

    def dropout_mask(self, slot: str, times: int = 1, frame: Frame | None = None) -> DropoutMask | None:
        """The dropout of one slot in this forward; each row has ``times`` places of the input's first dimension."""
        p = self.dropout_p(slot)
        if not p:
            return None
        return DropoutMask(p, (frame or self.router.frame).dropout_seed(slot, self.input_name, self.name), times)

    def apply_dropout(self, slot: str, x: Tensor, times: int) -> Tensor:
        if torch.compiler.is_compiling():
            return F.dropout(x, self.dropout_p(slot))
        dropped = self.dropout_mask(slot, times)
        return x if dropped is None else dropout(x, dropped)

    # -- merging: see lora.merge, which alone swaps and restores ------------------------------------------------

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
        """The weight that does what the frozen one does with ``slots``, as stored, rounded once at the end."""
        weight = self.rows()
        for slot in slots:
            weight = self.variants.get(slot, PLAIN).merged_weight(self, slot, weight)
        return self.as_stored(weight).to(self.frozen_weight.dtype).contiguous()

    def merge_obstacle(self) -> str | None:
        """Why no weight of this layer could do what its slots do, or None."""
        if forward_of(self.base_layer).differs:
            return f"a {type(self.base_layer).__name__}, which changes its weight before using it"
        return None

    def swap_weight(self, weight: nn.Parameter, slots: tuple[str, ...]) -> None:
        """Put a merged weight in place. The frozen one waits aside, so its return is exact to the bit."""
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
        """What is adapted, as the model holds it now: frozen or merged."""
        weight: Tensor = self.weight
        return weight

    @property
    def like(self) -> tuple[torch.device, torch.dtype]:
        """Where a slot's tensors lie, and the dtype of what the layer computes."""
        return self.frozen_weight.device, self.frozen_weight.dtype

    # -- the face that models expect of the layer they had ------------------------------------------------------

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
