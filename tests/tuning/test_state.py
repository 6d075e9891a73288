"""Promises of a search on disk: it comes back as it was, nothing is left lying, and damage is one clear error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from loraloom.config.runfile import with_values
from loraloom.config.train import TrainConfig
from loraloom.engine.slot import Curve
from loraloom.engine.slot_state import SlotState
from loraloom.errors import ConfigError, SaveError
from loraloom.tuning import state as module
from loraloom.tuning.asha import SuccessiveHalving
from loraloom.tuning.bar import Bar
from loraloom.tuning.race import Race
from loraloom.tuning.rungs import Standing
from loraloom.tuning.sampler import JOURNAL_NAME
from loraloom.tuning.state import (
    STATE_NAME,
    TRIALS,
    UNDER_WAY,
    State,
    clear,
    date_of,
    load_slot,
    load_state,
    save_state,
)
from loraloom.tuning.trial import Trial

BASE = TrainConfig(model="m", data="d.csv", task="seq-cls", output="o", max_steps=30)


def build(values: Mapping[str, Any], seed: int) -> TrainConfig:
    return with_values(BASE, {**values, "train.seed": seed})


def trial(number: int, state: str = "running", seed: int = 0, **more: Any) -> Trial:
    values = {"lora.r": 2 + number, "train.learning_rate": 1e-3 / 3}
    return Trial(number, values, build(values, seed), 30, 10, state, **more)


@pytest.fixture
def state() -> State:
    odd = Curve(
        [1 / 3, math.nan, math.inf], [1e-3, 1e-4 / 3, 0.0], [{"step": 10, "loss": -math.inf, "accuracy": math.nan}]
    )
    halving = SuccessiveHalving(2, 3, least=1)
    halving.decide({0: Standing(True, [1 / 3], [0.1 + 0.2]), 1: Standing(False, [1.0], [math.nan])})
    halving.resume([0, 1])
    measured = {4: {"loss": [1 / 3, math.nan]}, 10: {"loss": [0.1, 0.2], "accuracy": [0.5, 1 / 3]}}
    trials = [
        trial(0, curve=odd, seconds=1 / 7, parameters=12, bytes=99, goal=20, measure=True, rows=512, rungs=measured),
        trial(1, "waiting"),
        trial(2, "failed", reason="step 3: the loss is nan"),
        trial(3, "finished", used={"a.b": (8, 3, 0.1 + 0.2), "c": (8, 1, math.inf)}, parts={"loss": [1 / 3, math.nan]}),
        trial(4, seed=5, repeats=3),
    ]
    bar = Bar(60, 1 / 3, False, {"always 'a'": {"accuracy": [1 / 3, math.nan]}})
    return State("f" * 64, 4, halving, (4, None), trials, seconds=12.5, bar=bar)


def numbers(seed: int) -> SlotState:
    source = torch.Generator().manual_seed(seed)
    tensors = {
        "adapter/a": torch.randn(3, 2, generator=source),
        "optimizer/step/a": torch.tensor(3.0),
        "half": torch.randn(4, generator=source).bfloat16(),
        "turned": torch.randn(2, 5, generator=source).t(),
    }
    tensors["view"] = tensors["half"][1:]
    return SlotState(tensors, {"step": seed, "curve": {"loss": [1 / 3, math.nan, -math.inf]}})


def under_way(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / UNDER_WAY).glob("*"))


def test_a_search_comes_back_as_it_was_also_what_is_not_finite(tmp_path: Path, state: State) -> None:
    save_state(tmp_path, state, {0: numbers(0), 1: numbers(1)})
    found = load_state(tmp_path, state.fingerprint, build)
    assert found is not None
    assert repr(found) == repr(state)  # in which NaN is NaN
    for number in (0, 1):
        there = load_slot(tmp_path, found, number)
        assert there is not None
        assert repr(there.values) == repr(numbers(number).values)
        assert there.tensors.keys() == numbers(number).tensors.keys()
        for key, tensor in numbers(number).tensors.items():
            assert there.tensors[key].dtype == tensor.dtype
            assert torch.equal(there.tensors[key], tensor)


def test_the_rule_of_the_search_comes_back(tmp_path: Path, state: State) -> None:
    race = Race(2, 2, 1, shares=[1 / 9, 1 / 3], budget=0.25)
    race.decide({n: Standing(True, [n / 3] * 3, [-n / 3] * 3, 9, n, n / 7) for n in range(5)}, 1.0)
    for rule in (state.halving, race):
        save_state(tmp_path, dataclasses.replace(state, halving=rule), {})
        found = load_state(tmp_path, state.fingerprint, build)
        assert found is not None
        assert found.halving == rule


def test_the_day_that_the_rows_were_written_with_is_kept(tmp_path: Path, state: State) -> None:
    assert date_of(tmp_path) is None
    for date in (None, "2024-07-26"):
        save_state(tmp_path, dataclasses.replace(state, date=date), {})
        assert date_of(tmp_path) == date


def test_the_file_is_json_for_every_reader(tmp_path: Path, state: State) -> None:
    save_state(tmp_path, state, {})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads((tmp_path / STATE_NAME).read_text(), parse_constant=refuse)


def test_a_trial_that_has_not_begun_has_no_numbers(tmp_path: Path, state: State) -> None:
    save_state(tmp_path, state, {0: numbers(0)})
    assert load_slot(tmp_path, state, 4) is None


def test_no_search_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path, "f" * 64, build) is None
    assert list(tmp_path.iterdir()) == []


def test_files_of_earlier_steps_and_of_trials_that_left_go(tmp_path: Path, state: State) -> None:
    save_state(tmp_path, state, {0: numbers(0), 1: numbers(1), 3: numbers(3)})
    assert under_way(tmp_path) == ["trial-0-step-10.safetensors", "trial-1-step-10.safetensors"]
    state.trials[0].step = 20
    save_state(tmp_path, state, {0: numbers(5)})
    assert under_way(tmp_path) == ["trial-0-step-20.safetensors", "trial-1-step-10.safetensors"]
    state.trials[1].state = "stopped"
    save_state(tmp_path, state, {})
    assert under_way(tmp_path) == ["trial-0-step-20.safetensors"]
    state.trials[0].state = "finished"
    save_state(tmp_path, state, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [STATE_NAME]


def test_killed_before_the_file_counts_the_search_is_as_it_was_before(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, state, {0: numbers(0)})
    before = repr(state)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    state.trials[0].step = 20
    with monkeypatch.context() as patch:
        patch.setattr("loraloom.files.atomic.os.replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_state(tmp_path, state, {0: numbers(5)})
    found = load_state(tmp_path, state.fingerprint, build)
    assert found is not None
    assert repr(found) == before
    there = load_slot(tmp_path, found, 0)
    assert there is not None
    assert torch.equal(there.tensors["adapter/a"], numbers(0).tensors["adapter/a"])
    # And what the crash left is cleared away by the next time.
    save_state(tmp_path, state, {0: numbers(5)})
    assert under_way(tmp_path) == ["trial-0-step-20.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [STATE_NAME]


def test_the_folder_of_another_search_is_refused_and_overwrite_named(tmp_path: Path, state: State) -> None:
    save_state(tmp_path, state, {})
    with pytest.raises(ConfigError) as error:
        load_state(tmp_path, "e" * 64, build)
    assert str(error.value) == (
        f"output: {tmp_path} holds another search, of other options, space or data; choose another folder, or give "
        "--overwrite to start over"
    )


def test_the_format_of_a_later_version_is_refused_and_a_file_without_one_is_read(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", module.FORMAT + 1)
        save_state(tmp_path, state, {})
    path = tmp_path / STATE_NAME
    said = f"^{path}: is of format {module.FORMAT + 1}, and this version of loraloom reads {module.FORMAT}; "
    for fingerprint in (state.fingerprint, "e" * 64):
        with pytest.raises(ConfigError, match=said):
            load_state(tmp_path, fingerprint, build)
    lines = path.read_text().splitlines(keepends=True)
    old = "".join(line for line in lines if '"format"' not in line)
    body = re.sub(r'\{"number": ("[a-z-]+")\}', r"\1", old).rpartition(',\n "sha256"')[0]
    path.write_text(f'{body},\n "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n')
    assert repr(load_state(tmp_path, state.fingerprint, build)) == repr(state)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: "{}",
        lambda text: text.replace('"repeats"', '"repaets"'),
        lambda text: text.replace('"halving"', '"other"'),
        lambda text: text.replace('"lora.r"', '"lora.rank"'),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_search_is_one_error_that_names_the_file_and_the_way_out(
    tmp_path: Path, state: State, damage: Callable[[str], str]
) -> None:
    save_state(tmp_path, state, {})
    path = tmp_path / STATE_NAME
    path.write_text(damage(path.read_text()), errors="surrogateescape")
    with pytest.raises(ConfigError) as error:
        load_state(tmp_path, state.fingerprint, build)
    assert str(error.value).startswith(f"{path}: not what a search writes (")
    assert "give --overwrite to start over" in str(error.value)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [Path.unlink, _flip, lambda path: path.write_bytes(path.read_bytes()[:50])])
def test_numbers_that_are_gone_or_damaged_are_one_error_that_names_their_file(
    tmp_path: Path, state: State, damage: Callable[[Path], object]
) -> None:
    save_state(tmp_path, state, {0: numbers(0)})
    path = tmp_path / UNDER_WAY / "trial-0-step-10.safetensors"
    damage(path)
    with pytest.raises(SaveError, match=f"^{path}: (cannot be read|is damaged) "):
        load_slot(tmp_path, state, 0)


def test_a_digit_that_was_changed_in_the_file_is_noticed(tmp_path: Path, state: State) -> None:
    save_state(tmp_path, state, {})
    path = tmp_path / STATE_NAME
    text = path.read_text()
    assert '"parameters": 12' in text
    path.write_text(text.replace('"parameters": 12', '"parameters": 13'))
    with pytest.raises(ConfigError, match=f"^{path}: not what a search writes .*its hash is another one"):
        load_state(tmp_path, state.fingerprint, build)


def test_only_trials_that_changed_are_written_out_again(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    once = module._trial
    monkeypatch.setattr(module, "_trial", lambda trial: seen.append(trial.number) or once(trial))
    save_state(tmp_path, state, {})
    save_state(tmp_path, state, {})
    assert seen == [0, 1, 2, 3, 4]
    state.trials[1].goal = 7
    state.trials[2].curve.loss.append(0.5)
    save_state(tmp_path, state, {})
    assert seen[5:] == [1, 2]
    found = load_state(tmp_path, state.fingerprint, build)
    assert found is not None
    assert (found.trials[1].goal, found.trials[2].curve.loss) == (7, [0.5])


def test_to_begin_anew_forgets_all_of_a_search_and_nothing_else(tmp_path: Path, state: State) -> None:
    save_state(tmp_path, state, {0: numbers(0)})
    for name in (
        JOURNAL_NAME,
        f"{TRIALS}/trial-3/adapter.json",
        f"{TRIALS}/mine.txt",
        "best/a",
        "result.json",
        "notes",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    clear(tmp_path, "result.json", "best")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["notes", f"{TRIALS}/mine.txt"]


def test_to_begin_anew_touches_no_folder_without_a_search(tmp_path: Path) -> None:
    for name in ("best/a", "result.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    clear(tmp_path, "result.json", "best")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "best", "result.json"]
