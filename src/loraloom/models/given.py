"""A loaded model, passed as an object instead of a folder or hub name: registered under a name while a run uses it.

The name is derived from the class and the weights, so that a resumed run finds the same name for the same model.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraloom.config import objects
from loraloom.errors import ConfigError, ModelError

#: Elements of each tensor that enter the hash.
SAMPLE = 256


@dataclass(frozen=True)
class GivenModel:
    """A loaded model and its tokenizer."""

    model: Any
    tokenizer: Any

    def empty(self) -> nn.Module:
        """The same architecture without its weights, on the meta device."""
        with torch.device("meta"):
            built: nn.Module = type(self.model)(copy.deepcopy(self.model.config))
        return built

    def check(self, auto: str, labels: int | None, bare: bool = False) -> None:
        """Check that the model has the head that the task needs.

        Args:
            auto: transformers' class that loads a model for the task.
            labels: outputs of the head; None for the head of a language model.
            bare: the task needs the model without any head.

        Raises:
            ModelError: it does not; the message says how to load one that does.
        """
        kind = type(self.model).__name__
        if bare:
            if self.model.base_model is not self.model:
                raise ModelError(f"model: {kind} has a head; load the model with {auto}.from_pretrained")
            return
        if labels is None:
            head = getattr(self.model, "get_output_embeddings", lambda: None)()
            if head is None:
                raise ModelError(f"model: {kind} has no language head; load it with {auto}.from_pretrained")
            return
        found = getattr(self.model.config, "num_labels", None)
        new = [n for n, _ in self.model.named_parameters() if not n.startswith(f"{self.model.base_model_prefix}.")]
        if not new or found != labels:
            has = f"a head for {found} outputs" if new else "no head"
            raise ModelError(
                f"model: {kind} has {has}, and the rows need {labels}; load it with {auto}.from_pretrained(..., "
                f"num_labels={labels})"
            )


@contextlib.contextmanager
def hold_model(model: Any, tokenizer: Any) -> Iterator[str]:
    """Context in which the loaders find ``model`` under the returned name.

    Raises:
        ConfigError: not a model of transformers, or one with adapters; or the tokenizer is missing.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ConfigError(f"model: a folder, a hub name or a model of transformers, found {type(model).__name__}")
    if hasattr(model, "peft_config"):
        raise ConfigError(f"model: {type(model).__name__} has adapters already; give the base model")
    if tokenizer is None:
        raise ConfigError("tokenizer: a loaded model needs its tokenizer; give tokenizer=, or the model's name")
    name = f"{objects.GIVEN}{type(model).__name__}-{hash_of_weights(model)[:12]}"
    with objects.held({name: GivenModel(model, tokenizer)}):
        yield name


def find(name: str) -> GivenModel | None:
    """The model that is registered under ``name``.

    Raises:
        ModelError: the name belongs to an object of another program.
    """
    found = objects.find(name)
    if isinstance(found, GivenModel):
        return found
    if name.startswith(objects.GIVEN):
        raise ModelError(
            f"model: {name} was passed as an object by a program, and only that program can use it; give the "
            "folder or hub name that it was loaded from"
        )
    return None


def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 of the shapes and dtypes of all tensors and of a sample of their elements."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].cpu()
        found.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
