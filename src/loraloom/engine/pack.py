"""Many adapters in one forward and one backward of one frozen model, each with its own rows, loss and gradients.

Knows adapters and tensors, not where rows come from, no optimizer and no schedule: it works in any training loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from loraloom import tasks
from loraloom.config.lora import LoraConfig
from loraloom.data.example import IGNORE
from loraloom.engine import gradient_probe
from loraloom.engine.forwards import divide, fixed_cost
from loraloom.engine.gradient_probe import Fault
from loraloom.errors import AdapterError, ConfigError, TargetError, nearest
from loraloom.lora import mixed
from loraloom.lora.model import PeftModel, get_peft_model
from loraloom.models import configs as model_configs
from loraloom.models.activation_checkpointing import recomputed
from loraloom.models.fsdp import sharded
from loraloom.tasks.base import Task
from loraloom.tasks.objective import Objective

#: The padding of shorter rows by the name of a model's argument; ids get the padding token.
_FILLERS = {"attention_mask": 0, "decoder_attention_mask": 0, "token_type_ids": 0, "labels": IGNORE}
_IDS = {"input_ids", "decoder_input_ids"}
#: An adapter's bits do not depend on the padded length where that is a multiple of this many tokens.
REGISTER = 16


class Pack:
    """Adapters that train side by side on ``model``, which is changed in place as by ``get_peft_model``.

    Args:
        configs: adapter → its config. They may differ in everything: rank, targets, dropout, biases, heads.
        task: decides the loss; by default the ``task_type`` of the configs.
        seeds: adapter → the seed of its initialisation; by default it follows from the name.
        pad_id: the padding token; by default the model's own, or 0 if it has none.
        pad_to_multiple_of: rows are padded to a multiple of this number of tokens. With a multiple of 16, adapters
            whose rows have unlike lengths share forwards of like length where that is cheaper than one of all.

    An adapter's numbers depend only on its own rows and seeds, not on the other adapters or the order. On a CPU in
    float32 or bfloat16 this holds to the last bit under two conditions: the same layers carry adapters, in use or not;
    and the other adapters change the padded length only by whole vector registers, as with rows of one length or
    ``pad_to_multiple_of=16``.
    """

    def __init__(
        self,
        model: nn.Module,
        configs: Mapping[str, LoraConfig] | None = None,
        *,
        task: Task | str | None = None,
        seeds: Mapping[str, int] | None = None,
        pad_id: int | None = None,
        pad_to_multiple_of: int = 1,
    ) -> None:
        configs, seeds = dict(configs or {}), dict(seeds or {})
        if unknown := [name for name in seeds if name not in configs]:
            raise ConfigError(f"seeds: {unknown[0]!r} is no adapter of this pack{nearest(unknown[0], configs)}")
        if isinstance(model, PeftModel):
            self.model = model
        elif configs:
            name, config = next(iter(configs.items()))
            self.model = get_peft_model(model, config, adapter_name=name, seed=seeds.get(name))
            del configs[name]
        else:
            raise ConfigError("configs: a pack on a plain model needs at least one adapter, found none")
        for name, config in configs.items():
            self.model.add_adapter(name, config, seed=seeds.get(name))
        known = [config.task_type for config in self.model.peft_config.values() if config.task_type]
        if task is None and not known:
            raise ConfigError("task: not given, and no config has a task_type; give TaskType.CAUSAL_LM, for example")
        self.task = tasks.get(task or known[0])
        if isinstance(pad_to_multiple_of, bool) or not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
            raise ConfigError(f"pad_to_multiple_of: must be a whole number of at least 1, found {pad_to_multiple_of!r}")
        self.pad_id, self._multiple = self._padding(pad_id), pad_to_multiple_of
        self.objective = Objective(self.model, self.task)
        self._learned: tuple[str, ...] = ()
        #: what a forward costs beside its places, in places; None where a step takes exactly one
        self._fixed: float | None = None
        #: positions that were computed, padding included
        self.places = 0

    def _padding(self, given: int | None) -> int:
        own = model_configs.token(getattr(self.model.get_base_model(), "config", None), "pad")
        if given is not None and own not in (None, given) and self.task.by_last_token:
            warnings.warn(
                f"pad_id: a classifier may find the end of a row by its config's pad_token_id, which is {own}, found "
                f"{given}; leave pad_id out, or set the config's",
                stacklevel=3,
            )
        return (own or 0) if given is None else given

    @property
    def adapters(self) -> list[str]:
        return list(self.model.peft_config)

    def add(self, name: str, config: LoraConfig, *, seed: int | None = None) -> None:
        """Add an adapter; the others keep training."""
        self.model.add_adapter(name, config, seed=seed)

    def remove(self, name: str) -> None:
        rest = [other for other in self.adapters if other != name]
        if rest and self.model.active_adapters == [name]:  # in a pack it does not matter which one is active
            self.model.set_adapter(rest[0])
        self.model.delete_adapter(name)

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The trainable parameters of this adapter by name, for its optimizer."""
        return self.model.adapter_parameters(name)

    def backward(
        self,
        batches: Mapping[str, Mapping[str, Tensor]],
        *,
        dropout_seeds: Mapping[str, int] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Compute the gradients of each named adapter from its own batch.

        Args:
            batches: adapter → the model's arguments for its rows, including ``labels``, each [rows, ...]. The number
                and length of rows may differ.
            dropout_seeds: adapter → the seed of its dropout masks; by default they follow torch's generator.
            weights: adapter → a factor of its loss, for gradients summed over several calls.

        Returns:
            Each adapter's loss. One that is not finite gives its adapter no gradients and does not affect the others.

        Raises:
            AdapterError: an unknown name, or tensors that do not fit together.
        """
        self._prepare(batches)
        found: dict[str, float] = {}
        for names in self._divided(batches):
            found |= self._in_one_forward(names, batches, dropout_seeds, weights)
        return {name: found[name] for name in batches}

    def _in_one_forward(
        self,
        names: Sequence[str],
        batches: Mapping[str, Mapping[str, Tensor]],
        dropout_seeds: Mapping[str, int] | None,
        weights: Mapping[str, float] | None,
    ) -> dict[str, float]:
        """``backward`` of some of the batches; one by one if layers' inputs do not show which row they belong to."""
        together = mixed.in_one_forward(
            self.model.base_model,
            names,
            lambda: self._backward(names, batches, dropout_seeds, weights),
            lambda site: self._prove(site, names, batches),
        )
        parts = together or [self._backward([name], batches, dropout_seeds, weights) for name in names]
        return {name: loss for part in parts for name, loss in part.items()}

    def _divided(self, batches: Mapping[str, Mapping[str, Tensor]]) -> list[list[str]]:
        """The adapters of each forward: all in one, or in several of like width where bits do not depend on width."""
        names = sorted(batches, key=lambda name: self._place(name, batches[name]))
        if len(names) == 1 or self._multiple % REGISTER or self._fixed is None:
            return [names]
        sizes = {name: self._size(batches[name]) for name in names}
        return divide(names, sizes, self._fixed)

    def _size(self, batch: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows, and the width that they are padded to; of a task with targets, of both together."""
        rows, width = batch["input_ids"].shape
        own = batch["labels"].shape[1] if self.task.layout == "target" else 0
        return rows, sum(-(-one // self._multiple) * self._multiple for one in (width, own))

    def _backward(
        self,
        names: Sequence[str],
        batches: Mapping[str, Mapping[str, Tensor]],
        dropout_seeds: Mapping[str, int] | None,
        weights: Mapping[str, float] | None,
    ) -> dict[str, float]:
        """``backward`` of some of the batches, in one forward."""
        lora = self.model.base_model
        inputs, rows = self._joined([(name, batches[name]) for name in names])
        labels = inputs.pop("labels")
        self.places += inputs["input_ids"].numel()
        slots = [name for name, own in rows.items() for _ in range(own.start, own.stop)]
        # The backward is inside: gradient checkpointing recomputes parts of the forward, with the same kernels.
        with (
            lora.lora_routed(slots, dropout_seeds, inputs.values()),
            self.objective.attention(inputs["input_ids"]),
        ):
            losses = self.objective.losses(self.objective.forward(inputs, labels), labels, rows)
            values = torch.stack([loss.detach().double() for loss in losses.values()]).tolist()
            found = dict(zip(losses, values, strict=True))
            good = [
                loss * (weights or {}).get(name, 1.0) for name, loss in losses.items() if math.isfinite(found[name])
            ]
            if good:
                torch.stack(good).sum().backward()  # type: ignore[no-untyped-call]
        return found

    def _prove(self, site: str, names: Sequence[str], batches: Mapping[str, Mapping[str, Tensor]]) -> bool:
        inputs, _ = self._joined([(name, batches[name]) for name in names])
        return self.objective.prove(site, inputs, inputs.pop("labels"))

    def _place(self, name: str, batch: Mapping[str, Tensor]) -> tuple[int, bool, int]:
        """Sort key by which similar adapters are neighbours, which share products (``lora.shared_inputs``)."""
        config = self.model.peft_config[name]
        return len(batch["input_ids"]), config.lora_dropout > 0, config.r

    def _prepare(self, batches: Mapping[str, Mapping[str, Tensor]]) -> None:
        if not batches:
            raise AdapterError("batches: found none, give one for each adapter to train")
        for name, batch in batches.items():
            if name not in self.model.peft_config:
                raise AdapterError(f"batches: {name!r} is no adapter of this pack{nearest(name, self.adapters)}")
            for key in ("input_ids", "labels"):
                if key not in batch:
                    raise AdapterError(f"batches: that of {name!r} has no {key}; found {', '.join(batch) or 'nothing'}")
        if self.model.training or not all(layer.training for layer in self.model.base_model.lora_layers.values()):
            train_adapters(self.model)
        # Which layers share inputs depends only on which modules are wrapped, and so on the adapters.
        if self._learned != tuple(self.adapters):
            name, batch = next(iter(batches.items()))
            self._warm_up(name, {key: value[:1] for key, value in batch.items()})
            self._learned = tuple(self.adapters)
            # Processes that share a sharded model run it together, so each runs it as often as the others.
            whole = not sharded(self.model)
            self._fixed = fixed_cost(self.model, len(self.model.base_model.lora_layers)) if whole else None
            for fault in self.probe(batches):
                if fault.stops:
                    raise TargetError(fault.text)
                warnings.warn(fault.text, stacklevel=3)

    def probe(self, batches: Mapping[str, Mapping[str, Tensor]]) -> list[Fault]:
        """What keeps adapters of ``batches`` from training, found on one row of each. Each adapter is examined once."""
        names = [] if sharded(self.model) else gradient_probe.unseen(self.model, list(batches))
        if names:
            train_adapters(self.model)
        found: list[Fault] = []
        known: set[tuple[str, ...]] = set()
        for name in names:
            places = tuple(place for place, layer in self.model.base_model.lora_layers.items() if name in layer.slots)
            if places in known:  # the same modules get the same gradients
                continue
            known.add(places)
            rows = self.task.probe_rows(batches[name])
            inputs, _ = self._joined([(name, {key: value[rows] for key, value in batches[name].items()})])
            found += gradient_probe.probe(self.model, self.objective, name, inputs)
        return found

    def _warm_up(self, name: str, row: Mapping[str, Tensor]) -> None:
        """Let the layers learn which inputs they share, so that the first step sums in the same order as later ones."""
        inputs, _ = self._joined([(name, row)])
        labels = inputs.pop("labels")
        with evaluating(self.model, torch.no_grad()), self.model.base_model.lora_routed([name]):
            self.objective.forward(inputs, labels)

    def _joined(self, parts: Sequence[tuple[str, Mapping[str, Tensor]]]) -> tuple[dict[str, Tensor], dict[str, slice]]:
        """One batch of all rows, padded on the right to the longest, and the rows of each adapter."""
        device = next(self.model.parameters()).device
        rows: dict[str, slice] = {}
        start = 0
        for name, batch in parts:
            rows[name] = slice(start, start + len(batch["input_ids"]))
            start = rows[name].stop
        keys = dict.fromkeys(key for _, batch in parts for key in batch)
        widths = {batch["input_ids"].shape[1] for _, batch in parts}
        if len(widths) > 1 or max(widths) % self._multiple:
            keys["attention_mask"] = None
        joined = {}
        for key in keys:
            found = [batch.get(key) for _, batch in parts]
            if key == "attention_mask":
                found = [torch.ones_like(b["input_ids"]) if f is None else f for f, (_, b) in zip(found, parts)]
            if key == "token_type_ids":  # a row without them has one segment
                found = [torch.zeros_like(b["input_ids"]) if f is None else f for f, (_, b) in zip(found, parts)]
            tensors = [tensor.to(device) for tensor in found if tensor is not None]
            if len(tensors) < len(found):
                lacks = next(name for (name, _), tensor in zip(parts, found, strict=True) if tensor is None)
                raise AdapterError(f"batches: that of {lacks!r} has no {key}, which others have")
            joined[key] = self._cat(key, tensors)
        return joined, rows

    def _cat(self, key: str, tensors: Sequence[Tensor]) -> Tensor:
        fillable = key in {*_IDS, *_FILLERS} and {tensor.dim() for tensor in tensors} == {2}
        if key == "labels" and self.task.layout == "row":
            fillable = False
        if len({tensor.shape[1:] for tensor in tensors}) > 1 or (fillable and tensors[0].shape[1] % self._multiple):
            if not fillable:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
                raise AdapterError(f"batches: {key} of unlike shapes {shapes} cannot be joined")
            filler, longest = _FILLERS.get(key, self.pad_id), max(tensor.shape[1] for tensor in tensors)
            width = -(-longest // self._multiple) * self._multiple
            tensors = [F.pad(tensor, (0, width - tensor.shape[1]), value=filler) for tensor in tensors]
        return torch.cat(list(tensors))


def train_adapters(model: PeftModel) -> None:
    """Put the adapters into training mode and the frozen model, with its heads' dropout, into evaluation mode.

    The model's own dropout would be drawn for all slots together, so that one slot's training would depend on the
    others, and its running statistics would change.
    """
    model.eval()
    for layer in model.base_model.lora_layers.values():
        layer.training = True
        layer.lora_dropout.train()
    for wrapper in model.base_model.lora_saved_modules.values():
        for module in wrapper.modules_to_save.modules():
            module.training = not isinstance(module, _DropoutNd)
    for module in recomputed(model):
        module.training = True


@contextmanager
def evaluating(model: PeftModel, mode: AbstractContextManager[Any]) -> Iterator[None]:
    """Context in evaluation mode and in ``mode``. Afterwards every module is in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with mode:
            yield
    finally:
        for module, training in modes:
            module.training = training
