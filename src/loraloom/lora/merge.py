"""Merge and unmerge: all or nothing, and unmerging is exact.

All merged weights are computed and checked before the first is installed, as a new parameter. The frozen parameter is
kept untouched, so unmerging restores the same bytes in any dtype, and a module that shares it (a tied head) never sees
the update.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loraloom.errors import MergeError
from loraloom.lora.injection import unwrap
from loraloom.lora.layer import LoraLayer
from loraloom.lora.modules_to_save import ModulesToSaveWrapper


def merge(layers: Mapping[str, LoraLayer], slots: Sequence[str]) -> None:
    """Make every layer's weight the frozen one plus the updates of ``slots``, and of no other.

    Raises:
        MergeError: a layer that cannot represent the update, or a result that is not finite. Nothing was changed.
    """
    ready: list[tuple[LoraLayer, nn.Parameter, tuple[str, ...]]] = []
    for name, layer in layers.items():
        mine = tuple(slot for slot in slots if slot in layer.slots)
        if not mine:
            continue
        if (obstacle := layer.merge_obstacle()) is not None:
            raise MergeError(f"{name}: cannot be merged, because it is {obstacle}; keep the adapter beside it")
        ready.append((layer, nn.Parameter(_merged(name, layer, mine), requires_grad=False), mine))
    unmerge(layers)
    for layer, weight, mine in ready:
        layer.swap_weight(weight, mine)


def _merged(name: str, layer: LoraLayer, slots: tuple[str, ...]) -> Tensor:
    merged = layer.merged_weight(slots)
    if not torch.isfinite(merged).all():
        culprits = [slot for slot in slots if not torch.isfinite(layer.get_delta_weight(slot)).all()] or list(slots)
        raise MergeError(
            f"{name}: merging {', '.join(map(repr, culprits))} gives values that are not finite in "
            f"{str(merged.dtype).removeprefix('torch.')}; nothing was merged. Did the adapter's training diverge?"
        )
    return merged


def check_copies(wrappers: Mapping[str, ModulesToSaveWrapper], slots: Sequence[str]) -> None:
    """Raise MergeError if a copy of ``slots`` is not finite in the dtype of the module that it replaces."""
    for name, wrapper in wrappers.items():
        for slot in slots:
            for tensor, dtype in wrapper.own_dtypes(slot) if slot in wrapper.modules_to_save else ():
                if tensor.dtype != dtype and not torch.isfinite(tensor.detach().to(dtype)).all():
                    raise MergeError(
                        f"{name}: {slot!r} trained it in full, and in the base's {str(dtype).removeprefix('torch.')} "
                        "it holds values that are not finite; nothing was merged. Keep the adapter beside the base"
                    )


def unmerge(layers: Mapping[str, LoraLayer]) -> None:
    for layer in layers.values():
        layer.restore_weight()


def untied(model: nn.Module, layers: Mapping[str, LoraLayer]) -> bool:
    """Whether modules that share a weight in the base have different weights once the adapters are merged."""
    copies = [
        w for w in model.modules() if isinstance(w, ModulesToSaveWrapper) and w.current() is not w.original_module
    ]
    left = {id(module) for wrapper in copies for module in wrapper.original_module.modules()}
    merged = [layer for layer in layers.values() if layer.merged and id(layer.base_layer) not in left]
    pairs = [(layer.frozen_weight, layer.live_weight) for layer in merged]
    left |= {id(layer.base_layer) for layer in merged}
    for wrapper in copies:
        mine = wrapper.current()._parameters
        pairs += [(p, mine[key]) for key, p in unwrap(wrapper.original_module)._parameters.items()]  # type: ignore[misc]
    pairs += [(p, p) for m in model.modules() if id(m) not in left for p in m._parameters.values() if p is not None]
    after: dict[int, Tensor] = {}
    return any(after.setdefault(id(frozen), weight) is not weight for frozen, weight in pairs if frozen is not None)


def untie(model: nn.Module) -> None:
    """Set ``tie_word_embeddings`` to False in the model's config, and separate weights that are still shared.

    Otherwise saving would keep one of the shared weights, and loading would tie weights that differ now, or find some
    missing.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    config.tie_word_embeddings = False  # type: ignore[union-attr]
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})  # where transformers would tie
    seen: set[int] = set()
    for name in sorted({*tied, *tied.values()}):
        path, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if id(module) in seen:  # one module in two places
            module = copy.deepcopy(module)
            model.set_submodule(path, module)
        parameter = module._parameters.get(leaf)
        if parameter is not None and id(parameter) in seen:
            parameter = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            module._parameters[leaf] = parameter
        seen |= {id(module), id(parameter)}
