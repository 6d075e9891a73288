"""The kinds of layers that LoRA adapts: Linear, transformers' Conv1D, Embedding, Conv1d, Conv2d, Conv3d."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from loraloom.lora import functional
from loraloom.lora.dispatch import Frame
from loraloom.lora.frozen import FrozenLinear, frozen_linear, is_conv1d, registered
from loraloom.lora.kinds import forward_of, has_known_forward
from loraloom.lora.layer import LoraLayer
from loraloom.lora.variants.base import Shapes


class LoraLinear(LoraLayer):
    """Weight [out, in]."""

    kind = "Linear"
    peft_class = ("peft.tuners.lora.layer", "Linear")
    #: A, B, scale and dropout module of the one active slot. Compiled code reads this and no names, so another adapter
    #: of the same shapes can replace it without a recompilation.
    _current: tuple[Tensor, Tensor, float, Any] | None = None

    @staticmethod
    def shapes(base: nn.Module, r: int, name: str) -> Shapes:
        out, inside = frozen_linear(base).shape
        return {"lora_A": (r, inside), "lora_B": (out, r)}

    def cache_active(self, active: tuple[str, ...]) -> None:
        mine, current = [slot for slot in active if slot in self.r], None
        if len(mine) == 1 and not self.merged and not self.variants:
            current = (*self.factors(mine[0]), self.scaling[mine[0]], self.lora_dropout._modules[mine[0]])
        self._current = current

    def update(self, slot: str, x: Tensor, times: int = 1) -> Tensor:
        return functional.lora_linear(self.apply_dropout(slot, x, times), *self.factors(slot), self.scaling[slot])

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() and self._current is not None:
            a, b, scale, drop = self._current
            seen = F.dropout(input, drop.p) if drop.training else input
            y: Tensor = self.base_layer(input, *args, **kwargs)
            return y + functional.lora_linear(seen, a, b, scale).to(y.dtype)
        if torch.compiler.is_compiling() or (linear := self.fusable(input, frame := self.dispatcher.frame)) is None:
            return super().forward(input, *args, **kwargs)
        return frame.inputs.project(self, linear, input, frame, self.dispatcher.slot_groups)

    def fusable(self, x: Tensor, frame: Frame) -> FrozenLinear | None:
        """The frozen layer, if ``functional.lora_projections`` can compute this layer for ``x``; else None.

        Then the frozen module is called: for rows not ordered by slot, a weight that only its module can use, hooks on
        the module, autocast, and tracing. A layer that no slot of the route adapts is fusable too: which layers are
        computed together must not depend on the slots.
        """
        base: Any = self._modules["base_layer"]
        if (
            self.merged
            or not self._goes_by_rows(x, frame)
            or not forward_of(base).is_map
            or base._forward_hooks
            or base._forward_pre_hooks
            or base._backward_hooks
            or base._backward_pre_hooks
            or "forward" in vars(base)
            or torch._C._get_tracing_state() is not None
            or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
        ):
            return None
        linear = frozen_linear(base)
        return linear if linear.supports(x) else None

    def _goes_by_rows(self, x: Tensor, frame: Frame) -> bool:
        """Whether the route has slots for ``x``, and its rows lie slot by slot."""
        route = frame.plan.route
        if not route.blocks:  # gains of several slots apply one after another, which one product cannot do
            return len(route.active) == 1 or (bool(route.active) and not self.variants)
        if route.order is not None or x.dim() < 2:
            return False
        if self.adapts(route):
            self.dispatcher.places(self.name, x, self.leading(x))
        return True

    @property
    def input_name(self) -> str:
        """The parent module's name: its layers that read one input share a dropout mask.

        A name, not a list of readers: the mask of a slot must not depend on the layers that other slots adapt.
        """
        return self.name.rpartition(".")[0]

    def shares_dropout(self, first: LoraLinear) -> bool:
        """Whether this layer has no dropout now, or the same mask as ``first``, which reads the same input."""
        return self.input_name == first.input_name or not any(map(self.dropout_p, self.r))

    def update_of(self, slot: str) -> functional.Update:
        return functional.Update(*self.factors(slot), self.scaling[slot], self.row_gain(slot))

    def rows(self) -> Tensor:
        return super().rows() if self.merged else frozen_linear(self.base_layer).dequantize()

    @property
    def like(self) -> tuple[torch.device, torch.dtype]:
        linear = frozen_linear(self.base_layer)
        return linear.device, linear.dtype

    def merge_obstacle(self) -> str | None:
        return super().merge_obstacle() or frozen_linear(self.base_layer).merge_obstacle


class LoraConv1D(LoraLinear):
    """transformers' Conv1D, a linear layer whose weight is stored [in, out] (GPT-2)."""

    kind = "Conv1D"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x, *args, **kwargs)

    @staticmethod
    def as_stored(rows: Tensor) -> Tensor:
        return rows.T


class LoraEmbedding(LoraLayer):
    """Weight [vocabulary, dim], A [r, vocabulary], B [dim, r]. There is no dropout on ids."""

    kind = "Embedding"
    peft_class = ("peft.tuners.lora.layer", "Embedding")

    _max_norm: float | None = None

    @staticmethod
    def shapes(base: nn.Module, r: int, name: str) -> Shapes:
        assert isinstance(base, nn.Embedding)
        return {"lora_embedding_A": (r, base.num_embeddings), "lora_embedding_B": (base.embedding_dim, r)}

    def factors(self, slot: str) -> tuple[nn.Parameter, nn.Parameter]:
        modules: Any = self._modules
        return modules["lora_embedding_A"][slot], modules["lora_embedding_B"][slot]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        assert isinstance(base, nn.Embedding)
        if base.max_norm is None:
            return super().forward(input, *args, **kwargs)
        # With max_norm, torch would renormalise the frozen table in place.
        if has_known_forward(base) and not (base._forward_hooks or base._forward_pre_hooks):
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

    @staticmethod
    def as_stored(rows: Tensor) -> Tensor:
        return rows.T

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

    def rows(self) -> Tensor:
        """The frozen rows as a lookup returns them, clipped to ``max_norm`` if the base does; transposed."""
        base, weight = self.base_layer, self.frozen_weight.detach()
        limit = self._max_norm if self._frozen else base.max_norm
        if limit is None:
            return weight.T
        norm = weight.norm(p=float(base.norm_type), dim=1, keepdim=True)  # type: ignore[arg-type]
        return torch.where(norm > limit, weight * (limit / (norm + 1e-7)), weight).T


class LoraConv(LoraLayer):
    """Weight [out, in / groups, *kernel], A [r, in, *kernel], B [out, r / groups, 1...].

    A sees every input channel and B is grouped like the frozen layer: PEFT's shapes. Stride, dilation and padding
    mode are the frozen layer's own.
    """

    kind = "Conv"

    @staticmethod
    def shapes(base: nn.Module, r: int, name: str) -> Shapes:
        assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ones = (1,) * len(base.kernel_size)
        a, b = (r, base.in_channels, *base.kernel_size), (base.out_channels, r // base.groups, *ones)
        return {"lora_A": a, "lora_B": b}

    @property
    def channels(self) -> int:
        return -1 - len(self.base_layer.kernel_size)  # type: ignore[arg-type]

    @staticmethod
    def leading(x: Tensor) -> torch.Size:
        return x.shape[:1]

    def update(self, slot: str, x: Tensor, times: int = 1) -> Tensor:
        base = self.base_layer
        assert isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        a, b = self.factors(slot)
        return functional.lora_conv(
            self.apply_dropout(slot, x, times), a, b, self.scaling[slot], self._convolve, base.groups
        )

    def apply_dropout(self, slot: str, x: Tensor, times: int) -> Tensor:
        # [rows, channels, places]: the mask of a place must not depend on how many places follow it.
        if x.dim() != 3:
            return super().apply_dropout(slot, x, times)
        return super().apply_dropout(slot, x.transpose(1, 2), times).transpose(1, 2)

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
    """The class that adapts ``module``; None if LoRA around it would have no effect, be wrong, or is not supported."""
    if is_never_called(module):
        return None
    own: Any = type(module)
    cls = next((cls for base, cls in KINDS if isinstance(module, base)), None)
    if is_conv1d(own):
        cls = LoraConv1D
    elif registered(own) is not None:
        cls = LoraLinear
    return None if cls is None or forward_of(module).obstacle else cls


def is_never_called(module: nn.Module) -> bool:
    """Whether its parent reads its weight and never calls it, as MultiheadAttention does: an adapter has no effect."""
    return isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
