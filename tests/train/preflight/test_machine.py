"""Threads are compared with the cores that a process may use, the quota of its container and the machine's load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from loraloom.train.preflight import machine


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
        assert not found.stops
        assert said is not None
        assert re.search(said, found.text), found.text


def test_the_quota_is_the_least_of_all_groups_in_both_versions(tmp_path: Path) -> None:
    own, inner = tmp_path / "own", tmp_path / "cgroup" / "a" / "b"
    inner.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    (inner / "cpu.max").write_text("max 100000\n")
    assert machine.quota(tmp_path / "cgroup", own) is None
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert machine.quota(tmp_path / "cgroup", own) == 1.5
    (tmp_path / "cgroup" / "cpu.max").write_text("50000 100000\n")  # the namespace's own root
    assert machine.quota(tmp_path / "cgroup", own) == 0.5
    old = tmp_path / "old" / "cpu" / "docker"
    old.mkdir(parents=True)
    own.write_text("3:memory:/docker\n4:cpu,cpuacct:/docker\n")
    (old / "cpu.cfs_quota_us").write_text("300000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.quota(tmp_path / "old", own) == 3.0
    assert machine.quota(tmp_path, tmp_path / "nothing") is None


def test_an_accelerator_needs_no_word_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert machine.examine(torch.device("cuda")) == []
    assert [finding.kind for finding in machine.examine(torch.device("cpu"))] == ["threads"]
