"""Files replaced together: whatever stops the work, and wherever, a folder holds the old files or the new ones."""

from __future__ import annotations

import builtins
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loraloom.errors import AdapterError, SaveError
from loraloom.files import atomic
from loraloom.files.atomic import JOURNAL, recover, write_files

OLD = {"adapter_config.json": b"old config", "adapter_model.safetensors": b"old weights", "b/adapter_config.json": b"1"}
NEW = {"adapter_config.json": b"new config", "adapter_model.safetensors": b"new weights", "b/adapter_config.json": b"2"}


class Killed(BaseException):
    """The process ends here: nothing that catches exceptions may run afterwards."""


class Steps:
    """Counts what ``atomic`` asks of the system, and stops at one step: before it is done, or right after it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken: list[str] = []
        self.stop_at: int | None = None
        self.after = False
        self.error: Callable[[], BaseException] = Killed
        self.armed = False
        for owner, name in ((os, "replace"), (os, "open"), (Path, "unlink"), (Path, "mkdir")):
            monkeypatch.setattr(owner, name, self._step(name, getattr(owner, name)))
        monkeypatch.setattr(os, "fsync", self._step("fsync", lambda handle: None))  # the power stays on here
        monkeypatch.setattr(atomic, "open", self._step("open file", builtins.open), raising=False)

    def _step(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if not self.armed:
                return real(*args, **kwargs)
            number = len(self.taken)
            self.taken.append(name)
            if number == self.stop_at and not self.after:
                raise self.error()
            result = real(*args, **kwargs)
            if number == self.stop_at:
                raise self.error()
            return result

        return call

    def run(self, work: Callable[[], None], stop_at: int | None = None, after: bool = False) -> list[str]:
        self.taken, self.stop_at, self.after, self.armed = [], stop_at, after, True
        try:
            work()
        finally:
            self.armed = False
        return self.taken


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def visible(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if not Path(name).name.startswith(".")}


def fresh(folder: Path) -> Path:
    write_files(folder, OLD)
    assert contents(folder) == OLD
    return folder


def all_steps(folder: Path, steps: Steps) -> list[str]:
    """What replacing the old files asks of the system."""
    fresh(folder)
    return list(steps.run(lambda: write_files(folder, NEW)))


def half_then_stop(error: BaseException) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(b"new")
        raise error

    return write


def test_files_are_replaced_and_others_stay(tmp_path: Path) -> None:
    fresh(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"mine")
    write_files(tmp_path, NEW)
    assert contents(tmp_path) == {**NEW, "notes.txt": b"mine"}


def test_contents_may_be_written_by_a_function(tmp_path: Path) -> None:
    write_files(tmp_path / "deep" / "er", {"a": lambda path: path.write_bytes(b"1"), "b": b"2"})
    assert contents(tmp_path / "deep" / "er") == {"a": b"1", "b": b"2"}


def test_every_new_file_is_synced_before_the_journal_counts(tmp_path: Path, steps: Steps) -> None:
    taken = steps.run(lambda: write_files(tmp_path, NEW))
    counts = taken.index("replace")
    assert taken[:counts].count("fsync") >= len(NEW) + 1  # each file, and the journal itself
    assert taken[counts + 1 :].count("replace") == len(NEW)


@pytest.mark.parametrize("after", [False, True], ids=["before the step", "after the step"])
def test_killed_at_any_step_leaves_all_old_or_all_new(tmp_path: Path, steps: Steps, after: bool) -> None:
    number = len(all_steps(tmp_path / "count", steps))
    found = []
    for stop in range(number):
        folder = fresh(tmp_path / str(stop))
        with pytest.raises(Killed):
            steps.run(lambda: write_files(folder, NEW), stop, after)  # noqa: B023
        recover(folder)
        assert visible(folder) in (OLD, NEW), f"step {stop} of {number}"
        found.append(visible(folder) == NEW)
        recover(folder)  # once more changes nothing
        assert (visible(folder) == NEW) is found[-1]
        write_files(folder, NEW)
        assert contents(folder) == NEW, f"left behind by step {stop}"
    assert found == sorted(found), "once the new files count, they count for good"
    assert not found[0]
    assert found[-1]


def test_killed_again_while_recovering_still_leaves_all_new(tmp_path: Path, steps: Steps) -> None:
    def interrupted(name: str) -> Path:
        folder = fresh(tmp_path / name)
        taken = all_steps(tmp_path / f"{name} counted", steps)
        with pytest.raises(Killed):
            steps.run(lambda: write_files(folder, NEW), taken.index("replace"), after=True)
        return folder

    counted = interrupted("count")
    for stop in range(len(steps.run(lambda: recover(counted)))):
        folder = interrupted(str(stop))
        with pytest.raises(Killed):
            steps.run(lambda: recover(folder), stop, after=True)  # noqa: B023
        recover(folder)
        assert contents(folder) == NEW


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_an_error_of_the_system_at_any_step_leaves_all_old_or_all_new(tmp_path: Path, steps: Steps, code: int) -> None:
    steps.error = lambda: OSError(code, os.strerror(code))
    number = len(all_steps(tmp_path / "count", steps))
    raised = 0
    for stop in range(number):
        folder = fresh(tmp_path / str(stop))
        try:
            steps.run(lambda: write_files(folder, NEW), stop)  # noqa: B023
        except SaveError as error:
            raised += 1
            assert os.strerror(code) in str(error)
            assert "Traceback" not in str(error)
            if (folder / JOURNAL).exists():  # the new files count already
                recover(folder)
                assert contents(folder) == NEW
            else:
                assert contents(folder) == OLD, f"step {stop}"
        else:
            recover(folder)
            assert contents(folder) == NEW, f"step {stop}"
    assert raised > len(NEW)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Killed(), KeyboardInterrupt()])
def test_a_file_that_was_written_in_part_never_counts(tmp_path: Path, error: BaseException) -> None:
    fresh(tmp_path)
    wanted = SaveError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted):
        write_files(tmp_path, {**NEW, "adapter_model.safetensors": half_then_stop(error)})
    recover(tmp_path)
    assert visible(tmp_path) == OLD
    write_files(tmp_path, NEW)
    assert contents(tmp_path) == NEW


def test_a_full_disk_names_the_reason_and_keeps_what_was_there(tmp_path: Path) -> None:
    fresh(tmp_path)
    full = half_then_stop(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(SaveError, match=r"No space left on device.*unchanged"):
        write_files(tmp_path, {**NEW, "adapter_model.safetensors": full})
    assert contents(tmp_path) == OLD


FULL = """
import resource, sys
from pathlib import Path

import torch

from loraloom import LoraConfig, get_peft_model
from loraloom.errors import SaveError
from loraloom.files.atomic import write_files

folder = Path(sys.argv[1])
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), LoraConfig(target_modules=["0"], r=64))
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
for work in (
    lambda: write_files(folder, {"adapter_config.json": b"new", "adapter_model.safetensors": b"x" * 10000}),
    lambda: model.save_pretrained(folder),
):
    try:
        work()
    except SaveError as error:
        print(error)
    else:
        sys.exit("it was written")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file")
def test_a_file_system_that_takes_no_more_really_leaves_the_old_bytes(tmp_path: Path) -> None:
    fresh(tmp_path)
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("what was there is unchanged") == 2
    assert "File too large" in done.stdout
    assert contents(tmp_path) == OLD


def test_a_folder_that_is_a_file_is_a_save_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"mine")
    with pytest.raises(SaveError, match="taken: cannot be written"):
        write_files(tmp_path / "taken", NEW)
    assert (tmp_path / "taken").read_bytes() == b"mine"


def test_a_name_that_is_a_folder_already_is_a_save_error_and_nothing_counts(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").mkdir()
    (tmp_path / "adapter_config.json").write_bytes(b"old")
    with pytest.raises(SaveError, match=r"adapter_model\.safetensors: cannot be written"):
        write_files(tmp_path, NEW)
    assert contents(tmp_path) == {"adapter_config.json": b"old"}


def test_nothing_happens_where_no_replacement_was(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"old")
    recover(tmp_path)
    recover(tmp_path / "absent")
    assert contents(tmp_path) == {"adapter_config.json": b"old"}


@pytest.mark.parametrize(
    "journal",
    [
        b"not json",
        b"[]",
        b'{".a.01234567": 3}',
        b'{"stolen": "../outside"}',
        b'{"../outside": "stolen"}',
        b'{".outside.01234567": "b/../../outside"}',
        b'{"a": "b"}',
    ],
)
def test_a_journal_that_nobody_here_wrote_moves_no_file(tmp_path: Path, journal: bytes) -> None:
    """An adapter folder may come from anywhere, and reading it must not move files about."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    for name in ("stolen", "a", ".outside.01234567"):
        (folder / name).write_bytes(b"bait")
    (folder / JOURNAL).write_bytes(journal)
    before = contents(tmp_path)
    with pytest.raises(AdapterError, match=r"loraloom-commit\.json"):
        recover(folder)
    assert contents(tmp_path) == before


def test_an_absolute_path_in_a_journal_moves_no_file(tmp_path: Path) -> None:
    folder, outside = tmp_path / "adapter", tmp_path / "outside"
    folder.mkdir()
    outside.write_bytes(b"secret")
    (tmp_path / ".outside.01234567").write_bytes(b"bait")
    (folder / JOURNAL).write_text(json.dumps({str(tmp_path / ".outside.01234567"): str(outside)}))
    with pytest.raises(AdapterError):
        recover(folder)
    assert outside.read_bytes() == b"secret"


def test_a_replacement_that_cannot_be_finished_says_so(tmp_path: Path, steps: Steps) -> None:
    taken = all_steps(tmp_path / "count", steps)
    fresh(tmp_path / "a")
    with pytest.raises(Killed):
        steps.run(lambda: write_files(tmp_path / "a", NEW), taken.index("replace"), after=True)
    steps.error = lambda: PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(SaveError, match=r"a: .*cannot be finished \(Permission denied\)"):
        steps.run(lambda: recover(tmp_path / "a"), 0)
    recover(tmp_path / "a")
    assert contents(tmp_path / "a") == NEW
