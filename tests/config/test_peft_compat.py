"""What peft, accelerate and TRL ask of an object before they do the right thing with it, asked of ours."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

import loraloom
from loraloom import LoraConfig, get_peft_model


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.table = nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Embedding(9, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.linear(self.table(x))
        return self.head(self.conv(hidden.transpose(1, 2)).transpose(1, 2))


CONFIG = LoraConfig(target_modules=["linear", "conv", "table"], modules_to_save=["head"], init_lora_weights=False)
X = torch.arange(6).view(2, 3)


def test_configs_and_layers_are_taken_for_pefts() -> None:
    model = get_peft_model(Net(), CONFIG)
    base = model.get_base_model()
    assert isinstance(CONFIG, peft.PeftConfig | peft.LoraConfig)
    assert isinstance(CONFIG, LoraConfig)
    assert isinstance(model.active_peft_config, peft.PeftConfig)
    assert all(isinstance(getattr(base, name), BaseTunerLayer) for name in ("linear", "conv", "table"))
    assert isinstance(base.linear, peft.tuners.lora.Linear)
    assert isinstance(base.table, peft.tuners.lora.Embedding)
    assert not isinstance(base.linear, peft.tuners.lora.Embedding)
    assert isinstance(base.head, ModulesToSaveWrapper)
    assert not isinstance(base.head, BaseTunerLayer)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_what_looks_like_pefts_is_copied_and_pickled_as_ours(again) -> None:
    model = get_peft_model(Net(), CONFIG)
    assert type(again(CONFIG)) is LoraConfig
    assert again(CONFIG) == CONFIG
    assert type(again(model).get_base_model().head) is type(model.get_base_model().head)
    assert torch.equal(again(model)(X), model(X))


@pytest.mark.parametrize(("task", "name"), [(None, "PeftModel"), ("CAUSAL_LM", "PeftModelForCausalLM"),
                                            ("SEQ_CLS", "PeftModelForSequenceClassification")])  # fmt: skip
def test_a_model_has_the_class_that_peft_gives_its_task(task: str | None, name: str, tmp_path: Path) -> None:
    made = get_peft_model(Net(), CONFIG.copy(task_type=task))
    made.save_pretrained(tmp_path)
    for model in (made, loraloom.PeftModel.from_pretrained(Net(), tmp_path)):
        assert isinstance(model, getattr(loraloom, name))
        assert isinstance(model, getattr(peft, name))
        assert repr(model).startswith(f"{name}(")
    assert not isinstance(made, loraloom.PeftModelForTokenClassification)


def test_accelerate_saves_and_loads_the_adapter_alone_under_fsdp() -> None:
    from accelerate.utils.fsdp_utils import _get_model_state_dict, _set_model_state_dict

    model = get_peft_model(Net(), CONFIG)
    found = _get_model_state_dict(model, adapter_only=True)
    wanted = loraloom.get_peft_model_state_dict(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    other = get_peft_model(Net(), CONFIG, seed=5)
    _set_model_state_dict(other, found, adapter_only=True)
    mine = loraloom.get_peft_model_state_dict(other)
    assert all(torch.equal(mine[key], wanted[key]) for key in wanted)


def test_pefts_own_get_peft_model_takes_our_config_as_trl_hands_it_over(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Net(), CONFIG.copy(lora_dropout=0.1))
    theirs(X).sum().backward()
    theirs.eval().save_pretrained(tmp_path)
    base = Net()
    base.load_state_dict(theirs.unload().state_dict())
    ours = loraloom.PeftModel.from_pretrained(base, tmp_path)
    assert ours.peft_config["default"].lora_dropout == 0.1
    assert len(ours.load_report.used) == 8
