"""What a process may take is what its machine has, within the limits of its container."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from loraloom.files import resources

GB = 10**9


def test_the_quota_is_the_least_of_all_groups_in_both_versions(tmp_path: Path) -> None:
    own, inner = tmp_path / "own", tmp_path / "cgroup" / "a" / "b"
    inner.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    (inner / "cpu.max").write_text("max 100000\n")
    assert resources.quota(tmp_path / "cgroup", own) is None
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert resources.quota(tmp_path / "cgroup", own) == 1.5
    (tmp_path / "cgroup" / "cpu.max").write_text("50000 100000\n")  # the namespace's own root
    assert resources.quota(tmp_path / "cgroup", own) == 0.5
    old = tmp_path / "old" / "cpu" / "docker"
    old.mkdir(parents=True)
    own.write_text("3:memory:/docker\n4:cpu,cpuacct:/docker\n")
    (old / "cpu.cfs_quota_us").write_text("300000\n")
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert resources.quota(tmp_path / "old", own) == 3.0
    assert resources.quota(tmp_path, tmp_path / "nothing") is None


def test_free_memory_is_what_the_tightest_group_leaves_files_in_memory_not_counted(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "cgroup"
    inner = root / "a" / "b"
    inner.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    whole = resources.memory_free(root, own)
    assert whole == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    for group, limit, used, files in ((inner, "max", 5, 0), (inner.parent, "700000", 500_000, 100_000)):
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 1\ninactive_file {files}\n")
    assert resources.memory_free(root, own) == 300_000
    (inner.parent / "memory.current").write_text("900000\n")
    assert resources.memory_free(root, own) == 0


def test_free_memory_knows_groups_of_the_first_version_too(tmp_path: Path) -> None:
    own, group = tmp_path / "own", tmp_path / "cgroup" / "memory" / "docker"
    group.mkdir(parents=True)
    own.write_text("3:cpu,cpuacct:/x\n5:memory:/docker\n")
    (group / "memory.limit_in_bytes").write_text("1000000\n")
    (group / "memory.usage_in_bytes").write_text("400000\n")
    (group / "memory.stat").write_text("cache 3\ntotal_inactive_file 50000\n")
    assert resources.memory_free(tmp_path / "cgroup", own) == 650_000
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # no limit
    assert resources.memory_free(tmp_path / "cgroup", own) > 10 * 650_000


def test_memory_in_use_grows_with_what_is_taken() -> None:
    before = resources.memory_used()
    taken = bytearray(64 * 2**20)
    taken[::4096] = b"x" * len(taken[::4096])
    assert resources.memory_used() - before > 32 * 2**20


def test_there_is_a_core() -> None:
    assert resources.cores() >= 1
