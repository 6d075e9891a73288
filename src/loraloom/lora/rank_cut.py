"""A trained adapter made smaller, or stronger, without training: its updates cut to lower ranks, or scaled.

Of each update the largest singular directions are kept: of all updates of that rank this is the nearest one (Eckart
and Young 1936). No [out, in] product is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.config.lora import LoraConfig
from loraloom.errors import AdapterError
from loraloom.lora.layer import LoraLayer
from loraloom.lora.model import PeftModel
from loraloom.lora.parameters import LoraParameter


@dataclass(frozen=True)
class Directions:
    """The singular directions of ``B A``, largest first, float64: a [R, in, ...], values [R], b [out, R, ...].

    ``a`` and ``b`` are factors of equal norm. Zeros fill up what the update does not have.
    """

    a: Tensor
    values: Tensor
    b: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Directions:
        q_a, r_a = torch.linalg.qr(a.detach().double().flatten(1).T)
        q_b, r_b = torch.linalg.qr(b.detach().double().flatten(1))
        u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        root, found = values.sqrt(), len(values)
        new_a, new_b = torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
        new_a.flatten(1)[:found] = root[:, None] * (v @ q_a.T)
        new_b.flatten(1)[:, :found] = (q_b @ u) * root
        return cls(new_a, values, new_b)

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def cost(self) -> int:
        """Parameters of one direction."""
        return self.a[0].numel() + self.b[:, 0].numel()

    def cut(self, r: int) -> tuple[Tensor, Tensor]:
        """The ``r`` largest, as factors: [r, in, ...], [out, r, ...]."""
        return self.a[:r], self.b[:, :r]


class RankCuts:
    """Smaller adapters of one that is trained; its updates are decomposed once.

    Raises:
        AdapterError: there is no such adapter, or an update is not one plain product.
    """

    def __init__(self, model: PeftModel, adapter: str) -> None:
        self.model, self.adapter, self.config = model, adapter, _config(model, adapter)
        self.layers = {name: one for name, one in model.base_model.lora_layers.items() if adapter in one.slots}
        for name, layer in self.layers.items():
            if why := _obstacle(layer, adapter):
                raise AdapterError(f"{adapter}: cannot be cut to a smaller rank: {name} is {why}")
        self.directions = {name: Directions.of(*layer.factors(adapter)) for name, layer in self.layers.items()}

    @property
    def highest(self) -> int:
        """The highest rank of the adapter."""
        return max((one.rank for one in self.directions.values()), default=0)

    @property
    def separable(self) -> bool:
        """Whether patterns can give each target its own rank: not where single parameters are targets."""
        return not any(isinstance(layer, LoraParameter) for layer in self.layers.values())

    def ranks(self, r: int, by_energy: bool = False) -> dict[str, int]:
        """Module → its rank in ``add``."""
        if by_energy:
            return ranks_by_energy(self.directions, self._scales, r)
        return {name: min(one.rank, r) for name, one in self.directions.items()}

    def add(self, new: str, r: int, by_energy: bool = False) -> LoraConfig:
        """Add ``new``: the adapter with ranks of at most ``r``; heads and biases are copied. Returns its config.

        ``by_energy`` takes no more parameters than that, and gives each module as many directions as it needs. Its
        config has a pattern for each module of another rank than the highest; scales are as they were.

        Raises:
            AdapterError: ``r`` is not below the adapter's rank, or ``by_energy`` without being ``separable``.
        """
        if not 1 <= r < self.highest:
            raise AdapterError(f"r: must be at least 1 and below the ranks of {self.adapter!r}, found {r}")
        ranks = self.ranks(r, by_energy)
        config = self._config_of(ranks) if by_energy else self._uniform(r)
        _add_copy(self.model, self.adapter, new, config)
        with torch.no_grad():
            for name, layer in self.layers.items():
                a, b = self.directions[name].cut(ranks[name])
                new_a, new_b = layer.factors(new)
                new_a.copy_(a)
                new_b.copy_(b * (layer.scaling[self.adapter] / layer.scaling[new]))
        return config

    @property
    def _scales(self) -> dict[str, float]:
        return {name: layer.scaling[self.adapter] for name, layer in self.layers.items()}

    def _uniform(self, r: int) -> LoraConfig:
        old = self.config
        alpha = old.lora_alpha * (r / old.r) ** self._power if old.r > r else old.lora_alpha
        ranks = {pattern: min(rank, r) for pattern, rank in old.rank_pattern.items()}
        return old.copy(r=min(old.r, r), lora_alpha=alpha, rank_pattern=ranks)

    def _config_of(self, ranks: Mapping[str, int]) -> LoraConfig:
        if not self.separable:
            raise AdapterError(f"{self.adapter}: patterns cannot tell the ranks of single parameters apart")
        alphas = {name: scale * ranks[name] ** self._power for name, scale in self._scales.items()}
        first = max(ranks, key=lambda name: ranks[name])
        return self.config.copy(
            r=ranks[first],
            lora_alpha=alphas[first],
            rank_pattern={f"^{name}": rank for name, rank in ranks.items() if rank != ranks[first]},
            alpha_pattern={f"^{name}": alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        )

    @property
    def _power(self) -> float:
        """At the same scale alpha grows with this power of the rank."""
        return 0.5 if self.config.use_rslora else 1.0


def ranks_by_energy(directions: Mapping[str, Directions], scales: Mapping[str, float], r: int) -> dict[str, int]:
    """Module → rank of at least 1, with no more parameters in all than ranks of at most ``r`` have.

    Kept are the directions with the most energy, ``(scale · singular value)²``, for a parameter.
    """
    room = sum((min(one.rank, r) - 1) * one.cost for one in directions.values())
    found = dict.fromkeys(directions, 1)
    gains = [
        (-((scales[name] * value) ** 2) / one.cost, name)
        for name, one in directions.items()
        for value in one.values.tolist()[1 : one.rank]
    ]
    for gain, name in sorted(gains):
        if gain < 0 and (cost := directions[name].cost) <= room:
            found[name] += 1
            room -= cost
    return found


def cut_rank(model: PeftModel, adapter: str, new: str, r: int) -> LoraConfig:
    """``RankCuts.add`` of a single cut."""
    return RankCuts(model, adapter).add(new, r)


def rescale(model: PeftModel, adapter: str, new: str, factor: float) -> LoraConfig:
    """Add ``new``: ``adapter`` with ``factor`` times its alpha. Returns its config."""
    old = _config(model, adapter)
    alphas = {pattern: alpha * factor for pattern, alpha in old.alpha_pattern.items()}
    config = old.copy(lora_alpha=old.lora_alpha * factor, alpha_pattern=alphas)
    _add_copy(model, adapter, new, config)
    return config


def _config(model: PeftModel, adapter: str) -> LoraConfig:
    if adapter not in model.peft_config:
        raise AdapterError(f"there is no adapter {adapter!r}; there are {', '.join(sorted(model.peft_config))}")
    return model.peft_config[adapter]


def _add_copy(model: PeftModel, adapter: str, new: str, config: LoraConfig) -> None:
    """Add ``new`` with ``config``, and with all tensors of ``adapter`` that have the same shape."""
    model.add_adapter(new, config)
    own = model.base_model.tensors_of(new)
    with torch.no_grad():
        for key, tensor in model.base_model.tensors_of(adapter).items():
            if key in own and own[key].shape == tensor.shape:
                own[key].copy_(tensor)


def _obstacle(layer: LoraLayer, adapter: str) -> str:
    a, b = layer.factors(adapter)
    if isinstance(layer, LoraParameter) and layer.experts > 1:
        return "a stack of experts"
    if adapter in layer.variants:
        return f"adapted by {layer.variants[adapter].name}"
    return "a grouped convolution" if b.shape[1] != a.shape[0] else ""
