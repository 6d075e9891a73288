"""Optimizer state by the names of parameters, ``KIND/NAME`` → tensor. Also reads state by position, of loraloom 0.1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loraloom.engine.slot_state import check_names
from loraloom.errors import AdapterError


def by_parameter(state: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """NAME → KIND → tensor, in the order of the ``known`` parameters.

    Raises:
        AdapterError: a parameter that is not ``known``.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        kind, _, name = key.partition("/")
        found.setdefault(name, {})[kind] = tensor
    if unknown := sorted(found.keys() - known.keys()):
        raise AdapterError(f"optimizer state of {unknown[0]}: there is no such parameter here")
    return {name: found[name] for name in known if name in found}


def check_kinds(name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """
    Raises:
        AdapterError: the state of the parameter ``name`` has not the tensors of ``wanted``, or not their shapes.
    """
    check_names(found, wanted, f"optimizer state of {name}:")


def by_name(state: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``state``, in which loraloom 0.1 numbered the ``parameters`` in their order: ``POSITION.KIND``.

    AdamW's flat state was ``GROUP.members`` (positions), ``GROUP.KIND`` (joined) and ``GROUP.step``.

    Raises:
        AdapterError: positions or sizes that do not fit the parameters.
    """
    if not state or any("/" in key for key in state):
        return state
    names, named = list(parameters), dict[str, Tensor]()
    for key, tensor in state.items():
        number, _, kind = key.partition(".")
        members = state.get(f"{number}.members")
        if kind == "members":
            continue
        positions = [int(number)] if members is None else members.tolist()
        if any(not 0 <= position < len(names) for position in positions):
            raise AdapterError(f"optimizer state {key} is of parameter {max(positions)}, and there are {len(names)}")
        mine = [names[position] for position in positions]
        parts = [tensor] * len(mine) if members is None or not tensor.dim() else _split(key, tensor, mine, parameters)
        named |= {f"{kind}/{name}": part for name, part in zip(mine, parts, strict=True)}
    return named


def _split(key: str, flat: Tensor, names: Sequence[str], parameters: Mapping[str, Tensor]) -> list[Tensor]:
    sizes = [parameters[name].numel() for name in names]
    if sum(sizes) != flat.numel():
        raise AdapterError(f"optimizer state {key} has {flat.numel()} numbers, and its parameters have {sum(sizes)}")
    return [part.view(parameters[name].shape) for part, name in zip(torch.split(flat, sizes), names, strict=True)]
