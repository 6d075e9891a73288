"""Promises of the cache's room: what was long unused or is too much goes, oldest first; what is in use never does."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloom.data.table import cache, eviction
from loraloom.data.table.cache import Draft, entry, find
from loraloom.errors import ConfigError

DAY = 86400
SIZE = 10_000


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LORALOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(eviction.VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setenv(eviction.VARIABLE, text)


def build(draft: Draft) -> dict[str, Any]:
    draft.file("a.bin").write(b"x" * SIZE)
    return {}


def made(key: str, days: float = 0, kind: str = "rows") -> Path:
    """An entry that nobody uses, and that was used so many days ago."""
    where = entry(kind, key, build).folder
    used(where, days)
    return where


def used(where: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(where / "manifest.json", (then, then))


def there(folder: Path) -> set[str]:
    return {f"{path.parent.name}/{path.name}" for path in folder.glob("*/*")}


def test_what_nobody_used_for_thirty_days_goes_when_something_new_is_written(folder: Path) -> None:
    for where, days in [(made("old"), 31), (made("older", kind="surveys"), 400), (made("young"), 29)]:
        used(where, days)
    assert entry("rows", "young", build, lambda text: pytest.fail(text)).fresh is False  # nothing new: nothing goes
    assert there(folder) == {"rows/old", "surveys/older", "rows/young"}
    said: list[str] = []
    entry("rows", "new", build, said.append)
    assert there(folder) == {"rows/young", "rows/new"}
    assert said == [
        f"deleted from the cache folder {folder}: 2 entries (19.9 KiB), unused for 30 days (see LORALOOM_CACHE_LIMIT)"
    ]


def test_what_is_too_much_goes_and_the_longest_unused_first(folder: Path, limit: Callable[[str], None]) -> None:
    for key, days in (("b", 2), ("a", 3), ("d", 0.1), ("c", 1)):
        made(key, days)
    limit("35 kB")  # three and their manifests
    said: list[str] = []
    entry("surveys", "new", build, said.append)
    assert there(folder) == {"rows/c", "rows/d", "surveys/new"}
    assert said == [
        f"deleted from the cache folder {folder}: 2 entries (19.9 KiB), the longest unused, to stay below 34.2 KiB "
        "(see LORALOOM_CACHE_LIMIT)"
    ]


@pytest.mark.parametrize("ask", [lambda key: entry("rows", key, build), lambda key: find("rows", key)])
def test_to_be_asked_for_is_to_be_used(ask: Any, folder: Path, limit: Callable[[str], None]) -> None:
    made("a", 3)
    made("b", 2)
    assert ask("a").info == {}
    gc.collect()
    limit("25kB")
    entry("rows", "new", build)
    assert there(folder) == {"rows/a", "rows/new"}


def test_what_this_process_uses_stays_and_so_does_the_new_one(folder: Path, limit: Callable[[str], None]) -> None:
    limit("1")
    first = entry("rows", "first", build)
    used(first.folder, 400)
    second = find("rows", "first")
    third = entry("rows", "third", build)
    assert there(folder) == {"rows/first", "rows/third"}
    del first
    entry("rows", "fourth", build)
    assert "rows/first" in there(folder)  # the second still has it
    assert second is not None
    assert (second.folder / "a.bin").stat().st_size == SIZE
    del second, third
    entry("rows", "fifth", build)
    assert there(folder) == {"rows/fifth"}


USES = """
import sys
from loraloom.data.table.cache import entry
from loraloom.data.table.store import Examples, Table, Writer, pack
from loraloom.data.example import Example
from loraloom.data.rows import Row
def build(draft):
    writer = Writer(draft)
    writer.add(pack([Row({}, 1)], [[Example([7] * 9, 1)]], [0]))
    return writer.finish()
made = entry("rows", "used", build)
examples = Examples(Table(made))
del made
print("used", flush=True)
sys.stdin.readline()
print(examples[0].input_ids)
"""


def test_what_another_process_uses_stays_until_that_is_gone(folder: Path, limit: Callable[[str], None]) -> None:
    other = subprocess.Popen([sys.executable, "-c", USES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "used\n"
    used(folder / "rows" / "used", 400)
    limit("1")
    entry("rows", "new", build)
    assert there(folder) == {"rows/used", "rows/new"}
    assert other.communicate("\n", timeout=60)[0] == f"{[7] * 9}\n"
    entry("rows", "newer", build)
    assert there(folder) == {"rows/newer"}


def test_one_that_is_being_deleted_is_absent_and_made_again(folder: Path) -> None:
    import fcntl

    where = made("k")
    handle = os.open(where / "manifest.json", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert find("rows", "k", lambda text: pytest.fail(text)) is None
    again = entry("rows", "k", build, lambda text: pytest.fail(text))
    os.close(handle)
    assert again.fresh
    assert (again.folder / "a.bin").stat().st_size == SIZE
    assert there(folder) == {"rows/k"}


def test_many_that_make_and_delete_at_once_always_find_what_they_use(
    folder: Path, limit: Callable[[str], None]
) -> None:
    limit("25kB")
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(40):
                one = entry("rows", f"k{(seed * 7 + turn * 3) % 5}", build)
                assert (one.folder / "a.bin").read_bytes() == b"x" * SIZE
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert problems == []
    gc.collect()
    entry("rows", "last", build)
    assert "rows/last" in there(folder)
    assert len(there(folder)) <= 2


def test_with_zero_nothing_is_ever_deleted(folder: Path, limit: Callable[[str], None]) -> None:
    made("a", 4000)
    limit("0")
    entry("rows", "new", build, lambda text: pytest.fail(text))
    assert there(folder) == {"rows/a", "rows/new"}


def test_the_limit_is_a_size_in_bytes_or_units_and_anything_else_is_refused(limit: Callable[[str], None]) -> None:
    assert eviction.limit() == 20 * 2**30
    for text, size in (("", 20 * 2**30), ("1000", 1000), (" 1.5 GiB ", 3 * 2**29), ("2tb", 2 * 10**12), ("0", 0)):
        limit(text)
        assert eviction.limit() == size
    for text in ("much", "-1", "5 GX", "1e9"):
        limit(text)
        with pytest.raises(ConfigError) as error:
            entry("rows", "k", lambda draft: pytest.fail("it is said before anything is built"))
        assert str(error.value) == (
            "LORALOOM_CACHE_LIMIT: must be bytes or a size such as 20GiB or 500MB, or 0 to delete nothing, found "
            f"{text!r}"
        )


def test_what_is_not_of_the_cache_stays(folder: Path, limit: Callable[[str], None]) -> None:
    for name, text in (("mine/data/manifest.json", '{"key": "other"}'), ("mine/more/manifest.json", "{"), ("b/c", "")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        os.utime(folder / name, (0, 0))
    (folder / "mine" / "empty").mkdir()
    before = there(folder)
    limit("1")
    entry("rows", "new", build)
    assert there(folder) == before | {"rows/new"}


def test_drafts_of_processes_that_were_killed_go_after_a_day_and_others_stay(folder: Path) -> None:
    for name, hours in ((".dead.0123abcd.part", 25), (".alive.0123abcd.part", 23)):
        (folder / "rows" / name).mkdir(parents=True)
        (folder / "rows" / name / "a.bin").write_bytes(b"x")
        for path in (folder / "rows" / name / "a.bin", folder / "rows" / name):
            os.utime(path, (time.time() - hours * 3600,) * 2)
    entry("rows", "new", build)
    assert there(folder) == {"rows/.alive.0123abcd.part", "rows/new"}


@pytest.mark.parametrize("without", ["the module", "the file system"])
def test_where_there_are_no_locks_nothing_is_deleted_and_all_else_goes_on(
    without: str, folder: Path, limit: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made("a", 400)
    if without == "the module":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:

        def flock(*_: Any) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("fcntl.flock", flock)
    limit("1")
    entry("rows", "new", build, lambda text: pytest.fail(text))
    assert find("rows", "new") is not None
    assert there(folder) == {"rows/a", "rows/new"}


def test_the_time_of_use_is_no_part_of_what_is_checked(folder: Path) -> None:
    where = made("k", 5)
    before = {path.name: path.read_bytes() for path in where.iterdir()}
    assert find("rows", "k", lambda text: pytest.fail(text)) is not None
    assert time.time() - (where / "manifest.json").stat().st_mtime < 60
    assert {path.name: path.read_bytes() for path in where.iterdir()} == before
    assert cache.MANIFEST == eviction.MANIFEST
