"""Promises of the planner: as many slots as pay and fit, and it says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraloom import LoraConfig
from loraloom.config.train import TrainConfig
from loraloom.engine.pack import Pack
from loraloom.errors import ConfigError
from loraloom.messages import Message
from loraloom.report.sentences import sentence
from loraloom.training.preflight.estimate import step_memory
from loraloom.training.setup import Setup, load
from loraloom.tuning import concurrency
from loraloom.tuning.concurrency import measured, plan_slots

ONE = LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")


def rates(found: dict[int, float]) -> tuple[Callable[[int], float], list[int]]:
    asked: list[int] = []

    def rate(count: int) -> float:
        asked.append(count)
        return found[count]

    return rate, asked


@pytest.mark.parametrize(
    ("found", "most", "asked"),
    [
        ({1: 10, 2: 20, 4: 40, 8: 80, 16: 160}, 16, [1, 2, 4, 8, 16]),
        ({1: 10, 2: 20, 4: 40, 6: 60}, 6, [1, 2, 4, 6]),
        ({1: 10, 2: 20, 4: 18.9}, 16, [1, 2, 4, 4, 2, 4, 2]),  # below 0.95 times the best, and again
        ({1: 10, 2: 20, 4: 19.1, 8: 18}, 16, [1, 2, 4, 8, 8, 2, 8, 2]),
        ({1: 10, 2: 9}, 16, [1, 2, 2, 1, 2, 1]),
        ({1: 10}, 1, [1]),
        ({1: 10, 2: 20}, 2, [1, 2]),
    ],
)
def test_sizes_double_until_more_cost_speed(found: dict[int, float], most: int, asked: list[int]) -> None:
    rate, seen = rates(found)
    assert {count: max(rates) for count, rates in measured(rate, most).items()} == found
    assert seen == asked


def test_a_number_that_was_slow_once_is_measured_again_before_it_is_given_up() -> None:
    coming = {1: [10.0, 9.0], 2: [3.0, 19.0], 4: [41.0]}
    assert measured(lambda count: coming[count].pop(0), 4) == {1: [10.0, 9.0], 2: [3.0, 19.0], 4: [41.0]}


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried to allocate"), MemoryError()])
def test_a_size_that_memory_does_not_hold_ends_the_measuring(error: Exception) -> None:
    def rate(count: int) -> float:
        if count == 4:
            raise error
        return 10.0 * count

    assert measured(rate, 16) == {1: [10], 2: [20]}


def test_one_slot_that_memory_does_not_hold_and_other_errors_are_raised() -> None:
    def fail(error: Exception) -> Callable[[int], float]:
        def rate(count: int) -> float:
            raise error

        return rate

    for error in (MemoryError(), RuntimeError("odd")):
        with pytest.raises(type(error)):
            measured(fail(error), 4)

    def later(count: int) -> float:
        return 1.0 if count == 1 else fail(RuntimeError("odd"))(count)

    with pytest.raises(RuntimeError, match="odd"):
        measured(later, 4)


def said(slots: concurrency.Slots) -> str:
    """What is told of the choice, without the number itself."""
    text = sentence(Message("slots", slots=slots.count, workers=1, **slots.figures))
    return text.partition("(")[2].removesuffix(")")


# -- with a model -----------------------------------------------------------------------------------------------------


@pytest.fixture
def setup(encoder_folder: Path, reviews: Path, tmp_path: Path) -> Setup:
    return load(TrainConfig(model=encoder_folder, data=reviews, task="seq-cls", output=tmp_path, max_steps=4))


@pytest.fixture
def pack(setup: Setup) -> Pack:
    setup.model.add_adapter("span", LoraConfig(r=1, target_modules=["query", "value"], task_type="SEQ_CLS"))
    return Pack(setup.model, task=setup.task, pad_id=0)


def test_the_largest_number_that_is_about_as_fast_as_the_best_is_taken_and_the_figures_said(
    pack: Pack, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {1: 1000.0, 2: 1900.0, 4: 2010.0, 8: 1900.0}
    monkeypatch.setattr(concurrency, "_rate", lambda pack, setup, config, count: found[count])
    slots = plan_slots(pack, setup, ONE, 16, None, None)
    # 8 is below 4 by more than a twentieth.
    assert slots.count == 4
    assert said(slots) == (
        "tokens a second by number of slots: 1: 1,000, 2: 1,900, 4: 2,010 (2,010 to 2,010), 8: 1,900 (1,900 to 1,900)"
    )


def test_what_is_measured_is_real_and_leaves_nothing_in_the_pack(pack: Pack, setup: Setup) -> None:
    before = pack.adapters
    slots = plan_slots(pack, setup, ONE, 2, None, None)
    assert slots.count in (1, 2)
    assert pack.adapters == before


def test_no_more_slots_than_fit_into_the_memory(pack: Pack, setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    need = step_memory(setup, ONE, setup.options.batch_size)
    each = int(concurrency.MARGIN * (need.total - need.base))
    monkeypatch.setattr(concurrency, "_rate", lambda pack, setup, config, count: float(count))
    slots = plan_slots(pack, setup, ONE, 16, need.base + 3 * each + 5, None)
    assert slots.count == 3
    assert "no more than 3 fit" in said(slots)
    monkeypatch.setattr(concurrency, "free_memory", lambda: int((5 * each + 5) / concurrency.SHARE))
    assert plan_slots(pack, setup, ONE, 16, None, None).count == 5


def test_one_slot_that_does_not_fit_is_refused_with_what_to_lower(pack: Pack, setup: Setup) -> None:
    need = step_memory(setup, ONE, setup.options.batch_size)
    for memory in (1000, need.base, need.total):
        with pytest.raises(ConfigError, match="^memory: a trial needs .* beside the model of .*lower batch_size, max"):
            plan_slots(pack, setup, ONE, 4, memory, None)


def test_a_number_that_is_given_is_not_measured_but_clipped_and_that_is_said(
    pack: Pack, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(concurrency, "_rate", never)
    need = step_memory(setup, ONE, setup.options.batch_size)
    each = int(concurrency.MARGIN * (need.total - need.base))
    given = plan_slots(pack, setup, ONE, 16, None, 3)
    assert (given.count, said(given)) == (3, "3 as given")
    clipped = plan_slots(pack, setup, ONE, 16, need.base + 2 * each + 5, 3)
    assert clipped.count == 2
    assert said(clipped).startswith("2 of the 3 given: ")
    fewer = plan_slots(pack, setup, ONE, 2, None, 3)
    assert fewer.count == 2
    assert said(fewer) == "2 of the 3 given: there are no more trials"


def test_a_larger_adapter_and_more_rows_need_more(setup: Setup) -> None:

    one = step_memory(setup, ONE, setup.options.batch_size).total
    assert step_memory(setup, ONE.copy(r=32), setup.options.batch_size).total > one
    assert step_memory(setup, ONE, 32).total > one
