"""LoRA around one frozen layer: Linear, transformers' Conv1D, Embedding, Conv1d, Conv2d, Conv3d.

A layer holds numbers (rank, scale, dropout) and factors for each slot, never a config. It reads the route from the
model's router and adds the update of the slots that the route names. In-memory names are PEFT's
(``base_layer``, ``lora_A.<slot>.weight``, ...), so state dicts look the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from loraloom.config.peft_compat import seen_as
from loraloom.lora import functional
from loraloom.lora.dispatch import Frame, Router
from loraloom.lora.dropout import Dropped, dropout
from loraloom.lora.kinds import conv1d, forward_of, is_map
from loraloom.lora.routing import Route

HALF = (torch.float16, torch.bfloat16)


class Factor(nn.Module):
    """One factor of one slot: ``weight`` is A [r, in, ...] or B [out, r, ...]."""

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter, training: bool) -> None:
        super().__init__()
        # Hundreds are made at once, and the checks of Module.__setattr__ would cost more than all the rest.
        self._parameters["weight"] = weight
        vars(self)["training"] = training

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"


class LoraLayer(nn.Module):
    """A frozen ``base_layer`` and, for each slot that adapts it, factors ``A`` and ``B``."""

    kind = ""
    #: PEFT's class for such a layer.
    peft_name = "LoraLayer"
    #: The base module's name in the model.
    name: str
    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    router: Router
    r: dict[str, int]
    scaling: dict[str, float]
    #: slot → ``nn.Dropout``, whose ``p`` and ``training`` each forward reads: other code switches dropout off by them.
    lora_dropout: nn.ModuleDict
    #: The slots whose update the weight holds now, and the frozen weight that waits aside meanwhile (in a tuple, so
    #: that it is no parameter of this module).
    merged: tuple[str, ...]
    _frozen: tuple[Tensor, ...]

    def __init__(self, base_layer: nn.Module, router: Router, name: str = "") -> None:
        super().__init__()
        # Straight into the tables, as in Factor.
        self._modules.update(
            base_layer=base_layer, lora_dropout=nn.ModuleDict(), lora_A=nn.ModuleDict(), lora_B=nn.ModuleDict()
        )
        vars(self).update(router=router, name=name, r={}, scaling={}, merged=(), _frozen=(), _current=None)
        for module in (self, self.lora_dropout, self.lora_A, self.lora_B):
            vars(module)["training"] = base_layer.training

    # -- shapes and slots ---------------------------------------------------------------------------------------

    @staticmethod
    def shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B of rank ``r`` around ``base``."""
        raise NotImplementedError

    def shapes_of(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B of rank ``r`` for this layer."""
        return self.shapes(self.base_layer, r)

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(self.r)

    def factors(self, slot: str) -> tuple[nn.Parameter, nn.Parameter]:
        a, b = self.lora_A[slot], self.lora_B[slot]
        assert isinstance(a, Factor)
        assert isinstance(b, Factor)
        return a.weight, b.weight

    def add_slot(self, slot: str, a: nn.Parameter, b: nn.Parameter, r: int, scale: float, dropout: float) -> None:
        self.r[slot], self.scaling[slot] = r, scale
        drop = self.lora_dropout._modules[slot] = nn.Dropout(dropout)
        vars(drop)["training"] = self.training
        self._place(slot, a, b)

    def _place(self, slot: str, a: nn.Parameter, b: nn.Parameter) -> None:
        self.lora_A._modules[slot], self.lora_B._modules[slot] = Factor(a, self.training), Factor(b, self.training)

    def remove_slot(self, slot: str) -> None:
        for table in (self.r, self.scaling, self.lora_dropout, self.lora_A, self.lora_B):
            if slot in table:  # not where adding it was cut off
                del table[slot]

    def follow(self, active: tuple[str, ...]) -> None:
        """Note which slots are in use, where a compiled model needs to know."""

    # -- forward ------------------------------------------------------------------------------------------------

    def update(self, slot: str, x: Tensor, times: int = 1) -> Tensor:
        """The low-rank update of one slot for its rows ``x``, each ``times`` places of the first dimension."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._updated(self.base_layer(x, *args, **kwargs), x)

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
            frame.reading.read(self, x)
        if not route.blocks:
            for slot in route.active:
                if slot in self.r:
                    y = y + self.update(slot, x, route.times(x)).to(y.dtype)
            return y
        if not self.adapts(route):
            return y
        times = self.router.places(self.name, x, self.leading(x))

        def one(slot: str, rows: Tensor, where: slice | Tensor) -> Tensor:
            return rows if slot not in self.r else rows + self.update(slot, x[where], times).to(rows.dtype)

        return route.apply(y, times, one)

    def adapts(self, route: Route) -> bool:
        """Whether some row of a mixed batch goes through an adapter of this layer."""
        return any(block.slot in self.r for block in route.blocks)

    @staticmethod
    def leading(x: Tensor) -> torch.Size:
        """The dimensions of an input that the layer does not compute on."""
        return x.shape[:-1]

    @property
    def input_name(self) -> str:
        """What names the dropout of this layer's input."""
        return self.name

    def drops(self, slot: str) -> bool:
        """Whether the slot has dropout, be it off at the moment."""
        return bool(getattr(self.lora_dropout._modules[slot], "p", 0.0))

    def dropout_p(self, slot: str) -> float:
        """The probability that one slot's dropout acts with now: 0 while its module is in eval mode."""
        drop: Any = self.lora_dropout._modules[slot]
        return getattr(drop, "p", 0.0) if drop.training else 0.0

    def dropped(self, slot: str, times: int = 1, frame: Frame | None = None) -> Dropped | None:
        """The dropout of one slot in this forward; each row has ``times`` places of the input's first dimension."""
        p = self.dropout_p(slot)
        if not p:
            return None
        return Dropped(p, (frame or self.router.frame).dropout_seed(slot, self.input_name, self.name), times)

    def drop(self, slot: str, x: Tensor, times: int) -> Tensor:
        if torch.compiler.is_compiling():
            return F.dropout(x, self.dropout_p(slot))
        dropped = self.dropped(slot, times)
        return x if dropped is None else dropout(x, dropped)

    # -- merging: see lora.merge, which alone calls these -------------------------------------------------------

    def get_delta_weight(self, slot: str) -> Tensor:
        """``scale · B A`` in the shape of the frozen weight, in at least float32."""
        a, b = self.factors(slot)
        return functional.product(a.detach(), b.detach()) * self.scaling[slot]

    def merge_obstacle(self) -> str | None:
        """Why no weight of this layer could do what its slots do, or None."""
        if forward_of(self.base_layer).differs:
            return f"a {type(self.base_layer).__name__}, which changes its weight before using it"
        return None

    def swap_weight(self, weight: nn.Parameter, slots: tuple[str, ...]) -> None:
        """Put a merged weight in place. The frozen one waits aside, so its return is exact to the bit."""
        if not self._frozen:
            self._frozen = (self.live_weight,)
        self.base_layer.weight = weight
        self.merged = slots

    def restore_weight(self) -> None:
        if self._frozen:
            (self.base_layer.weight,) = self._frozen
        self.merged, self._frozen = (), ()

    @property
    def frozen_weight(self) -> Tensor:
        return self._frozen[0] if self._frozen else self.live_weight

    @property
    def live_weight(self) -> Tensor:
        """What is adapted, as the model holds it now: frozen or merged."""
        return self.weight

    # -- what others see: see config/peft_compat.py ------------------------------------------------------------------

    @property
    def __class__(self) -> type:
        return seen_as(type(self), "peft.tuners.lora.layer", self.peft_name)

    @__class__.setter
    def __class__(self, cls: type) -> None:  # also how FSDP2 marks a module
        object.__dict__["__class__"].__set__(self, cls)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (type(self),), vars(self)  # pickle's own way asks for the class that others see

    # -- the face that models expect of the layer they had ------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """No parameter while FSDP lends it out as a view of its flat one, which models read the dtype of."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    @property
    def merged_adapters(self) -> list[str]:
        return list(self.merged)

    @property
    def in_features(self) -> int:
        """Width of the input: of a convolution its channels, of an embedding its vocabulary."""
        return self._width("in_features", "in_channels", "num_embeddings", "nx")

    @property
    def out_features(self) -> int:
        return self._width("out_features", "out_channels", "embedding_dim", "nf")

    def _width(self, *names: str) -> int:
        found = next((getattr(self.base_layer, name) for name in names if hasattr(self.base_layer, name)), None)
        if found is None:
            raise AttributeError(f"{type(self.base_layer).__name__} has no {names[0]}")
        return int(found)

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoraLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for weight in self._frozen:
            weight.data = fn(weight.data)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{slot}: r={self.r[slot]}, scale={self.scaling[slot]:g}" for slot in self.r)


class LoraLinear(LoraLayer):
    """Weight [out, in]."""

    kind = "Linear"
    peft_name = "Linear"
    #: A, B, scale and dropout module of the one slot in use. A compiled model reads these and no names, so that another
    #: adapter of the same shapes can take the place without compiling anew.
    _current: tuple[Tensor, Tensor, float, Any] | None = None

    @staticmethod
    def shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert isinstance(base, nn.Linear)
        return (r, base.in_features), (base.out_features, r)

    def follow(self, active: tuple[str, ...]) -> None:
        # Straight from the tables, as in Factor: every layer does this whenever an adapter is switched.
        mine, state = [slot for slot in active if slot in self.r], vars(self)
        state["_current"] = None
        if len(mine) == 1 and not self.merged:
            a, b = (state["_modules"][name]._modules[mine[0]]._parameters["weight"] for name in ("lora_A", "lora_B"))
            state["_current"] = (a, b, self.scaling[mine[0]], self.lora_dropout._modules[mine[0]])

    def update(self, slot: str, x: Tensor, times: int = 1) -> Tensor:
        return functional.lora_linear(self.drop(slot, x, times), *self.factors(slot), self.scaling[slot])

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if torch.compiler.is_compiling() and self._current is not None:
            a, b, scale, drop = self._current
            seen = F.dropout(input, drop.p) if drop.training else input
            y: Tensor = self.base_layer(input, *args, **kwargs)
            return y + functional.lora_linear(seen, a, b, scale).to(y.dtype)
        if torch.compiler.is_compiling() or not self.fits(input, frame := self.router.frame):
            return super().forward(input, *args, **kwargs)
        return frame.reading.project(self, input, frame, self.router.lanes)

    def fits(self, x: Tensor, frame: Frame) -> bool:
        """Whether ``functional.lora_projections`` can do what this layer is to do with ``x``.

        Elsewhere the frozen layer is called as the module that it is: rows in another order than the slots', another
        kind of weight (quantised, sharded, trained), hooks on it, autocast, and whatever traces the model. A layer that
        the route leaves alone fits as well: what is computed together must not depend on who is there.
        """
        base = self._modules["base_layer"]
        assert base is not None
        weight = base._parameters.get("weight")
        return not (
            self.merged
            or not self._goes_by_rows(x, frame)
            or not is_map(base)
            or type(weight) is not nn.Parameter
            or weight.requires_grad
            or weight.dtype != x.dtype
            or any((base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks))
            or "forward" in vars(base)
            or torch._C._get_tracing_state() is not None
            or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
        )

    def _goes_by_rows(self, x: Tensor, frame: Frame) -> bool:
        """Whether the route has slots for ``x``, and its rows lie slot by slot."""
        route = frame.plan.route
        if not route.blocks:
            return bool(route.active)
        if route.order is not None or x.dim() < 2:
            return False
        if self.adapts(route):
            self.router.places(self.name, x, self.leading(x))
        return True

    @property
    def input_name(self) -> str:
        """The module that holds this layer: its layers that read one input share its dropout.

        A name, and not who reads what: the mask of a slot must be the same whatever layers other slots adapt.
        """
        return self.name.rpartition(".")[0]

    def shares_dropout(self, first: LoraLinear) -> bool:
        """Whether dropout, if there is any now, is that of ``first``, which reads the same input."""
        return self.input_name == first.input_name or not any(map(self.dropout_p, self.r))

    @property
    def frozen(self) -> functional.Frozen:
        base = self._modules["base_layer"]
        assert base is not None
        weight = base._parameters["weight"]
        assert weight is not None
        return functional.Frozen(self._rows_of(weight), base._parameters.get("bias"))

    def update_of(self, slot: str) -> functional.Update:
        return functional.Update(*self.factors(slot), self.scaling[slot])

    @staticmethod
    def _rows_of(weight: Tensor) -> Tensor:
        """The weight as [out, in]."""
        return weight


class LoraConv1D(LoraLinear):
    """transformers' Conv1D, a linear layer whose weight is stored [in, out] (GPT-2)."""

    kind = "Conv1D"

    @staticmethod
    def shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        weight = base.weight
        assert isinstance(weight, Tensor)
        return (r, weight.shape[0]), (weight.shape[1], r)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, *args, **kwargs)

    @staticmethod
    def _rows_of(weight: Tensor) -> Tensor:
        return weight.T

    def get_delta_weight(self, slot: str) -> Tensor:
        return super().get_delta_weight(slot).T


class LoraEmbedding(LoraLayer):
    """Weight [vocabulary, dim], A [r, vocabulary], B [dim, r]. Dropout does not apply to whole numbers."""

    kind = "Embedding"
    peft_name = "Embedding"

    def __init__(self, base_layer: nn.Module, router: Router, name: str = "") -> None:
        super().__init__(base_layer, router, name)
        del self.lora_A, self.lora_B  # PEFT's names for these two, kept in state dicts and files
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_embedding_A.training = self.lora_embedding_B.training = self.training
        self._max_norm: float | None = None

    @staticmethod
    def shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert isinstance(base, nn.Embedding)
        return (r, base.num_embeddings), (base.embedding_dim, r)

    def factors(self, slot: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[slot], self.lora_embedding_B[slot]

    def _place(self, slot: str, a: nn.Parameter, b: nn.Parameter) -> None:
        self.lora_embedding_A[slot], self.lora_embedding_B[slot] = a, b

    def remove_slot(self, slot: str) -> None:
        for table in (self.r, self.scaling, self.lora_dropout, self.lora_embedding_A, self.lora_embedding_B):
            if slot in table:
                del table[slot]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        base = self.base_layer
        assert isinstance(base, nn.Embedding)
        if base.max_norm is None:
            return super().forward(input, *args, **kwargs)
        # Torch would clip the rows that it looks up in the frozen table itself.
        if type(base) is nn.Embedding and not (base._forward_hooks or base._forward_pre_hooks):
            rows, places = torch.unique(input, return_inverse=True)
            y = F.embedding(places, base.weight[rows], max_norm=base.max_norm, norm_type=base.norm_type)
        else:
            y = functional_call(base, {"weight": base.weight.clone()}, (input, *args), kwargs)
        return self._updated(y, input)

    @staticmethod
    def leading(x: Tensor) -> torch.Size:
        return x.shape

    def update(self, slot: str, x: Tensor, times: int = 1) -> Tensor:
        base = self.base_layer
        assert isinstance(base, nn.Embedding)
        a, b = self.factors(slot)
        update = functional.lora_embedding(x, a, b, self.scaling[slot], base.padding_idx, base.scale_grad_by_freq)
        # Scaled embeddings (Gemma, M2M100, ...) multiply the looked-up row, and so the update too.
        scale = getattr(base, "embed_scale", None)
        return update if scale is None else update * torch.as_tensor(scale, device=update.device).to(update.dtype)

    def get_delta_weight(self, slot: str) -> Tensor:
        return super().get_delta_weight(slot).T

    def swap_weight(self, weight: nn.Parameter, slots: tuple[str, ...]) -> None:
        # max_norm clips the frozen row, not the sum: lora.merge clipped before it added.
        if not self._frozen:
            self._max_norm = self.base_layer.max_norm  # type: ignore[assignment]
        super().swap_weight(weight, slots)
        self.base_layer.max_norm = None  # type: ignore[assignment]

    def restore_weight(self) -> None:
        if self._frozen:
            self.base_layer.max_norm = self._max_norm  # type: ignore[assignment]
        super().restore_weight()

    @property
    def table(self) -> Tensor:
        """The frozen rows as a lookup returns them: clipped to ``max_norm`` where there is one."""
        base, weight = self.base_layer, self.frozen_weight.detach()
        limit = self._max_norm if self._frozen else base.max_norm
        if limit is None:
            return weight
        norm = weight.norm(p=float(base.norm_type), dim=1, keepdim=True)  # type: ignore[arg-type]
        return torch.where(norm > limit, weight * (limit / (norm + 1e-7)), weight)


class LoraConv(LoraLayer):
    """Weight [out, in / groups, *kernel], A [r, in, *kernel], B [out, r / groups, 1...].

    A sees every input channel and B is grouped like the frozen layer: PEFT's shapes. Stride, dilation and padding
    mode are the frozen layer's own.
    """

    kind = "Conv"

    @staticmethod
    def shapes(base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ones = (1,) * len(base.kernel_size)
        return (r, base.in_channels, *base.kernel_size), (base.out_channels, r // base.groups, *ones)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(input, *args, **kwargs)  # under torch's name for it

    @staticmethod
    def leading(x: Tensor) -> torch.Size:
        return x.shape[:1]

    def update(self, slot: str, x: Tensor, times: int = 1) -> Tensor:
        base = self.base_layer
        assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        a, b = self.factors(slot)
        return functional.lora_conv(self.drop(slot, x, times), a, b, self.scaling[slot], self._convolve, base.groups)

    def drop(self, slot: str, x: Tensor, times: int) -> Tensor:
        # Of [rows, channels, places] a place's mask is to be the same however many places come after it, as in a text.
        if x.dim() != 3:
            return super().drop(slot, x, times)
        return super().drop(slot, x.transpose(1, 2), times).transpose(1, 2)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        base: Any = self.base_layer
        convolve: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(base.kernel_size) - 1]
        if base.padding_mode == "zeros":
            return convolve(x, weight, None, base.stride, base.padding, base.dilation)
        x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        return convolve(x, weight, None, base.stride, 0, base.dilation)

    def merge_obstacle(self) -> str | None:
        if self.base_layer.groups == 1:
            return super().merge_obstacle()
        return (
            f"a convolution with groups={self.base_layer.groups}: its weight has no place for an update that "
            "reads every input channel"
        )


#: The layer type → the class that adapts it. A subclass counts too, if an update can stand beside its forward.
KINDS: tuple[tuple[type[nn.Module], type[LoraLayer]], ...] = (
    (nn.Linear, LoraLinear),
    (nn.Embedding, LoraEmbedding),
    (nn.Conv1d, LoraConv),
    (nn.Conv2d, LoraConv),
    (nn.Conv3d, LoraConv),
)


def layer_class(module: nn.Module) -> type[LoraLayer] | None:
    """The class that adapts ``module``, or None when LoRA around it would do nothing or wrong, or is not known."""
    if is_never_called(module):
        return None
    cls = next((cls for base, cls in KINDS if isinstance(module, base)), None)
    if cls is None and isinstance(module, conv1d()):
        cls = LoraConv1D
    return None if cls is None or forward_of(module).obstacle else cls


def is_never_called(module: nn.Module) -> bool:
    """Whether its weight is read and its forward never called, as MultiheadAttention does: an adapter does nothing."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
