"""A regular expression that would never finish is found before it is used."""

from __future__ import annotations

import time

import pytest
from torch import nn

from loraloom import LoraConfig, get_peft_model
from loraloom.errors import TargetError
from loraloom.lora import matching
from loraloom.lora.matching import may_explode


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_linear_layer_with_a_name_of_so_many_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa = nn.Linear(4, 4)


NAME = "a_linear_layer_with_a_name_of_so_many_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
ENDLESS = r"([a-z_]+)+\d"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ENDLESS},
        {"target_modules": r"(\w+\w+)*!"},
        {"target_modules": r".*.*.*.*.*.*.*.*.*.*.*.*.*.*!"},
        {"target_modules": [NAME], "exclude_modules": None, "rank_pattern": {ENDLESS: 4}},
        {"target_modules": [NAME], "alpha_pattern": {r"(\w?){40}!": 4}},
    ],
)
def test_it_is_refused_within_seconds(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(TargetError, match=f"{list(fields)[-1]}: the regular expression .* does not come to an end"):
        get_peft_model(Net(), LoraConfig(**fields), strict=False)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "expression", [r".*\.layers\.[02]\.self_attn\.[qk]_proj", ".*(q|v)_proj", r"^(?!.*vis).*\.\d+$"]
)
def test_what_people_write_costs_nothing(expression: str) -> None:
    assert not may_explode(expression)


def test_an_unusual_one_that_ends_is_used() -> None:
    assert may_explode(r"(\w+_)*a+")
    made = get_peft_model(Net(), LoraConfig(target_modules=r"(\w+_)*a+"))
    assert list(made.base_model.lora_layers) == [NAME]
