"""Any value becomes JSON: for programs with null for what is not finite, for ourselves so that it comes back."""

from __future__ import annotations

import json
import math
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from loraloom.files.jsonio import MALFORMED, exact, plain, restored


class Kind(Enum):
    ONE = "one"


def test_a_record_is_plain_json_whatever_it_was_made_of() -> None:
    value = {
        1: (math.nan, -math.inf, 0.5), "a": {"b", "a"}, "kind": Kind.ONE, "path": Path("x/y"), "none": None,
        "numpy": np.float32(0.25), "torch": torch.tensor(3), "nan": np.float64("nan"), "true": True,
    }  # fmt: skip
    text = json.dumps(plain(value), allow_nan=False)
    assert json.loads(text) == {
        "1": [None, None, 0.5], "a": ["a", "b"], "kind": "one", "path": "x/y", "none": None,
        "numpy": 0.25, "torch": 3, "nan": None, "true": True,
    }  # fmt: skip


def test_a_state_comes_back_with_every_number() -> None:
    value = {"curve": [1.5, math.inf, -math.inf, {"deep": math.nan}], "text": "nan", "count": 3, "off": False}
    found = restored(json.loads(json.dumps(exact(value), allow_nan=False)))
    assert math.isnan(found["curve"][3].pop("deep"))
    value["curve"][3].clear()  # type: ignore[index]
    assert found == value


def test_what_stands_for_a_number_and_is_none_is_malformed() -> None:
    with pytest.raises(MALFORMED):
        restored({"number": "many"})
