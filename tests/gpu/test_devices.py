"""No tensor is made on the wrong device, and no wait for it goes unseen: tried with fake tensors, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
#: With LORALOOM_TEST_DEVICE set, as in the second run of ``make test-avx2``, all of them
QUICK = ["a_pack", "a_slot_with_a_loss_scale", "rows_in_any_order", "an_optimizer_that_goes_on"]
WHOLE = "LORALOOM_TEST_DEVICE" in os.environ


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a process met in which the processor stands in for a GPU: see standin.py."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / "standin.py"), *([] if WHOLE else QUICK)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_nothing_is_on_the_wrong_device(found: dict[str, Any]) -> None:
    assert len(found) == (9 if WHOLE else len(QUICK))
    assert {name: one for name, one in found.items() if "error" in one} == {}


def test_a_backward_runs_on_the_devices_own_thread(found: dict[str, Any]) -> None:
    for name in ("a_pack", "checkpointing", "reentrant_checkpointing", "an_encoder_and_a_decoder"):
        assert name not in found or found[name]["backward on another thread"]


def test_a_step_waits_for_the_device_a_few_times_whatever_the_layers(found: dict[str, Any]) -> None:
    """The rows come, labels are found and counted, losses looked at, and each optimizer looks at its gradients."""
    for name in {"a_pack", "a_slot_with_a_loss_scale", "checkpointing"} & found.keys():
        waits: Counter[str] = Counter()
        for place, times in found[name]["waits"].items():
            waits[place.partition(":")[0]] += times
        del waits["dropout.py"]  # seeds of several slots, which CUDA takes from pinned memory without waiting
        assert waits.keys() <= {"objective.py", "pack.py", "flat_adamw.py"}
        assert waits["objective.py"] <= 2
        assert waits["pack.py"] <= 5
        assert waits["flat_adamw.py"] <= 3


def test_an_order_of_rows_is_brought_to_the_device_once(found: dict[str, Any]) -> None:
    assert sum(found["rows_in_any_order"]["waits"].values()) <= 6
