"""What an adapter folder holds, read without its base model: config, sizes, norms, and the rank really used.

Everything is computed from the factors: the singular values of ``scale · BA`` are those of the small matrix
``R_B R_Aᵀ`` of two QR decompositions, so no [out, in] product is ever made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import torch
from torch import Tensor

from loraloom.config.lora import LoraConfig
from loraloom.errors import AdapterError
from loraloom.lora.checkpoint import read_tensors
from loraloom.lora.keys import PREFIX
from loraloom.lora.matching import check_expressions, matches_any, rank_and_alpha

#: The rank used is the fewest singular directions that hold this share of the update's squared norm.
ENERGY = 0.99


@dataclass(frozen=True)
class ModuleUpdate:
    """One module's update ``scale · BA``: Frobenius ``norm``, singular values (falling), directions in use."""

    name: str
    r: int
    scale: float
    norm: float
    used_rank: int
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class Inspection:
    config: LoraConfig
    updates: tuple[ModuleUpdate, ...]
    #: other tensors (heads, biases) → shape
    others: dict[str, tuple[int, ...]]
    parameters: int
    bytes: int
    dtypes: tuple[str, ...]


def inspect(folder: str | Path) -> Inspection:
    """Read the adapter in ``folder``.

    Raises:
        AdapterError, ConfigError: the folder holds no adapter, or a damaged one; a factor is not finite.
    """
    tensors = read_tensors(folder)
    config = LoraConfig.from_pretrained(folder)
    check_expressions(config, [key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors])
    parameters = _parameters(tensors, config)
    updates, others = [], {}
    for key, a in sorted(tensors.items()):
        name = key.removeprefix(PREFIX)
        if ".lora_A." in name or name.endswith(".lora_embedding_A"):
            b = tensors.get(key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"))
            if b is not None:
                place = name.rpartition(".lora_")[0]
                updates.append(_update(*parameters.get(place, (place, place, 1)), a, b, config))
                continue
        elif ".lora_B." in name or name.endswith(".lora_embedding_B"):
            continue
        others[name] = tuple(a.shape)
    return Inspection(
        config,
        tuple(updates),
        others,
        sum(t.numel() for t in tensors.values()),
        sum(t.numel() * t.element_size() for t in tensors.values()),
        tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
    )


def _parameters(tensors: Mapping[str, Tensor], config: LoraConfig) -> dict[str, tuple[str, str, int]]:
    """Where a file keeps the factors of a parameter → its name, the name that patterns match, its experts.

    A file has them under the module's name, the first parameter's innermost. Which is which, and how many experts are
    stacked, follows from the ranks that the config gives them.
    """
    rows: dict[str, list[tuple[str, int]]] = {}
    for key in sorted(tensors, key=len, reverse=True):  # the innermost first
        place, found, _ = key.removeprefix(PREFIX).partition(".lora_A.")
        module = place.replace(".base_layer", "")
        if found and config.target_parameters and not matches_any(config.target_modules, module):
            rows.setdefault(module, []).append((place, tensors[key].shape[0]))
    out = {}
    for module, places in rows.items():
        leaves = dict.fromkeys(pattern.rpartition(".")[2] for pattern in config.target_parameters or ())
        names = [f"{module}.{leaf}" for leaf in leaves if matches_any(config.target_parameters, f"{module}.{leaf}")]
        for order in permutations(sorted(names, reverse=True), len(places)):
            ranks = [rank_and_alpha(config, name)[0] for name in order]
            experts = {height / r for (_, height), r in zip(places, ranks, strict=True)}
            if len(experts) == 1 and (count := experts.pop()) == int(count):
                shown = [module if name == f"{module}.weight" and count == 1 else name for name in order]
                out.update({p: (s, n, int(count)) for (p, _), s, n in zip(places, shown, order, strict=True)})
                break
    return out


def _update(name: str, pattern_name: str, experts: int, a: Tensor, b: Tensor, config: LoraConfig) -> ModuleUpdate:
    if not _fit(a, b):
        raise AdapterError(f"{name}: its factors A {tuple(a.shape)} and B {tuple(b.shape)} do not fit each other")
    for factor, tensor in (("A", a), ("B", b)):
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{name}: {factor} holds values that are not finite. Did the adapter's training diverge?"
            )
    r = a.shape[0] // experts
    scale = config.scale(r, rank_and_alpha(config, pattern_name)[1])
    values = singular_values(a, b, experts) * abs(scale)
    norm = float(values.square().sum().sqrt())
    return ModuleUpdate(name, r, scale, norm, used_rank(values), tuple(values.tolist()))


def used_rank(values: Tensor) -> int:
    """The fewest singular directions that hold ``ENERGY`` of the squared norm; ``values`` fall."""
    energy = values.square()
    total = float(energy.sum())
    return 0 if total == 0 else int((energy.cumsum(0) < ENERGY * total).sum()) + 1


def _fit(a: Tensor, b: Tensor) -> bool:
    if a.dim() < 2 or a.dim() != b.dim() or not a.numel() or not b.numel() or any(size != 1 for size in b.shape[2:]):
        return False
    groups, rest = divmod(a.shape[0], b.shape[1])
    return rest == 0 and b.shape[0] % groups == 0 and (groups == 1 or a.dim() > 2)


def singular_values(a: Tensor, b: Tensor, experts: int = 1) -> Tensor:
    """The singular values of ``B A``, falling, in float64: a [r, ...], b [out, r, ...] → at most r numbers.

    For stacked ``experts`` (A [E · r, in], B [out, r · E]) each is the root of the sum of squares over the experts, so
    that all of them together still make the update's norm.

    For a grouped convolution, whose B is narrower than r, they are those of its widened form: each group of outputs
    reads its own share of the r.
    """
    a, b = a.double().flatten(1), b.double().flatten(1)
    if experts > 1:
        stack = a.view(experts, -1, a.shape[1])
        each = [singular_values(one, b[:, e::experts]) for e, one in enumerate(stack)]
        return torch.stack(each).square().sum(0).sqrt()
    if b.shape[1] != a.shape[0]:
        groups = a.shape[0] // b.shape[1]
        b = torch.block_diag(*b.chunk(groups))  # type: ignore[no-untyped-call]
    r_a = torch.linalg.qr(a.T, mode="r").R
    r_b = torch.linalg.qr(b, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T)
    return values
