"""Promises of whatever stops the work: a death, or an error of the system, at any operation on the files.

After a death the same command comes to the same result as if it had never been stopped. An error is one message that
names the file, nothing that was there is lost, and the same command works later. ``make test`` tries some operations of
each scene, drawn by a seed; ``pytest -m sweep tests/faults`` tries all.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from loraloom.files.atomic import recover
from loraloom.training.output import changed

from .conftest import Case, Ended

WEIGHTS = "adapter_model.safetensors"
ERRORS = ("ENOSPC", "EIO", "EACCES")
SCENES = ("afresh", "overwritten", "search", "cache")
#: Operations of each scene that are tried in any run of the tests, and parts of a sweep.
DRAWN, PIECES = 1, 6


@dataclass
class Scene:
    """A command, what the folder holds before it, and what it comes to."""

    case: Case
    argv: list[object]
    folder: Path
    result: Callable[[Path, str], Any]
    before: Path | None = None
    wanted: Any = None
    taken: dict[str, list[str]] = field(default_factory=dict)

    def run(self, at: int = 0, how: str = "die", afresh: bool = True) -> Ended:
        if afresh:
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.before:
                shutil.copytree(self.before, self.folder)
        return self.case(self.argv, [self.folder], at, how)

    def known(self) -> Scene:
        ended = self.run()
        assert ended.code == 0, ended.said
        self.taken = {"death": ended.changes, "error": ended.looks}
        self.wanted = self.result(self.folder, ended.said)
        return self

    def problem(self, at: int, how: str) -> str:
        """What is wrong after the operation ``at`` did not succeed, or nothing."""
        ended = self.run(at, how)
        if how == "die" and ended.code != 137:
            return f"it did not die: {ended.said}"
        if how != "die":
            last = ended.said.strip().rpartition("\n")[2]
            if "Traceback" in ended.said or "unexpected" in ended.said or ended.code not in (0, 1, 2):
                return f"code {ended.code}: {ended.said}"
            if ended.code and not (last.startswith("error: ") and str(self.folder) in last):
                return f"code {ended.code}, and no message that names the file: {last}"
        if self.before and (lost := self._lost()):
            return lost
        later = self.run(afresh=False)
        found = later.code == 0 and self.result(self.folder, later.said)
        return "" if found == self.wanted else f"later, code {later.code}: {later.said}\n{_differs(found, self.wanted)}"

    def _lost(self) -> str:
        recover(self.folder)
        record = json.loads((self.folder / "run.json").read_bytes())
        return changed(self.folder, record) and f"{changed(self.folder, record)} is not of the record"


def _differs(found: Any, wanted: Any) -> str:
    if not isinstance(found, dict):
        return ""
    keys = [key for key in wanted.keys() | found.keys() if found.get(key) != wanted.get(key)]
    return "; ".join(f"{key}: {str(found.get(key))[:300]} for {str(wanted.get(key))[:300]}" for key in keys)


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _trained(folder: Path, said: str) -> dict[str, Any]:
    record = json.loads((folder / "run.json").read_bytes())
    timeless = {key: record[key] for key in ("state", "steps", "result", "curve", "files")}
    return {"weights": (folder / WEIGHTS).read_bytes(), "names": _names(folder), **timeless}


def _searched(folder: Path, said: str) -> dict[str, Any]:
    record = json.loads((folder / "result.json").read_bytes())
    trials = [{key: value for key, value in trial.items() if key != "seconds"} for trial in record["trials"]]
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob(WEIGHTS)}
    return {"trials": trials, "weights": weights, "names": _names(folder)}


def _cached(folder: Path, said: str) -> dict[str, Any]:
    return {"said": said.splitlines()[-1], "names": _names(folder)}


@pytest.fixture(scope="module")
def scenes(
    case: Case, encoder_folder: Path, few: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Scene]:
    made: dict[str, Scene] = {}
    top = tmp_path_factory.mktemp("scenes")
    common: list[object] = ["--model", encoder_folder, "--data", few, "--task", "seq-cls", "--batch-size", 4]
    common += ["--eval-split", 8, "--set", "train.report_to=[]"]
    train = ["train", *common, "--max-steps", 4, "--save-steps", 2, "--save-total-limit", 1]

    def make(name: str) -> Scene:
        folder = top / name
        if name == "cache":
            return Scene(case, ["cache", folder], folder, _cached)
        if name == "search":
            argv = ["tune", *common, "--max-steps", 6, "--slots", 2, "--trials", 2, "--output", folder]
            argv += ["--set", "train.learning_rate=0.03", "--set", "lora.target_modules=all-linear"]
            argv += ["--set", "tune.seeds=0", "--set", 'tune.space={"lora.r": [2, 4]}']
            return Scene(case, argv, folder, _searched)
        argv = [*train, "--output", folder, "--resume"]
        if name == "afresh":
            return Scene(case, argv, folder, _trained)
        before = top / "before"
        assert case([*train, "--seed", 5, "--output", before], [], 0).code == 0
        return Scene(case, [*argv, "--overwrite"], folder, _trained, before)

    def get(name: str) -> Scene:
        if name not in made:
            made[name] = make(name).known()
        return made[name]

    return get


def _problems(scene: Scene, kind: str, numbers: list[int]) -> list[str]:
    found, taken = [], scene.taken[kind]
    for at in numbers:
        how = "die" if kind == "death" else ERRORS[at % len(ERRORS)]
        if problem := scene.problem(at, how):
            found.append(f"{how} at {at} of {len(taken)} ({taken[at - 1]}): {problem}")
    return found


@pytest.mark.parametrize("kind", ["death", "error"])
@pytest.mark.parametrize("name", SCENES)
def test_after_a_failure_at_some_operation_nothing_is_lost_and_the_same_comes_out(
    scenes: Callable[[str], Scene], name: str, kind: str
) -> None:
    scene = scenes(name)
    numbers = random.Random(f"{name} {kind}").sample(range(1, len(scene.taken[kind]) + 1), DRAWN)
    assert _problems(scene, kind, sorted(numbers)) == []


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("piece", range(PIECES))
@pytest.mark.parametrize("kind", ["death", "error"])
@pytest.mark.parametrize("name", SCENES)
def test_after_a_failure_at_any_operation_nothing_is_lost_and_the_same_comes_out(
    scenes: Callable[[str], Scene], name: str, kind: str, piece: int
) -> None:
    scene = scenes(name)
    numbers = [at for at in range(1, len(scene.taken[kind]) + 1) if at % PIECES == piece]
    found = _problems(scene, kind, numbers)
    assert found == [], f"{len(found)} of {len(numbers)}:\n" + "\n".join(found)
