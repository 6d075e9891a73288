"""Threads are compared with the cores that a process may use, the quota of its container and the machine's load."""

from __future__ import annotations

import re

import pytest
import torch

from loraloom.report.sentences import sentence
from loraloom.training.preflight import machine


@pytest.mark.parametrize(
    ("count", "allowed", "quota", "load", "said"),
    [
        (2, 2, None, 2.0, None),  # all of it our own
        (64, 64, None, 64.0, None),
        (1, 2, None, 15.0, None),
        (4, 8, 4.0, 4.0, None),
        (2, 2, None, 15.0, "2 threads on 2 cores whose load is 15.0: .* OMP_NUM_THREADS=1$"),
        (8, 8, None, 14.0, "8 threads on 8 cores whose load is 14.0: .* OMP_NUM_THREADS=2$"),
        (8, 8, 2.0, 0.0, "8 threads, and the quota of this container is 2 cores: .* OMP_NUM_THREADS=2$"),
        (8, 8, 1.5, 0.0, "quota of this container is 1.5 cores: .* OMP_NUM_THREADS=2$"),
        (8, 8, 0.5, 0.0, "OMP_NUM_THREADS=1$"),
        (8, 4, None, 0.0, "8 threads, and it may use 4 cores: .* OMP_NUM_THREADS=4$"),
    ],
)
def test_too_many_threads_are_a_finding_that_says_what_to_set(
    count: int, allowed: int, quota: float | None, load: float, said: str | None
) -> None:
    found = machine.threads(count, allowed, quota, load)
    assert (found is None) == (said is None)
    if found is not None:
        assert said is not None
        assert re.search(said, sentence(found)), sentence(found)


def test_an_accelerator_needs_no_word_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert machine.examine(torch.device("cuda")) == []
    assert [finding.kind for finding in machine.examine(torch.device("cpu"))] == ["threads"]
