"""One model type, kind and choice of targets: the model, its rows, and the adapter in both libraries."""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from zoo.build import build
from zoo.compare import Differs, distance, outputs, peft_tensors
from zoo.inputs import batch_of
from zoo.kinds import KINDS

#: An adapter that moves the logits by less would prove nothing.
EFFECT = 0.01


@dataclass
class Cell:
    """One model type, kind and choice of targets: ``default`` or ``all-linear``."""

    model_type: str
    kind: str
    targets: str
    dtype: torch.dtype = torch.float64

    @cached_property
    def _base(self) -> nn.Module:
        return build(self.model_type, self.kind, self.dtype)

    def base(self) -> nn.Module:
        return copy.deepcopy(self._base)

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        return batch_of(self._base, self.kind)

    @cached_property
    def step(self) -> dict[str, Any]:
        """The batch of a step: nobody keeps keys and values while training."""
        known = inspect.signature(self._base.forward).parameters
        return {**self.batch, "use_cache": False} if "use_cache" in known else self.batch

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The arguments of a ``LoraConfig`` in both libraries."""
        import loraloom

        task = KINDS[self.kind].task
        fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": task}
        if self.targets != "default" or self._peft_has_default:
            wanted = None if self.targets == "default" else self.targets
            if not self._peft_refuses(wanted):
                return {**fields, "target_modules": wanted}
            fields["target_modules"] = wanted
        planned = loraloom.plan(self._base, loraloom.LoraConfig(**fields))
        if self.targets == "default":
            return {**fields, "target_modules": [target.name for target in planned.targets]}
        names = {name: getattr(planned.config, name, None) for name in ("target_modules", "target_parameters")}
        return {**fields, **names}

    @property
    def _peft_has_default(self) -> bool:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT

        return getattr(self._base.config, "model_type", None) in PEFT

    def _peft_refuses(self, wanted: str | None) -> bool:
        """Whether peft takes no default (Mixtral's kin), or not its own "all-linear" (Mamba's), or fails with it
        (Llama 4's routers, heads that it would train in full as well). What we adapt is given to it by name then.
        """
        import peft

        try:
            config = peft.LoraConfig(r=4, target_modules=wanted, task_type=KINDS[self.kind].task)
            outputs(peft.get_peft_model(self.base(), config), self.batch)
        except Exception:
            return True
        return False

    def ours(self, *, filled: bool = True, **fields: Any) -> Any:
        import loraloom

        model = loraloom.get_peft_model(self.base(), loraloom.LoraConfig(**{**self.fields, **fields})).eval()
        if filled:
            fill(loraloom.get_peft_model_state_dict(model), self.strength)
        return model

    def theirs(self, *, filled: bool = True) -> Any:
        import peft

        model = peft.get_peft_model(self.base(), peft.LoraConfig(**copy.deepcopy(self.fields))).eval()
        if filled:
            fill(peft_tensors(model), self.strength)
        return model

    @cached_property
    def peft(self) -> Any:
        """Their model, filled, for checks that leave its numbers alone."""
        return self.theirs()

    @cached_property
    def wanted(self) -> Tensor:
        """What their model answers."""
        return outputs(self.peft, self.batch)

    @cached_property
    def strength(self) -> float:
        """How large an adapter's numbers must be to move the logits by over 1 %."""
        import loraloom

        with torch.no_grad():
            plain = outputs(self._base, self.batch)
            for strength in (0.1, 0.3, 1.0, 3.0, 10.0, 100.0):
                model = loraloom.get_peft_model(self.base(), loraloom.LoraConfig(**self.fields)).eval()
                fill(loraloom.get_peft_model_state_dict(model), strength)
                moved = distance(outputs(model, self.batch), plain)
                if moved > 2 * EFFECT:
                    return strength
        raise Differs(f"no adapter moves the logits by {EFFECT:.0%}: {moved:.1e}")


def fill(tensors: Mapping[str, Tensor], strength: float, salt: str = "") -> None:
    """Numbers that depend on a tensor's key alone; heads and biases are moved, not replaced."""
    with torch.no_grad():
        for key, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            source = torch.Generator().manual_seed(zlib.crc32((salt + key).encode()))
            noise = torch.randn(tensor.shape, generator=source, dtype=torch.float64)
            if "lora_" in key:
                tensor.copy_((noise * strength).to(tensor.dtype))
            elif "running_" not in key:
                tensor.add_((0.05 * noise).to(tensor.dtype))
