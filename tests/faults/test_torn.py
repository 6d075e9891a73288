"""Promises against a power cut: what was not synced is lost, and a folder still holds the old files or the new ones.

A simulated disk keeps of a file what it held when it was last synced, and of a folder the names that it had then. After
each operation it is looked at as a power cut would leave it: with no name that was not synced, with all of them, or
with those of some folders.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loraloom.files.atomic import recover, write_files
from loraloom.training.checkpointing import folders

Tree = dict[str, bytes | None]
OLD = {"a": b"old a", "b/c": b"old c", "gone": b"old"}
NEW = {"a": b"new a", "b/c": b"new c", "gone": None, "d/e/f": b"new f"}
CHANGES = ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync")


class Disk:
    """What a power cut leaves of ``root``, at each moment since it was plugged in."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.files, self.folders = root, dict[int, bytes](), dict[int, dict[str, int]]()
        self.kept: list[int] = []  # open, so that no number of a file is given away twice
        self.cuts: list[Tree] = []
        for path in [root, *root.rglob("*")]:
            self._synced(os.open(path, os.O_RDONLY))
        self.kept.append(os.open(root.parent, os.O_RDONLY))
        for name in CHANGES:
            patch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            out = real(*args, **kwargs)
            if name == "fsync":
                self._synced(os.dup(args[0]))  # type: ignore[arg-type]
            self.look()
            return out

        return call

    def _synced(self, handle: int) -> None:
        self.kept.append(handle)
        number, path = os.fstat(handle).st_ino, f"/proc/self/fd/{handle}"
        if os.path.isdir(path):
            self.folders[number] = {entry.name: entry.inode() for entry in os.scandir(path)}
            # Numbers of what is in it belong to it, synced or not.
            self.kept += [os.open(entry.path, os.O_RDONLY) for entry in os.scandir(path)]
        else:
            self.files[number] = Path(path).read_bytes()

    def look(self) -> None:
        live = {path.stat().st_ino: path for path in [self.root, *self.root.rglob("*")]}
        draw = random.Random(len(self.cuts)).random
        for names in (lambda: False, lambda: True, lambda: draw() < 0.5):
            self.cuts.append(self._tree(self.root.stat().st_ino, live, names))

    def _tree(self, number: int, live: dict[int, Path], now: Callable[[], bool], above: str = "") -> Tree:
        out: Tree = {}
        entries = self.folders.get(number, {})
        if now():
            entries = {p.name: p.stat().st_ino for p in live[number].iterdir()} if number in live else {}
        for name, inside in entries.items():
            if inside in self.folders or (inside in live and live[inside].is_dir()):
                out |= {f"{above}{name}": None, **self._tree(inside, live, now, f"{above}{name}/")}
            else:
                out[f"{above}{name}"] = self.files.get(inside, b"")
        return out


def put(tree: Tree, folder: Path) -> Path:
    folder.mkdir()
    for name, contents in sorted(tree.items()):
        if contents is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(contents)
    return folder


def visible(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not Path(name).name.startswith(".")}


def test_files_that_are_replaced_are_all_old_or_all_new_and_new_once_that_was_said(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_files(root / "run", OLD)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(root, patch)
        write_files(root / "run", NEW)
        done = len(disk.cuts)
        disk.look()
    wanted = {name: contents for name, contents in NEW.items() if contents is not None}
    seen = []
    for number, tree in enumerate(disk.cuts):
        folder = put(tree, tmp_path / str(number)) / "run"
        recover(folder)
        seen.append(visible(folder) == wanted)
        assert seen[-1] or (visible(folder) == OLD and number < done), f"cut {number} of {done}"
    assert seen.count(False) > 10
    assert seen.count(True) > 10


@pytest.mark.parametrize("limit", [0, 1])
def test_a_checkpoint_is_whole_or_absent_and_there_once_that_was_said(tmp_path: Path, limit: int) -> None:
    root = tmp_path / "root"

    def write(step: int) -> None:
        files = {"adapter_model.safetensors": b"weights %d" % step, "adapter_config.json": b"{}"}
        folders.write(root / "run", step, lambda to: write_files(to, files), {"a": torch.zeros(3)}, {})

    root.mkdir()
    found: list[int | None] = []
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(root, patch)
        write(2)
        after = [len(disk.cuts)]
        write(4)
        after.append(len(disk.cuts))
        if limit:
            folders.rotate(root / "run", limit)
        disk.look()
    for number, tree in enumerate(disk.cuts):
        folder = put(tree, tmp_path / str(number)) / "run"
        newest = folders.newest(folder)
        found.append(newest and newest.step)
    assert set(found[: after[0]]) <= {None, 2}
    assert set(found[after[0] : after[1]]) == {2, 4}
    assert set(found[after[1] :]) == {4}
