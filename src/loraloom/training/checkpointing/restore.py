"""A slot in a checkpoint: written, and loaded again as if the run had never stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Slot
from loraloom.engine.slot_state import SlotState, values_of_format_1
from loraloom.errors import AdapterError, ConfigError, LoraloomError
from loraloom.files.jsonio import MALFORMED
from loraloom.lora import checkpoint as adapters
from loraloom.lora.model import PeftModel
from loraloom.training import early_stopping
from loraloom.training.checkpointing import folders
from loraloom.training.checkpointing.folders import Checkpoint


def write(slot: Slot, model: PeftModel, options: TrainConfig, run: Mapping[str, Any]) -> Path:
    """Write a checkpoint of ``slot`` to the output folder. ``run`` is what its state holds of the run.

    Raises:
        SaveError: the folder cannot be written.
    """
    saved = slot.state_dict()
    best = early_stopping.best(slot.curve.evaluations, options.metric_for_best_model)
    named = None if best is None else dict(zip(("step", "metric", "value"), best, strict=True))
    tensors = {key: tensor for key, tensor in saved.tensors.items() if not key.startswith("adapter/")}
    # Rows, masks and starts follow from seeds and steps. The generators are for what a user's model draws beside that.
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()

    def adapter(folder: Path) -> None:
        adapters.save(model.base_model, folder, [slot.name])

    return folders.write(options.output, slot.step, adapter, tensors, {"slot": saved.values, "best": named, **run})


def restore(checkpoint: Checkpoint, slot: Slot, model: PeftModel) -> None:
    """Load the checkpoint's state into ``slot`` and its adapter.

    Raises:
        ConfigError: the adapter or the state do not fit this model.
    """
    with reading(checkpoint):
        adapters.fill(model.base_model, slot.name, checkpoint.adapter())
        state, tensors = checkpoint.state, checkpoint.tensors()
        random = {key: tensors.pop(key) for key in list(tensors) if key.startswith("random/")}
        # Of the adapter's tensors, buffers are not the slot's.
        mine = {f"adapter/{name}": p.detach() for name, p in model.adapter_parameters(slot.name).items()}
        if state["format"] == 1:
            values = values_of_format_1(checkpoint.step, state["curve"], state["within"], state["scale"])
        else:
            values = state["slot"]
        slot.load_state_dict(SlotState({**mine, **tensors}, values))
        torch.set_rng_state(random["random/cpu"])
        if "random/cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["random/cuda"])


@contextlib.contextmanager
def reading(checkpoint: Checkpoint) -> Iterator[None]:
    """
    Raises:
        ConfigError: the block reads something of ``checkpoint`` that is not what loraloom writes, or does not fit.
    """
    try:
        yield
    except AdapterError as error:
        raise ConfigError(f"{checkpoint.path}: {error}; choose an earlier one, or start over") from None
    except (LoraloomError, torch.OutOfMemoryError):
        raise
    except (*MALFORMED, RuntimeError) as error:
        raise ConfigError(
            f"{checkpoint.path}: {folders.STATE_NAME} or {folders.TENSORS_NAME} is not what loraloom writes "
            f"({type(error).__name__}: {error}); choose an earlier one, or start over"
        ) from None
