"""Promises of the cache: whole or absent, damaged entries made again, and a disk that cannot be written ends no run.

What goes when it is too much is in ``test_room``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from loraloom.data.table import cache
from loraloom.data.table.cache import Draft, cache_folder, entry, find, key_of
from loraloom.errors import SaveError


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(text: bytes = b"rows", calls: list[int] | None = None):
    def make(draft: Draft) -> dict:
        if calls is not None:
            calls.append(1)
        file = draft.file("a.bin")
        file.write(text[:2])
        file.write(memoryview(text[2:]))
        draft.file("empty.bin")
        return {"length": len(text)}

    return make


def test_an_entry_is_built_once_and_found_again(folder: Path) -> None:
    calls: list[int] = []
    assert find("rows", "k") is None
    made = entry("rows", "k", build(calls=calls))
    again = entry("rows", "k", build(calls=calls))
    assert len(calls) == 1
    assert (made.fresh, again.fresh) == (True, False)
    assert made.folder == again.folder == folder / "rows" / "k"
    assert made.info == again.info == {"length": 4}
    assert (made.folder / "a.bin").read_bytes() == b"rows"
    assert sorted(path.name for path in folder.rglob("*")) == ["a.bin", "empty.bin", "k", "manifest.json", "rows"]
    assert find("rows", "k").info == {"length": 4}


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "a.bin").write_bytes(b"rowz"),
        lambda path: (path / "a.bin").write_bytes(b"row"),
        lambda path: (path / "a.bin").unlink(),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text("{"),
        lambda path: (path / "manifest.json").write_text("[]"),
        lambda path: (path / "manifest.json").write_bytes(b"\xff\x00"),
        lambda path: _edit(path, format=0),
        lambda path: _edit(path, key="other"),
        lambda path: _edit(path, files=None),
    ],
)
def test_a_damaged_entry_is_said_and_made_again(damage, folder: Path) -> None:
    made = entry("rows", "k", build())
    damage(made.folder)
    said: list[str] = []
    calls: list[int] = []
    assert find("rows", "k") is None
    again = entry("rows", "k", build(calls=calls), said.append)
    assert len(calls) == 1
    assert "damaged" in said[0]
    assert str(made.folder) in said[0]
    assert (again.folder / "a.bin").read_bytes() == b"rows"
    assert find("rows", "k") is not None
    assert [path.name for path in (folder / "rows").iterdir()] == ["k"]


def _edit(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_fails_while_it_is_built_leaves_nothing(folder: Path) -> None:
    def broken(draft: Draft) -> dict:
        draft.file("a.bin").write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        entry("rows", "k", broken)
    assert list((folder / "rows").iterdir()) == []


def test_an_entry_with_its_own_io_error_is_not_taken_for_a_bad_disk() -> None:
    def broken(draft: Draft) -> dict:
        raise FileNotFoundError(errno.ENOENT, "gone", "rows.jsonl")

    with pytest.raises(FileNotFoundError):
        entry("rows", "k", broken, lambda text: pytest.fail(text))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_read_only_cache_makes_way_for_a_temporary_folder(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o500)
    _falls_back(folder)


def test_a_cache_that_is_a_file_makes_way_for_a_temporary_folder(folder: Path) -> None:
    folder.write_text("")
    _falls_back(folder)


def test_a_full_cache_disk_makes_way_for_a_temporary_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = cache.Growing.write

    def full(self: cache.Growing, data: bytes) -> None:
        if str(folder) in str(self.raw.name):
            with cache._writing():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        once(self, data)

    monkeypatch.setattr(cache.Growing, "write", full)
    _falls_back(folder)
    assert list((folder / "rows").iterdir()) == []


def _falls_back(folder: Path) -> None:
    said: list[str] = []
    made = entry("rows", "k", build(), said.append)
    assert len(said) == 1
    assert str(folder) in said[0]
    assert "LORALOOM_CACHE" in said[0]
    assert not made.folder.is_relative_to(folder)
    assert (made.folder / "a.bin").read_bytes() == b"rows"
    where = made.folder
    del made
    assert not where.exists()


def test_no_room_anywhere_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: cache.Growing, data: bytes) -> None:
        with cache._writing():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.Growing, "write", full)
    with pytest.raises(SaveError, match="No space left on device"):
        entry("rows", "k", build())


SLOW = """
import sys, time
from pathlib import Path
from loraloom.data.table.cache import entry
def build(draft):
    Path(sys.argv[1]).open("a").write("x")
    file = draft.file("a.bin")
    for _ in range(20):
        file.write(b"rows")
        time.sleep(0.05)
    return {}
made = entry("rows", "k", build, print)
assert (made.folder / "a.bin").read_bytes() == b"rows" * 20
"""


def _start(tmp_path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, str(tmp_path / "calls")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_that_want_the_same_entry_both_end_well(folder: Path, tmp_path: Path) -> None:
    both = [_start(tmp_path) for _ in range(2)]
    out = [one.communicate(timeout=120) for one in both]
    assert [one.returncode for one in both] == [0, 0], out
    assert (tmp_path / "calls").read_text() == "x"
    assert sum("another process prepares the same rows" in text for text, _ in out) == 1
    assert [path.name for path in (folder / "rows").iterdir()] == ["k"]


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)


def test_where_there_are_no_locks_two_at_once_end_well_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)

    def inner(draft: Draft) -> dict:
        entry("rows", "k", build())  # the other process, meanwhile
        return build()(draft)

    made = entry("rows", "k", inner)
    assert (made.folder / "a.bin").read_bytes() == b"rows"
    assert [path.name for path in (folder / "rows").iterdir()] == ["k"]


def test_what_a_killed_process_left_is_swept_up(folder: Path, tmp_path: Path) -> None:
    one = _start(tmp_path)
    while not list(folder.glob("rows/.k.*.part/a.bin")):
        assert one.poll() is None
        time.sleep(0.01)
    one.send_signal(signal.SIGKILL)
    one.communicate()
    assert find("rows", "k") is None
    entry("rows", "k", build())
    assert [path.name for path in (folder / "rows").iterdir()] == ["k"]


def test_the_cache_lies_where_it_is_told_or_where_the_system_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALOOM_CACHE", "~/rows")
    assert cache_folder() == Path.home() / "rows"
    monkeypatch.delenv("LORALOOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/some")
    assert cache_folder() == Path("/var/some/loraloom")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "loraloom"


def test_a_key_follows_from_the_values_and_not_from_their_order() -> None:
    assert key_of({"a": 1, "b": [2, None]}) == key_of({"b": [2, None], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": "1"})
    assert key_of({"a": "\ud800"})
