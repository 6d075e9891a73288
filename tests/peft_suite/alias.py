"""``peft`` as other names for loraloom, for as long as PEFT's own tests run. It maps names and adds no behaviour.

``install(source)`` puts it into ``sys.modules``' way. A module of it exists where PEFT's source has one; a name that
loraloom lacks is a class that says so when it is called, so that a test file can be imported for its other tests.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

#: PEFT's name → (module, name) of what it is here, where the two differ.
NAMES = {
    "AuxiliaryTrainingWrapper": ("loraloom.lora.modules_to_save", "ModulesToSaveWrapper"),
    "BaseTuner": ("loraloom.lora.adapters", "LoraModel"),
    "BaseTunerLayer": ("loraloom.lora.layers", "LoraLayer"),
    "CONFIG_NAME": ("loraloom.config.lora", "CONFIG_NAME"),
    "Conv1d": ("loraloom.lora.layers", "LoraConv"),
    "Conv2d": ("loraloom.lora.layers", "LoraConv"),
    "Conv3d": ("loraloom.lora.layers", "LoraConv"),
    "Embedding": ("loraloom.lora.layers", "LoraEmbedding"),
    "INCLUDE_LINEAR_LAYERS_SHORTHAND": ("loraloom.lora.targets", "ALL_LINEAR"),
    "Linear": ("loraloom.lora.layers", "LoraLinear"),
    "LoraLayer": ("loraloom.lora.layers", "LoraLayer"),
    "LoraModel": ("loraloom.lora.adapters", "LoraModel"),
    "ModulesToSaveWrapper": ("loraloom.lora.modules_to_save", "ModulesToSaveWrapper"),
    "NoMatchingPeftModuleError": ("loraloom.errors", "TargetError"),
    "ParamWrapper": ("loraloom.lora.parameters", "LoraParameter"),
    "PeftError": ("loraloom.errors", "LoraloomError"),
    "SAFETENSORS_WEIGHTS_NAME": ("loraloom.lora.checkpoint", "WEIGHTS_NAME"),
    "TaskType": ("loraloom.config.lora", "TaskType"),
    "WEIGHTS_NAME": ("loraloom.lora.checkpoint", "PICKLED_NAME"),
}


class MissingName(NotImplementedError):
    """A name of PEFT that loraloom does not have was called."""


class Missing(type):
    """What a name that loraloom lacks is: nothing is an instance of it, and to call it is an error."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__name__.endswith("Config"):  # made in lists of cases, with those for LoRA among them
            return object.__new__(cls)
        raise MissingName(f"loraloom has no {cls.__name__}")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(name, (), {"__module__": cls.__module__})

    def __instancecheck__(cls, instance: object) -> bool:
        return False


def _values() -> dict[str, Any]:
    """What has a value of its own here: facts about this machine, and not about loraloom."""
    from torch import nn

    from loraloom import LoraConfig
    from loraloom.config.lora import PEFT_FORMAT
    from loraloom.lora.matching import in_layers, matches_any
    from loraloom.lora.presets import TARGET_MODULES

    def no(*args: object, **kwargs: object) -> bool:
        return False

    def exists(config: LoraConfig, name: str) -> bool:
        return matches_any(config.target_modules, name) and in_layers(name, config)

    def submodules(model: nn.Module, name: str) -> tuple[nn.Module, nn.Module, str]:
        parent, _, leaf = name.rpartition(".")
        return model.get_submodule(parent), model.get_submodule(name), leaf

    return {
        "_get_submodules": submodules,
        "check_target_module_exists": exists,
        "__version__": PEFT_FORMAT,
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": TARGET_MODULES,
        "infer_device": lambda: "cpu",
        "is_bnb_4bit_available": no,
        "is_bnb_available": no,
        "is_diffusers_available": no,
        "is_gptqmodel_available": no,
        "is_hqq_available": no,
        "is_torchao_available": no,
        "is_transformers_ge_v5": True,
        "is_transformers_ge_v5_1_0": True,
        "is_xpu_available": no,
        "DUMMY_MODEL_CONFIG": {"model_type": "custom"},
        "MIN_TARGET_MODULES_FOR_OPTIMIZATION": 20,
        "PEFT_TYPE_TO_PREFIX_MAPPING": {"LORA": "lora_"},
    }


class _Module(ModuleType):
    source: Path
    values: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name in self.values:
            return self.values[name]
        if name.startswith("__") or _exists(self.source, f"{self.__name__}.{name}"):
            raise AttributeError(name)  # a module, which Python imports then
        import loraloom

        if name in NAMES:
            module, attribute = NAMES[name]
            found = getattr(importlib.import_module(module), attribute)
        elif name in loraloom.__all__:
            found = getattr(loraloom, name)
        else:
            found = Missing(name, (), {"__module__": self.__name__})
        self.values[name] = found
        return found


def _exists(source: Path, module: str) -> bool:
    path = source / "src" / Path(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, source: Path) -> None:
        self._source = source
        self._values = _values()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "peft" or not _exists(self._source, fullname):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _Module(spec.name)
        module.source, module.values = self._source, self._values
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def install(source: Path) -> None:
    """Let ``import peft`` find loraloom from now on. ``source``: a checkout of PEFT, for the names of its modules."""
    if "peft" in sys.modules:
        raise RuntimeError("peft was imported already; install the alias first")
    sys.meta_path.insert(0, _Finder(source))
    if importlib.util.find_spec("diffusers") is None:  # which the tests import at the top, and few of them use
        sys.modules["diffusers"] = _stub("diffusers")


def _stub(name: str) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(__version__="0", __spec__=importlib.machinery.ModuleSpec(name, None))

    def missing(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return Missing(attribute, (), {"__module__": name})

    vars(module)["__getattr__"] = missing
    return module
