"""The life of adapters on one base: add, set, disable, merge, delete. ``LoraModel`` decides which slots a forward uses.

The layers are indexed once, so that switching is setting a route and costs the same for any number of layers.
Knows nothing of files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import Tensor, nn

from loraloom.config.lora import LoraConfig
from loraloom.errors import AdapterError, ConfigError, TargetsWarning
from loraloom.lora import merge
from loraloom.lora.base import Base
from loraloom.lora.dispatch import Plan as ForwardPlan
from loraloom.lora.initialize import seed_of
from loraloom.lora.injection import Wrapper, strip
from loraloom.lora.layer import LoraLayer
from loraloom.lora.matching import matches_any
from loraloom.lora.parameters import LoraParameter
from loraloom.lora.routed import RoutedModel, listed
from loraloom.lora.routing import BASE, Route
from loraloom.lora.targets import Plan, plan, plan_on

#: An adapter may have twice as many numbers as its file, and this many more.
_MISSING = 10**8


class LoraModel(RoutedModel):
    """A frozen model and the adapters on it. ``model`` is changed in place: targets are wrapped, nothing is copied.

    Adding the first adapter freezes every parameter of ``model``. Adapters are trainable as soon as they are added;
    only active ones (``set_adapter``) get gradients.
    """

    #: PEFT's: what the names of an adapter's tensors begin with.
    prefix = "lora_"

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(module, Wrapper | LoraModel) for module in model.modules()):
            raise ConfigError(
                "model: it carries adapters already; use add_adapter or load_adapter on the PeftModel that you have, "
                "or unload() it first"
            )
        super().__init__(model)
        #: the base's parameters that required gradients before the first adapter
        self._thawed: list[nn.Parameter] = []
        #: adapter → the names that PEFT would not find in its folder
        self.lora_unreadable: dict[str, tuple[str, ...]] = {}

    # -- add and delete -----------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        config: LoraConfig,
        *,
        seed: int | None = None,
        strict: bool = True,
        autocast_adapter_dtype: bool = True,
        tensors: Mapping[str, Tensor] | None = None,
        source: str = "",
        fill: Callable[[Plan], None] | None = None,
    ) -> Plan:
        """Give ``adapter_name`` its slot in every layer that ``config`` targets. The active adapters stay active.

        Args:
            seed: of the initialisation; by default it follows from ``adapter_name``.
            strict: as in ``plan``.
            autocast_adapter_dtype: keep factors in float32 where the base is float16 or bfloat16.
            tensors: an adapter's tensors under PEFT's keys, which ``fill`` will copy into the slot; the slot's tensors
                of these keys start uninitialised.
            source: of ``tensors``, a prefix of error messages about them.
            fill: called once the slot exists. If it raises, the slot is removed again.

        Raises:
            AdapterError: the name is taken or cannot be a name, or adapters are merged.
            TargetError: as ``plan``. Nothing was changed.
        """
        self._check_new_name(adapter_name)
        self._check_unmerged("add_adapter")
        base = Base(self.model)
        made = plan_on(base, config, strict, autocast_adapter_dtype, follow_ties=tensors is None)
        seed = seed_of(adapter_name) if seed is None else seed
        if tensors is not None:
            _check_size(made, tensors, source)
        first = not self.peft_config
        if first:
            self._thawed = [p for p in self.model.parameters() if p.requires_grad]
        try:
            with self._slots.exclusive("add_adapter", made):
                for parameter in self._thawed if first else ():
                    parameter.requires_grad_(False)
                self._slots.add(adapter_name, made, base.modules, seed, autocast_adapter_dtype, tensors or {})
                self._follow()
            self.peft_config[adapter_name] = made.config
            self.lora_unreadable[adapter_name] = made.unreadable
            if made.note:
                warnings.warn(made.note, TargetsWarning, stacklevel=4)
            if made.config.inference_mode and (made.saved or made.biases):
                self.set_requires_grad(adapter_name, False)
            if fill is not None:
                fill(made)
        except BaseException:  # Ctrl-C among them
            self._remove(adapter_name)
            if first:
                self.thaw()
            raise
        return made

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. Layers that carry no other adapter become the original modules again.

        If it was the only active one, the first that remains becomes active, with a warning, as in PEFT.
        """
        self._check_names([adapter_name])
        self._check_unmerged("delete_adapter")
        active = tuple(name for name in self._active if name != adapter_name)
        remaining = [name for name in self.peft_config if name != adapter_name]
        if self._active and not active and remaining:
            active = (remaining[0],)
            warnings.warn(
                f"adapter {adapter_name!r} was active and is deleted; {active[0]!r} is active now, "
                "call set_adapter for another",
                stacklevel=2,
            )
        with self.lora_dispatcher.exclusive("delete_adapter", adapter_name):
            self._set(active)
            self._remove(adapter_name)

    def _remove(self, adapter_name: str) -> None:
        """Remove an inactive adapter, also one that was added only in part."""
        self._slots.remove(adapter_name)
        self._follow()
        self.peft_config.pop(adapter_name, None)
        self.lora_unreadable.pop(adapter_name, None)

    # -- which adapters are active --------------------------------------------------------------------------------

    @property
    def targeted_module_names(self) -> list[str]:
        """PEFT's name for the names of the adapted modules."""
        return [name for name, layer in self.lora_layers.items() if self.lora_parameter_of(layer) is None]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """PEFT's name for the names of the adapted parameters."""
        return [name for layer in self.lora_layers.values() if (name := self.lora_parameter_of(layer)) is not None]

    def lora_parameter_of(self, layer: LoraLayer) -> str | None:
        """The name of the parameter that ``layer`` adapts; None if adapters target its module.

        The ``weight`` of a linear layer is adapted by the layer itself, whichever of the two a config names.
        """
        if layer.kind == LoraParameter.kind:
            return layer.name
        weight = f"{layer.name}.weight"
        configs = [self.peft_config[slot] for slot in layer.slots if slot in self.peft_config]
        named = configs and all(
            matches_any(config.target_parameters, weight) and not matches_any(config.target_modules, layer.name)
            for config in configs
        )
        return weight if named else None

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The config of ``model`` as a dictionary; PEFT's stand-in where it has none."""
        config: Any = getattr(model, "config", None) or {"model_type": "custom"}
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        return asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter active, or several whose updates add up. ``requires_grad`` stays as it is.

        ``inference_mode=True`` freezes the named adapters as well.
        """
        names = self._names(adapter_name)
        if self.merged_adapters and set(names) != set(self.merged_adapters):
            raise AdapterError(f"set_adapter: {listed(self.merged_adapters)} are merged; call unmerge_adapter() first")
        self._check_together("set_adapter", names)
        self._set(tuple(dict.fromkeys(names)))
        if inference_mode:
            self.set_requires_grad(names, False)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in self._names(adapter_names):
            for parameter in self.parameters_of(name).values():
                parameter.requires_grad_(requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The frozen model alone, merged or not, for the length of a ``with`` block, exceptions included.

        Applies to this thread alone. ``adapter_names`` have no effect inside, as in PEFT.
        """
        merged, enabled = self.merged_adapters, self._enabled
        if merged:
            self.unmerge_adapter()
        try:
            with self.following(ForwardPlan(Route(), disabled=True), "disable_adapter"):
                yield
        finally:
            self._enabled = enabled
            if merged:
                self.merge_adapter(merged)

    # -- what an adapter consists of --------------------------------------------------------------------------------

    def tensors_of(self, adapter_name: str) -> dict[str, Tensor]:
        """Every tensor of one adapter, live, under PEFT's key for it in a file (with ``base_model.model.``)."""
        self._check_names([adapter_name])
        return self._slots.tensors_of(adapter_name)

    def parameters_of(self, adapter_name: str) -> dict[str, nn.Parameter]:
        """The trainable part of ``tensors_of``; tied parameters once."""
        unique: dict[int, tuple[str, nn.Parameter]] = {}
        for key, tensor in self.tensors_of(adapter_name).items():
            if isinstance(tensor, nn.Parameter):
                unique.setdefault(id(tensor), (key, tensor))
        return dict(unique.values())

    # -- merging --------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True) -> None:
        """Fold updates into the weights: all of them or, on any obstacle or non-finite result, none.

        ``adapter_names`` are the active ones by default and are added to those merged before. Until
        ``unmerge_adapter`` the frozen weights are kept aside and the merged adapters apply, their heads and biases
        included, whichever are active. Merging is always safe; ``safe_merge`` is part of PEFT's signature.

        Raises:
            MergeError: a weight cannot hold the update, or would not be finite. Nothing was changed.
            AdapterError: a name does not exist, adapters are disabled, or two train their own copy of one thing.
        """
        names = list(self._active) if adapter_names is None else list(adapter_names)
        if not self.lora_enabled:
            raise AdapterError(
                "merge_adapter: the adapters are disabled, and merged weights would answer with them; leave "
                "disable_adapter() or call enable_adapter_layers() first"
            )
        if names and set(names) <= set(self._merged):
            warnings.warn(f"All adapters are already merged, nothing to do: {listed(names)}", stacklevel=2)  # PEFT's
            return
        self._merge("merge_adapter", [*self._merged, *names])

    def _merge(self, what: str, names: Sequence[str]) -> None:
        self._check_names(names)
        self._check_together(what, names)
        merged = tuple(dict.fromkeys(names))
        with self.lora_dispatcher.exclusive(what):
            merge.merge(self.lora_layers, merged)
            self._merged = merged
            self._follow()

    def unmerge_adapter(self) -> None:
        """Restore the frozen weights, bit for bit. The active adapters apply again."""
        if not self._merged:
            return
        with self.lora_dispatcher.exclusive("unmerge_adapter"):
            merge.unmerge(self.lora_layers)
            self._merged = ()
            self._follow()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The plain model with the adapters merged: weights, heads and biases. This object is empty afterwards.

        Every tensor has the base's dtype, also copies that were trained in float32.
        ``adapter_names`` are the active ones by default, disabled or not.

        Raises:
            MergeError, AdapterError: as ``merge_adapter``. Nothing was changed.
        """
        names = list(self._active) if adapter_names is None else list(adapter_names)
        merge.check_copies(self.lora_saved_modules, names)
        self._merge("merge_and_unload", names)
        if not self._merged:
            return self.unload()
        untied = merge.untied(self.model, self.lora_layers)
        strip(self.model, keep_copies=True)
        if untied:
            merge.untie(self.model)
        return self._emptied()

    def unload(self) -> nn.Module:
        """The plain model as it was, bit for bit. This object is empty afterwards."""
        self.unmerge_adapter()
        with self.lora_dispatcher.exclusive("unload"):
            self._slots.biases.install(())
            strip(self.model)
            return self._emptied()

    def thaw(self) -> None:
        """Let the base's parameters require gradients again where they did before the first adapter."""
        for parameter in self._thawed:
            parameter.requires_grad_(True)

    def _emptied(self) -> nn.Module:
        self.thaw()
        self._slots.clear()
        self._modules.pop("biases", None)
        self.peft_config, self.lora_unreadable, self._active, self._merged = {}, {}, (), ()
        self.lora_dispatcher.set_default(Route())
        return self.model

    # -- checks -----------------------------------------------------------------------------------------------------

    def _names(self, given: str | Sequence[str]) -> list[str]:
        names = [given] if isinstance(given, str) else list(given)
        self._check_names(names)
        return names

    def _check_new_name(self, name: str) -> None:
        if not isinstance(name, str) or not name or "." in name or "/" in name or name == BASE:
            raise AdapterError(
                f"adapter_name: {name!r} cannot be a name; use letters, digits, '-' and '_', without '.' or '/'"
            )
        if name in self.peft_config:
            raise AdapterError(f"adapter_name: {name!r} exists already; delete_adapter it first or choose another name")
        if hasattr(nn.ModuleDict(), name):
            raise AdapterError(f"adapter_name: {name!r} is an attribute of torch's ModuleDict; choose another name")

    def check_same(self, name: str, config: LoraConfig, source: str) -> Plan:
        """The plan of ``config``, which must describe the adapter ``name`` for its tensors to be overwritten."""
        self._check_unmerged("load_adapter")
        planned = plan(self.model, config, strict=False, follow_ties=False)
        layers = self.lora_layers.items()
        there = {key: (layer.r[name], layer.scaling[name]) for key, layer in layers if name in layer.r}
        if {target.name: (target.r, target.scale) for target in planned.targets} != there:
            raise AdapterError(
                f"{source}adapter {name!r} exists already and has other targets, ranks or scales than this one; "
                "delete_adapter it first or choose another name"
            )
        return planned

    def _check_together(self, what: str, names: Sequence[str]) -> None:
        for thing, owners in self._slots.owners().items():
            clash = [name for name in dict.fromkeys(names) if name in owners]
            if len(clash) > 1:
                raise AdapterError(
                    f"{what}: {listed(clash)} each train their own {thing}, so they cannot be active together"
                )


def _check_size(made: Plan, tensors: Mapping[str, Tensor], source: str) -> None:
    """A small file must not make loading allocate a large adapter."""
    there, largest = sum(tensor.numel() for tensor in tensors.values()), max(made.rows, key=lambda row: row.parameters)
    if made.parameters > 2 * there + _MISSING:
        raise AdapterError(
            f"{source}r: the config asks for {made.parameters:,} numbers, most of them for {largest.name}, and the "
            f"file holds {there:,}; config and file are of different adapters, or damaged"
        )
