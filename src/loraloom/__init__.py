"""Fine-tune many LoRA adapters on one frozen model at once, and find the best one by measurement.

The public names, imported when first used: ``import loraloom`` costs no more than torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraloom.api import Run as Run
    from loraloom.api import Search as Search
    from loraloom.api import train as train
    from loraloom.api import tune as tune
    from loraloom.config.lora import LoraConfig as LoraConfig
    from loraloom.config.lora import PeftConfig as PeftConfig
    from loraloom.config.lora import PeftType as PeftType
    from loraloom.config.lora import TaskType as TaskType
    from loraloom.engine.pack import Pack as Pack
    from loraloom.errors import LoraloomError as LoraloomError
    from loraloom.lora.auto import AutoPeftModel as AutoPeftModel
    from loraloom.lora.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from loraloom.lora.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from loraloom.lora.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from loraloom.lora.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from loraloom.lora.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from loraloom.lora.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from loraloom.lora.auto import get_base_model_state_dict as get_base_model_state_dict
    from loraloom.lora.auto import get_peft_config as get_peft_config
    from loraloom.lora.auto import get_peft_model_state_dict as get_peft_model_state_dict
    from loraloom.lora.auto import inject_adapter_in_model as inject_adapter_in_model
    from loraloom.lora.auto import load_peft_weights as load_peft_weights
    from loraloom.lora.auto import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from loraloom.lora.auto import set_peft_model_state_dict as set_peft_model_state_dict
    from loraloom.lora.keys import LoadReport as LoadReport
    from loraloom.lora.model import PeftModel as PeftModel
    from loraloom.lora.model import PeftModelForCausalLM as PeftModelForCausalLM
    from loraloom.lora.model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from loraloom.lora.model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from loraloom.lora.model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from loraloom.lora.model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from loraloom.lora.model import PeftModelForTokenClassification as PeftModelForTokenClassification
    from loraloom.lora.model import get_peft_model as get_peft_model
    from loraloom.lora.status import get_layer_status as get_layer_status
    from loraloom.lora.status import get_model_status as get_model_status
    from loraloom.lora.targets import Plan as Plan
    from loraloom.lora.targets import plan as plan

__version__ = "0.2.0"

_WHERE = {
    "train": "loraloom.api",
    "tune": "loraloom.api",
    "Run": "loraloom.api",
    "Search": "loraloom.api",
    "LoraConfig": "loraloom.config.lora",
    "TaskType": "loraloom.config.lora",
    "LoraloomError": "loraloom.errors",
    "LoadReport": "loraloom.lora.keys",
    "PeftModel": "loraloom.lora.model",
    "get_base_model_state_dict": "loraloom.lora.auto",
    "get_peft_model": "loraloom.lora.model",
    "get_peft_model_state_dict": "loraloom.lora.auto",
    "set_peft_model_state_dict": "loraloom.lora.auto",
    "get_layer_status": "loraloom.lora.status",
    "get_model_status": "loraloom.lora.status",
    "PeftConfig": "loraloom.config.lora",
    "PeftType": "loraloom.config.lora",
    "AutoPeftModel": "loraloom.lora.auto",
    "AutoPeftModelForCausalLM": "loraloom.lora.auto",
    "AutoPeftModelForFeatureExtraction": "loraloom.lora.auto",
    "AutoPeftModelForQuestionAnswering": "loraloom.lora.auto",
    "AutoPeftModelForSeq2SeqLM": "loraloom.lora.auto",
    "AutoPeftModelForSequenceClassification": "loraloom.lora.auto",
    "AutoPeftModelForTokenClassification": "loraloom.lora.auto",
    "get_peft_config": "loraloom.lora.auto",
    "inject_adapter_in_model": "loraloom.lora.auto",
    "load_peft_weights": "loraloom.lora.auto",
    "prepare_model_for_kbit_training": "loraloom.lora.auto",
    "PeftModelForCausalLM": "loraloom.lora.model",
    "PeftModelForFeatureExtraction": "loraloom.lora.model",
    "PeftModelForQuestionAnswering": "loraloom.lora.model",
    "PeftModelForSeq2SeqLM": "loraloom.lora.model",
    "PeftModelForSequenceClassification": "loraloom.lora.model",
    "PeftModelForTokenClassification": "loraloom.lora.model",
    "Pack": "loraloom.engine.pack",
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
