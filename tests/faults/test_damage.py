"""Promises of damaged files: the same comes out, or it is said which file is wrong. Never a traceback, never silence.

A corpus drawn by seeds: bits flipped, files cut, values of other types, gone, swapped, too deep, too large.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloom import LoraConfig
from loraloom.config import runfile
from loraloom.config.train import TrainConfig
from loraloom.errors import LoraloomError
from loraloom.messages import ignore
from loraloom.report.sentences import sentence
from loraloom.training.checkpointing import folders
from loraloom.training.output import RUN_FILE
from loraloom.training.run import prepare
from loraloom.training.setup import TrainJob
from loraloom.training.trainer import Trainer

from .mutations import mutated

WEIGHTS = "adapter_model.safetensors"
COUNTS = [pytest.param(60, id="some"), pytest.param(600, id="many", marks=[pytest.mark.slow, pytest.mark.sweep])]


@pytest.fixture(scope="module")
def job(encoder_folder: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """A run that has come to its end, with two checkpoints."""
    options = TrainConfig(
        model=encoder_folder, data=few, task="seq-cls", max_steps=4, save_steps=2, eval_split=8, batch_size=4,
        output=tmp_path_factory.mktemp("damage") / "run", lora=LoraConfig(r=2, lora_dropout=0.1),
    )  # fmt: skip
    found = prepare(options)
    Trainer(found).fit()
    return found


def begun(job: TrainJob, said: list[str]) -> tuple[Trainer, dict[str, Any] | None]:
    """Where a resumed run begins."""
    trainer = Trainer(job, ignore, lambda message: said.append(sentence(message)))
    return trainer, trainer.begin(True)


def stands(trainer: Trainer, finished: dict[str, Any] | None) -> Any:
    if finished:
        return finished
    tensors = trainer.model.base_model.tensors_of("default")
    weights = hashlib.sha256(b"".join(tensors[key].detach().numpy().tobytes() for key in sorted(tensors)))
    return trainer.slot.step, str(trainer.slot.curve), weights.hexdigest()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "stopped"])
def test_a_damaged_run_is_gone_on_with_the_same_or_the_file_is_named(
    job: TrainJob, count: int, finished: bool, tmp_path: Path
) -> None:
    folder, draw = Path(job.options.output), random.Random(f"run {finished} {count}")
    whole = shutil.copytree(folder, tmp_path / "whole")
    names = ["run.json", WEIGHTS, "adapter_config.json"]
    if not finished:
        for name in names:
            (whole / name).unlink()
        names = [f"checkpoint-4/{path.name}" for path in sorted((whole / "checkpoint-4").iterdir())]

    def reset() -> None:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)

    reset()
    wanted = stands(*begun(job, []))
    found = []
    for number in range(count):
        reset()
        name = draw.choice(names)
        before = (folder / name).read_bytes()
        after = mutated(name, before, draw)
        (folder / name).write_bytes(after)
        said: list[str] = []
        try:
            same = stands(*begun(job, said)) == wanted
        except LoraloomError as error:
            said.append(str(error))
            same = False
        except Exception as error:
            found.append(f"{number}, {name}: {type(error).__name__}: {error}")
            continue
        place = str(folder / name) if finished else str(folder / "checkpoint-4")
        if not same and not any(place in text for text in said) and before != after:
            found.append(f"{number}, {name}: another one, and nothing said of it: {said}")
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    assert found == [], "\n".join(text[:300] for text in found)


@pytest.mark.parametrize("count", COUNTS)
def test_a_checkpoint_whose_hashes_are_right_and_contents_wrong_is_named(
    job: TrainJob, count: int, tmp_path: Path
) -> None:
    """Somebody made the manifest fit. What the values mean nobody can know; that they have another shape is said."""
    folder, draw = Path(job.options.output), random.Random(f"manifest {count}")
    whole, path = shutil.copytree(folder, tmp_path / "whole"), folder / "checkpoint-4"
    for name in ("run.json", WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    found = []
    for number in range(count):
        shutil.rmtree(path)
        shutil.copytree(whole / "checkpoint-4", path)
        name = draw.choice(["state.json", "state.json", "state.safetensors", WEIGHTS])
        (path / name).write_bytes(after := mutated(name, (path / name).read_bytes(), draw))
        manifest = json.loads((path / "manifest.json").read_bytes())
        manifest[name] = {"bytes": len(after), "sha256": hashlib.sha256(after).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(manifest))
        said: list[str] = []
        try:
            begun(job, said)
        except LoraloomError as error:
            if str(path) not in str(error):
                found.append(f"{number}, {name}: the error names no file: {error}")
        except Exception as error:
            found.append(f"{number}, {name}: {type(error).__name__}: {error}")
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    assert found == [], "\n".join(text[:300] for text in found)


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_run_file_is_read_or_named(job: TrainJob, count: int, tmp_path: Path) -> None:
    whole = (Path(job.options.output) / RUN_FILE).read_bytes()
    draw, found, path = random.Random(f"run file {count}"), [], tmp_path / RUN_FILE
    values = [
        "null",
        "[",
        "{a: b}",
        "'",
        "9" * 5000,
        "[" * 2000,
        "1e999",
        "*x",
        "&a [*a, *a]",
        "!!python/object:x.y {}",
    ]
    for number in range(count):
        lines = whole.decode().splitlines(keepends=True)
        at = draw.randrange(len(lines))
        if draw.random() < 0.5 and ":" in lines[at]:
            lines[at] = f"{lines[at].partition(':')[0]}: {draw.choice(values)}\n"
        after = mutated("yaml", "".join(lines).encode(), draw) if draw.random() < 0.5 else "".join(lines).encode()
        path.write_bytes(after)
        try:
            runfile.read(path)
        except LoraloomError as error:
            if str(path) not in str(error):
                found.append(f"{number}: the error names no file: {error} ({lines[at]!r})")
        except Exception as error:
            found.append(f"{number}: {type(error).__name__}: {error} ({lines[at]!r})")
    assert found == [], "\n".join(text[:300] for text in found)


@pytest.mark.parametrize("count", COUNTS)
def test_a_damaged_state_of_a_search_is_read_or_named(
    call_search: Callable[[], tuple[Path, Callable[[], Any]]], count: int
) -> None:
    path, read = call_search()
    whole, draw, found = path.read_bytes(), random.Random(f"search {count}"), []
    for number in range(count):
        path.write_bytes(mutated(path.name, whole, draw))
        try:
            read()
        except LoraloomError as error:
            if str(path) not in str(error) and str(path.parent) not in str(error):
                found.append(f"{number}: the error names no file: {error}")
        except Exception as error:
            found.append(f"{number}: {type(error).__name__}: {error}")
    assert found == [], "\n".join(text[:300] for text in found)


@pytest.fixture
def call_search(job: TrainJob, tmp_path: Path) -> Callable[[], tuple[Path, Callable[[], Any]]]:
    """Where a search stands, and what reads it."""
    from loraloom.engine.slot import Curve
    from loraloom.tuning.asha import SuccessiveHalving
    from loraloom.tuning.state import STATE_NAME, State, load_state, save_state
    from loraloom.tuning.trial import Trial

    def make() -> tuple[Path, Callable[[], Any]]:
        evaluations = [{"step": 2.0, "loss": 0.5, "accuracy": 0.75}]
        trials = [
            Trial(n, {"lora.r": 2 + n}, job.options, 4, curve=Curve([0.5, 0.4], [1e-3, 1e-3], evaluations))
            for n in range(3)
        ]
        state = State("mark", 2, SuccessiveHalving(2, 3, 1), trials=trials)
        save_state(tmp_path, state, {})
        return tmp_path / STATE_NAME, lambda: load_state(tmp_path, "mark", lambda values, seed: job.options)

    return make


def test_a_checkpoint_that_is_mutated_is_still_found_whole_here(job: TrainJob) -> None:
    """The tests above put back what they damage."""
    assert [path.name for path in folders.listed(job.options.output)] == ["checkpoint-4", "checkpoint-2"]
