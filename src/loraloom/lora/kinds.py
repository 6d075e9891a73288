"""What the forward of a layer computes: torch's function of its weight and bias, or something else.

A subclass of ``nn.Linear`` may return tuples (the router of a mixture of experts), scale its weight first, or pad its
input. Such a module is called once with a small input and compared with torch's function. Knows nothing of slots.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraloom.lora.frozen import is_conv1d, is_dense, registered

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: The classes whose own forward is known.
_KNOWN = (nn.Linear, nn.Embedding, *_CONVOLUTIONS)


@dataclass(frozen=True)
class Forward:
    """What is known of a module's forward.

    ``is_map``: it equals torch's function of weight and bias. ``obstacle``: why no update can be added to its output.
    ``differs``: its output has the right shape and other values, so an update can be added to the output but not merged
    into the weight.
    """

    is_map: bool = False
    differs: bool = False
    obstacle: str | None = None


_MAP, _UNKNOWN, _DIFFERS = Forward(is_map=True), Forward(), Forward(differs=True)
_found: weakref.WeakKeyDictionary[nn.Module, Forward] = weakref.WeakKeyDictionary()


def forward_of(module: nn.Module) -> Forward:
    """What the forward of ``module`` (Linear, Conv1D, Embedding or convolution) computes. Tried once per module."""
    if has_known_forward(module):
        return _MAP
    found = _found.get(module)
    if found is None:
        weight = module._parameters.get("weight")
        found = _examine(module, weight)
        if weight is not None and not weight.is_meta:  # its values may be loaded later
            _found[module] = found
    return found


def has_known_forward(module: nn.Module) -> bool:
    """Whether the forward is that of torch's own class, of transformers' Conv1D, or of a class that is registered."""
    cls: Any = type(module)
    return _is_known(cls, cls.forward, registered(cls) is not None)


@cache
def _is_known(cls: Any, forward: object, read: bool) -> bool:
    """``forward`` and ``read`` are part of the cache's key, in case the class is changed or registered later."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    return owner in _KNOWN or registered(owner) is not None or (owner.__name__ == "Conv1D" and is_conv1d(owner))


def _examine(module: nn.Module, weight: Tensor | None) -> Forward:
    if not is_dense(weight):
        return _UNKNOWN  # quantised or sharded: the module alone knows how to use it
    assert weight is not None
    if not weight.numel() or getattr(module, "max_norm", None) is not None:  # a trial would clip the table itself
        return _UNKNOWN
    try:
        inputs, reference = _trial(module, weight)
    except (RuntimeError, TypeError, ValueError):  # a shape that its weight does not have: packed
        return _UNKNOWN
    problem = ""
    for x in inputs:
        try:
            with torch.no_grad():
                y, wanted = type(module).forward(module, x), reference(x)
        except Exception as error:  # an unknown forward may raise anything
            problem = problem or f"does not take one tensor of {_size(module)} ({type(error).__name__})"
            continue
        return _compare(module, y, wanted)
    return Forward(obstacle=f"its forward {problem}")


def _trial(module: nn.Module, weight: Tensor) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
    """Small inputs, and torch's function of them with the weight and bias of ``module``."""
    bias = module._parameters.get("bias")
    if isinstance(module, nn.Embedding):
        scale = torch.as_tensor(getattr(module, "embed_scale", 1.0), device=weight.device).to(weight.dtype)
        return [_ids(module)], lambda x: F.embedding(x, weight) * scale
    if isinstance(module, _CONVOLUTIONS):
        spans = [d * (k - 1) + 3 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        x = _numbers(weight, 2, module.in_channels, *spans)
        return [x], lambda x: module._conv_forward(x, weight, bias)
    cls: Any = type(module)
    rows = weight.T if is_conv1d(cls) else weight
    width = rows.shape[1] if is_conv1d(cls) else int(module.in_features)  # type: ignore[arg-type]
    return [_numbers(weight, 2, 3, width), _numbers(weight, 6, width)], lambda x: F.linear(x, rows, bias)


def _numbers(like: Tensor, *shape: int) -> Tensor:
    """Values in ±1, always the same and not from torch's generator."""
    count = torch.Size(shape).numel()
    return torch.arange(count, device=like.device, dtype=torch.float32).sin().to(like.dtype).view(shape)


def _compare(module: nn.Module, y: Any, wanted: Tensor) -> Forward:
    if not isinstance(y, Tensor):
        return Forward(obstacle=f"its forward returns a {type(y).__name__}, to which no update can be added")
    if y.shape != wanted.shape:
        return Forward(obstacle=f"its forward does more than {_function(module)}: it returns another shape")
    if y.is_meta:
        return _UNKNOWN
    tolerance = 1e-5 if y.dtype in (torch.float32, torch.float64) else 2e-2
    if torch.allclose(y.float(), wanted.float(), rtol=tolerance, atol=tolerance * float(wanted.abs().max())):
        return _MAP
    if isinstance(module, nn.Embedding) and not _looks_up(module, y, tolerance):
        return Forward(obstacle="its forward does not look up the rows that it is given")
    return _DIFFERS


def _looks_up(module: nn.Embedding, y: Tensor, tolerance: float) -> bool:
    """Whether the output for an id depends on that id alone; ``y`` is the output for the ids of ``_trial``."""
    ids = _ids(module).flip(1)
    with torch.no_grad():
        return torch.allclose(type(module).forward(module, ids), y.flip(1), rtol=tolerance, atol=tolerance)


def _ids(module: nn.Embedding) -> Tensor:
    return torch.tensor([[2, 0, 1]], device=module.weight.device) % module.num_embeddings


def _size(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "row numbers"
    return "[rows, channels, ...]" if isinstance(module, _CONVOLUTIONS) else "[..., in_features]"


def _function(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "a lookup"
    return "a convolution with its weight" if isinstance(module, _CONVOLUTIONS) else "a product with its weight"
