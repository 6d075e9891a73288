"""Promises of the lock of an output folder: one run at a time, gone with its process, and never in the way of one."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loraloom.errors import ConfigError
from loraloom.files import lock
from loraloom.files.lock import LOCK_NAME, check, held

HOLD = """
import sys, time
from loraloom.files.lock import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has ``tmp_path / "run"``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_has_the_folder_since_when_and_what_to_do(
    other: subprocess.Popen[str], tmp_path: Path
) -> None:
    for taken in (check, lambda folder: held(folder).__enter__()):
        with pytest.raises(ConfigError) as error:
            taken(tmp_path / "run")
        assert re.fullmatch(
            rf"output: another run is under way in {tmp_path / 'run'} \(process {other.pid}, since "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\); wait for its end, or give another folder with --output",
            str(error.value),
        )
    with held(tmp_path / "elsewhere"):
        pass


def test_the_lock_goes_with_a_process_that_is_killed(other: subprocess.Popen[str], tmp_path: Path) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait(60)
    assert (tmp_path / "run" / LOCK_NAME).exists()
    check(tmp_path / "run")
    with held(tmp_path / "run"), pytest.raises(ConfigError, match=rf"process {os.getpid()},"):
        check(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"]  # which was there before, if empty
    assert os.listdir(tmp_path / "run") == []


def test_afterwards_nothing_of_it_is_left_but_what_was_written(tmp_path: Path) -> None:
    with held(tmp_path / "a" / "b"):
        assert os.listdir(tmp_path / "a" / "b") == [LOCK_NAME]
    assert os.listdir(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "adapter").write_text("")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "a" / "b") == ["adapter"]
    check(tmp_path / "a" / "b")
    check(tmp_path / "not there")
    assert os.listdir(tmp_path) == ["a"]


def test_two_threads_of_one_process_are_two_runs(tmp_path: Path) -> None:
    inside, leave = threading.Event(), threading.Event()

    def run() -> None:
        with held(tmp_path):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(60)
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"), held(tmp_path):
        pass
    leave.set()
    thread.join(60)
    with held(tmp_path):
        pass


def test_a_fork_that_outlives_the_run_does_not_keep_the_folder(tmp_path: Path) -> None:
    read, write = os.pipe()
    code = (
        "import os, sys\nfrom loraloom.files.lock import held\n"
        "with held(sys.argv[1]):\n"
        "    if os.fork() == 0:\n        os.read(int(sys.argv[2]), 1)\n        os._exit(0)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path, str(read)], pass_fds=[read], check=False)
    try:
        assert done.returncode == -signal.SIGKILL
        with held(tmp_path):
            pass
    finally:
        os.close(write)  # the fork ends
        os.close(read)


def test_of_many_that_come_at_once_never_two_are_inside(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from loraloom.errors import ConfigError
from loraloom.files.lock import held
folder, inside, refused = Path(sys.argv[1]), 0, 0
for _ in range(200):
    try:
        with held(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            (folder / "inside").unlink()
            inside += 1
    except ConfigError:
        refused += 1
assert inside
"""
    several = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stderr=subprocess.PIPE) for _ in range(4)]
    said = [one.communicate(timeout=120)[1] for one in several]
    assert [one.returncode for one in several] == [0] * 4, said


def test_one_that_only_looks_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("{}")
    handle = os.open(tmp_path / LOCK_NAME, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    looking = threading.Timer(lock.BETWEEN * 1.5, os.close, [handle])
    looking.start()
    with held(tmp_path):
        pass
    looking.join()


def test_a_lock_that_does_not_say_whose_it_is_is_one_all_the_same(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"pid": 1}'):
        (tmp_path / LOCK_NAME).write_text(text)
        handle = os.open(tmp_path / LOCK_NAME, os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="of a process that has not yet said which"):
            check(tmp_path)
        os.close(handle)
        check(tmp_path)


def test_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "loom-7")
    with held(tmp_path):
        monkeypatch.undo()
        with pytest.raises(ConfigError, match=rf"\(process {os.getpid()} on loom-7, since "):
            check(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_stops_no_run(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = tmp_path / "run"
    with held(folder):
        check(folder)
        with held(folder):
            (folder / "adapter").write_text("")
    assert os.listdir(folder) == ["adapter"]


def test_a_folder_that_cannot_be_written_is_not_the_locks_business(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with held(tmp_path / "file"), held(tmp_path / "file" / "below"):
        check(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_costs_the_words_and_not_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    started = time.monotonic()
    with held(tmp_path), pytest.raises(ConfigError, match="another run is under way"):
        check(tmp_path)
    assert time.monotonic() - started < 10
    assert os.listdir(tmp_path) == []
