"""A model that is loaded once and serves every adapter on it: for training, searching, evaluating and answering."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraloom.distributed.process_group import SINGLE, ProcessGroup
from loraloom.engine.pack import evaluating
from loraloom.lora.model import PeftModel
from loraloom.models.fsdp import sharded
from loraloom.tasks.base import Task


@dataclass(kw_only=True)
class Session:
    """A model with its task and tokenizer. Adapters come and go by ``model.add_adapter`` and ``delete_adapter``."""

    model: PeftModel
    task: Task
    tokenizer: Any = None
    #: the classes or tags by number
    labels: Sequence[str] = ()
    #: the processes that share the work
    world: ProcessGroup = SINGLE

    @property
    def base(self) -> nn.Module:
        """The model without the wrapper around it; adapters that were added stay in it."""
        return self.model.get_base_model()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        """The token that fills up shorter rows, which masks leave out."""
        return 0 if self.tokenizer is None else int(self.tokenizer.pad_token_id)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Context for forwards without gradients and dropout. Afterwards each module is in the mode that it had."""
        # Weights that FSDP gathers in inference mode could not be trained through afterwards.
        with evaluating(self.model, torch.no_grad() if sharded(self.model) else torch.inference_mode()):
            yield

    @contextmanager
    def temporary_adapters(self) -> Iterator[PeftModel]:
        """Context for adapters that go again: those that were added to the model in it are deleted at its end."""
        before = set(self.model.peft_config)
        try:
            yield self.model
        finally:
            for name in set(self.model.peft_config) - before:
                self.model.delete_adapter(name)

    def groups(self, adapters: Sequence[str], rows: int) -> list[list[str]]:
        """``adapters`` in groups that share a forward of at most ``rows`` rows; of a sharded model each by itself."""
        names = list(dict.fromkeys(adapters))
        size = 1 if sharded(self.model) else max(1, rows)
        return [names[start : start + size] for start in range(0, len(names), size)]
