"""PEFT's functions over state dicts: an adapter's tensors, or the base's, out of a model and into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from loraloom.errors import ConfigError
from loraloom.lora import checkpoint
from loraloom.lora.adapters import LoraModel
from loraloom.lora.injection import unwrapped_state
from loraloom.lora.keys import PREFIX, LoadReport
from loraloom.lora.model import PeftModel, by_identity
from loraloom.lora.peft_options import check_options


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | str | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """One adapter's tensors under PEFT's keys, detached; they share memory with the model.

    Args:
        model: a ``PeftModel``, compiled or not, or what ``inject_adapter_in_model`` returned, whose keys then lack
            ``base_model.model.``.
        state_dict: take the tensors from here, by the model's names for them, and not from the model. A string is
            taken for ``adapter_name``.
        save_embedding_layers: as for ``PeftModel.save_pretrained``.
    """
    (owner, lora), gathered = _unwrapped(model), None
    if isinstance(state_dict, str):
        adapter_name = state_dict
    elif state_dict is not None:
        gathered = by_identity(owner, state_dict)
    tensors = checkpoint.to_write(lora, adapter_name, gathered, save_embedding_layers)
    start = "" if isinstance(owner, PeftModel) else PREFIX
    return {key.removeprefix(start): tensor.detach() for key, tensor in tensors.items()}


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model under the adapters by their names before any adapter; they share memory with it.

    Args:
        model: as for ``get_peft_model_state_dict``. While adapters are merged their updates are in the tensors.
    """
    state = unwrapped_state(_unwrapped(model)[1].model, persistent=True)
    return {key: tensor.detach() for key, tensor in state.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
    *,
    strict: bool = True,
) -> LoadReport:
    """Copy tensors under PEFT's keys into an adapter that exists. Raises as ``PeftModel.load_adapter``."""
    check_options({"ignore_mismatched_sizes": ignore_mismatched_sizes})
    return checkpoint.fill(_unwrapped(model)[1], adapter_name, peft_model_state_dict, strict=strict)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, LoraModel]:
    """The model whose state dict has the adapters, and what holds them: see ``inject_adapter_in_model``."""
    found: Any = model
    while not isinstance(found, PeftModel) and "_loraloom" not in vars(found):
        inside = found._modules.get("_orig_mod") or found._modules.get("_fsdp_wrapped_module")
        inside = inside or found._modules.get("module")  # DistributedDataParallel, DeepSpeed
        if inside is None:
            break
        found = inside
    lora = found.base_model if isinstance(found, PeftModel) else vars(found).get("_loraloom")
    if not isinstance(lora, LoraModel):
        raise ConfigError(f"model: must be a loraloom.PeftModel, found {type(found).__name__}")
    return found, lora
