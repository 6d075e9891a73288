"""Promises of successive halving: nobody is suspended before one has taken off, and nobody wins by coming first."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom.tuning.asha import SuccessiveHalving, taken_off
from loraloom.tuning.rungs import Standing


def stand(off: bool, loss: float, good: float) -> Standing:
    return Standing(off, [loss], [good])


NOISE = [0.01 * math.sin(step * 1.7) for step in range(200)]


def level(value: float, count: int) -> list[float]:
    return [value + NOISE[step] for step in range(count)]


def test_a_trial_takes_off_when_its_last_losses_lie_clearly_below_the_constant_answers() -> None:
    base = math.log(3)
    assert taken_off([*level(1.1, 40), *level(1.0, 12)], base, 108)
    assert not taken_off([*level(1.1, 40), *level(1.09, 12)], base, 108)  # by less than a fiftieth
    assert not taken_off(level(1.2, 52), base, 108)
    assert not taken_off([*level(1.1, 40), *level(0.9, 3)], base, 108)  # a ninth of the steps, not three of them
    rough = [0.6 if step % 2 else 1.5 for step in range(52)]
    assert not taken_off(rough, base, 108)  # below by less than its own error
    assert not taken_off(level(0.5, 7), base, 9)  # eight steps at least
    assert not taken_off([*level(0.5, 11), math.nan], base, 108)


@pytest.mark.parametrize(("count", "least", "quota"), [(16, 3, 8), (7, 3, 4), (4, 3, 3), (2, 3, 2), (2, 1, 1)])
def test_half_train_on_and_at_least_as_many_as_there_are_finalists(count: int, least: int, quota: int) -> None:
    assert SuccessiveHalving(1, 2, least).quota(count) == quota


def test_those_that_have_taken_off_come_first_then_the_lower_loss_then_the_first() -> None:
    halving = SuccessiveHalving(1, 2)
    stands = {0: (False, 0.5), 1: (True, 0.9), 2: (True, 0.8), 3: (False, 0.4), 4: (True, 0.8), 5: (True, math.nan)}
    assert halving.decide({n: stand(off, loss, 0.0) for n, (off, loss) in stands.items()}).promoted == [1, 2, 4]


def test_the_best_by_the_metric_trains_on_as_well() -> None:
    halving = SuccessiveHalving(1, 2)
    goods = {0: 0.5, 1: 0.6, 2: 0.7, 3: math.nan}
    assert halving.decide({n: stand(True, float(n), good) for n, good in goods.items()}).promoted == [0, 1, 2]


def test_suspended_trials_come_back_from_the_furthest_rung_first_and_once() -> None:
    halving = SuccessiveHalving(2, 2)
    halving.decide({n: stand(True, float(n), -n) for n in range(4)})
    halving.decide({n: stand(True, float(n), -n) for n in (0, 1)})
    assert halving.suspended(range(4)) == {1: 1, 2: 0, 3: 0}
    assert [halving.resume(range(4)) for _ in range(3)] == [[1], [2, 3], []]
    assert halving.suspended(range(4)) == {}


@given(st.integers(1, 5), st.integers(2, 4), st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**32))
def test_decisions_are_the_same_in_whatever_order_trials_stand_there(
    rungs: int, reduction: int, least: int, count: int, seed: int
) -> None:
    source = random.Random(seed)
    table = {(n, rung): stand(source.random() < 0.5, source.random(), source.random()) for n in range(count)
             for rung in range(rungs)}  # fmt: skip

    def play(shuffled: bool) -> SuccessiveHalving:
        halving = SuccessiveHalving(rungs, reduction, least)
        while halving.open < rungs:
            members = halving.members(halving.open, range(count))
            if shuffled:
                source.shuffle(members)
            quota, rung = halving.quota(len(members)), halving.open
            sent = halving.decide({n: table[n, rung] for n in members}).promoted
            assert quota <= len(sent) <= quota + 1
        return halving

    assert play(False) == play(True)
