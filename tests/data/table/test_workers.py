"""Promises of the workers: results in order, errors as they were raised, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraloom.data.table.workers import AHEAD, mapped
from loraloom.errors import DataError, FailureError, InputError

# What runs in the workers must be found there: a module on the path, as in the package itself.
MODULE = """
import os, time
from loraloom.errors import DataError

class OddError(DataError):
    def __init__(self, words, line):
        super().__init__(f"{words} {line}")

def power(exponent):
    print("noise on standard output")
    def work(number):
        if number == 1:
            time.sleep(0.3)  # the others overtake it
        return number ** exponent, os.getpid()
    return work

def picky(kind):
    def work(number):
        if number < 3:
            return number
        if kind == "data":
            raise DataError("a.jsonl, line 3: wrong")
        if kind == "odd":
            raise OddError("line", 3)
        if kind == "bug":
            raise KeyError("x")
        os.kill(os.getpid(), 9)
    return work

def slow():
    def work(number):
        time.sleep(3600)
    return work
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "loraloom_test_jobs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import loraloom_test_jobs

    yield loraloom_test_jobs
    sys.modules.pop("loraloom_test_jobs")


def children(of: int | None = None) -> list[int]:
    """The workers of a process, by default of this one."""
    parent = f"PPid:\t{of or os.getpid()}\n"
    found = [path for path in Path("/proc").glob("[0-9]*/status") if parent in _text(path)]
    return [int(path.parent.name) for path in found if _alive(int(path.parent.name))]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    return "loraloom.data.table.workers" in _text(Path(f"/proc/{pid}/cmdline"))


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(jobs, workers: int) -> None:
    found = list(mapped(jobs.power, (2,), range(20), workers))
    assert [value for value, _ in found] == [number**2 for number in range(20)]
    places = {pid for _, pid in found}
    assert (places == {os.getpid()}) == (workers == 1)
    assert children() == []


def test_no_more_items_are_read_than_are_under_way(jobs) -> None:
    read: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            read.append(number)
            yield number

    results = mapped(jobs.power, (2,), items(), 2)
    for done in range(1, 6):
        next(results)
        assert len(read) <= done + 2 * AHEAD
    results.close()
    assert children() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_ours_is_raised_as_it_was(jobs, workers: int) -> None:
    results = mapped(jobs.picky, ("data",), range(10), workers)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="^a.jsonl, line 3: wrong$"):
        next(results)
    assert children() == []


def test_an_error_that_cannot_travel_keeps_its_words_and_its_kind(jobs) -> None:
    with pytest.raises(InputError, match="^line 3$"):
        list(mapped(jobs.picky, ("odd",), range(10), 2))


def test_a_bug_in_a_worker_and_a_worker_that_dies_are_said(jobs) -> None:
    with pytest.raises(FailureError, match="KeyError: 'x'"):
        list(mapped(jobs.picky, ("bug",), range(10), 2))
    with pytest.raises(FailureError, match="died .exit status -9.*lower data_workers"):
        list(mapped(jobs.picky, ("death",), range(10), 2))
    assert children() == []


def test_an_error_where_items_are_read_ends_the_workers_too(jobs) -> None:
    def items() -> Iterator[int]:
        yield from range(7)
        raise DataError("a.jsonl, line 8: not JSON")

    with pytest.raises(DataError, match="line 8"):
        list(mapped(jobs.power, (2,), items(), 2))
    assert children() == []


def test_ctrl_c_ends_all_workers_at_once(jobs) -> None:
    started = time.monotonic()

    def press() -> None:
        while len(children()) < 2:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        list(mapped(jobs.slow, (), range(10), 2))
    assert time.monotonic() - started < 60
    assert children() == []


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import loraloom_test_jobs
from loraloom.data.table.workers import mapped
print("begins")
print([value for value, _ in mapped(loraloom_test_jobs.power, (3,), range(5), 2)])
"""


def test_a_script_without_a_guard_runs_once(jobs, tmp_path: Path) -> None:
    """Processes that were spawned in the usual way would run the user's script again."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "begins\n[0, 1, 8, 27, 64]\n", done.stderr


def test_workers_end_when_who_started_them_is_killed(jobs, tmp_path: Path) -> None:
    wait = "results = mapped(loraloom_test_jobs.power, (3,), range(50), 2)\nnext(results)\n"
    wait += 'print("ready", flush=True)\nimport time\ntime.sleep(3600)\n'
    (tmp_path / "script.py").write_text(SCRIPT[: SCRIPT.index("print")] + wait)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    one = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
        found = children(one.pid)
        assert len(found) == 2
    finally:
        one.kill()
        one.communicate()
    ends = time.monotonic() + 30
    while any(_alive(pid) for pid in found):
        assert time.monotonic() < ends
        time.sleep(0.05)
