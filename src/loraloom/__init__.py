"""Fine-tune many LoRA adapters on one frozen model at once, and find the best one by measurement.

The public names, imported when first used: ``import loraloom`` costs no more than torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraloom.config import LoraConfig as LoraConfig
    from loraloom.config import TaskType as TaskType
    from loraloom.errors import LoraloomError as LoraloomError
    from loraloom.lora.checkpoint import LoadReport as LoadReport
    from loraloom.lora.model import PeftModel as PeftModel
    from loraloom.lora.model import get_peft_model as get_peft_model
    from loraloom.lora.model import get_peft_model_state_dict as get_peft_model_state_dict
    from loraloom.lora.model import set_peft_model_state_dict as set_peft_model_state_dict
    from loraloom.lora.status import get_layer_status as get_layer_status
    from loraloom.lora.status import get_model_status as get_model_status
    from loraloom.lora.targets import Plan as Plan
    from loraloom.lora.targets import plan as plan
    from loraloom.train.pack import Pack as Pack

__version__ = "0.1.0"

_WHERE = {
    "LoraConfig": "loraloom.config",
    "TaskType": "loraloom.config",
    "LoraloomError": "loraloom.errors",
    "LoadReport": "loraloom.lora.checkpoint",
    "PeftModel": "loraloom.lora.model",
    "get_peft_model": "loraloom.lora.model",
    "get_peft_model_state_dict": "loraloom.lora.model",
    "set_peft_model_state_dict": "loraloom.lora.model",
    "get_layer_status": "loraloom.lora.status",
    "get_model_status": "loraloom.lora.status",
    "Pack": "loraloom.train.pack",
    "Plan": "loraloom.lora.targets",
    "plan": "loraloom.lora.targets",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'loraloom' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
