"""Promises of successive halving: who goes on follows from what was measured, and nobody by coming first."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom.tune.halving import Halving


def reached(halving: Halving, rung: int, *goods: float) -> Halving:
    """Trials 0, 1, 2, ... reach ``rung``, each this good."""
    for trial, good in enumerate(goods):
        halving.reach(trial, rung, good)
    return halving


def all_next(halving: Halving, new: bool = False, heading: tuple[int, ...] = ()) -> list[int]:
    """Those that go on while nothing else happens."""
    found = []
    while (trial := halving.next(new, heading)) is not None:
        found.append(trial)
    return found


@pytest.mark.parametrize(
    ("count", "while_more", "at_last"), [(1, 0, 1), (2, 0, 1), (3, 1, 1), (4, 1, 2), (6, 2, 2), (7, 2, 3), (9, 3, 3)]
)
def test_one_in_three_goes_on_rounded_down_while_more_can_come_and_up_once_none_can(
    count: int, while_more: int, at_last: int
) -> None:
    goods = [float(good) for good in range(count)]
    best = list(reversed(range(count)))
    assert all_next(reached(Halving(1, 3), 0, *goods), new=True) == best[:while_more]
    assert all_next(reached(Halving(1, 3), 0, *goods), heading=(0,)) == best[:while_more]
    assert all_next(reached(Halving(1, 3), 0, *goods), heading=(1,)) == best[:at_last]
    assert all_next(reached(Halving(1, 3), 0, *goods)) == best[:at_last]


def test_at_least_so_many_go_on_once_no_more_can_come() -> None:
    assert all_next(reached(Halving(1, 3, least=2), 0, 1, 2, 3), new=True) == [2]
    assert all_next(reached(Halving(1, 3, least=2), 0, 1, 2, 3)) == [2, 1]
    assert all_next(reached(Halving(1, 3, least=9), 0, 1, 2, 3)) == [2, 1, 0]


def test_those_on_their_way_to_a_rung_keep_its_quota_low_until_they_are_there() -> None:
    halving = reached(Halving(2, 3), 0, 1, 2, 3, 4)
    assert halving.next(False, []) == 3
    halving.reach(3, 1, 5.0)
    # Trial 2 may go on from rung 0 as well, so rung 1 has not seen all that it will see.
    assert halving.next(False, []) == 2
    assert halving.next(False, [1]) is None
    halving.reach(2, 1, 6.0)
    assert halving.next(False, []) == 2
    assert halving.next(False, [2]) is None


def test_the_furthest_rung_comes_first() -> None:
    halving = reached(Halving(2, 2), 0, 1, 2, 3, 4)
    for trial, good in ((3, 1.0), (2, 2.0)):
        assert halving.next(True, []) == trial
        halving.reach(trial, 1, good)
    halving.reach(4, 0, 9.0)
    halving.reach(5, 0, 8.0)
    assert all_next(halving, new=True) == [2, 4, 5]


def test_a_promotion_takes_back_none_that_was_made_before() -> None:
    halving = reached(Halving(1, 2), 0, 1, 2)
    assert halving.next(True, []) == 1
    for trial in (2, 3):
        halving.reach(trial, 0, 10.0 + trial)
    # The quota of 2 belongs to the two best; trial 1 went before and is not among them.
    assert all_next(halving, new=True) == [3, 2]


def test_the_better_metric_goes_on_then_the_lower_loss_then_the_first() -> None:
    halving = Halving(1, 5)
    for trial, goods in enumerate([(0.8, -0.1), (0.9, -0.5), (0.9, -0.4), (0.9, -0.4), (0.7, -0.0)]):
        halving.reach(trial, 0, *goods)
    assert all_next(halving, new=True) == [2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_goes_on(bad: float) -> None:
    halving = reached(Halving(1, 2, least=3), 0, bad, 0.5, bad)
    assert all_next(halving) == [1]
    halving = Halving(1, 2, least=3)
    halving.reach(0, 0, 0.9, bad)
    halving.reach(1, 0, 0.5, -0.3)
    assert all_next(halving) == [1]


def test_a_trial_at_two_rungs_in_one_step_goes_on_once_and_from_the_further_one_alone() -> None:
    halving = Halving(2, 3)
    for trial in range(9):  # of nine at rung 0 ...
        halving.reach(trial, 0, float(trial))
    for trial in (6, 7, 8):  # ... three are so short that they are at rung 1 as well
        halving.reach(trial, 1, float(trial))
    assert all_next(halving, new=True) == [8]


def test_nothing_was_seen_nobody_goes_on() -> None:
    assert Halving(3, 3, least=2).next(False, []) is None
    assert Halving(0, 3).next(False, []) is None


@given(
    st.integers(1, 3), st.integers(2, 4), st.integers(1, 3), st.integers(1, 20), st.integers(0, 2**32), st.booleans()
)
def test_any_search_ends_and_sends_nobody_twice_from_a_rung_and_none_below_the_quota(
    rungs: int, reduction: int, least: int, count: int, seed: int, short: bool
) -> None:
    """Trials run in any order, of which some fail and some reach two rungs at once; twice the same."""

    def play() -> tuple[list[tuple[int, int]], Halving]:
        source = random.Random(seed)
        halving, log, running, begun = Halving(rungs, reduction, least), list[tuple[int, int]](), dict[int, int](), 0
        while True:
            while len(running) < 3:
                chosen = halving.next(begun < count, [*running.values()])
                if chosen is not None:
                    at = max(rung for rung in range(rungs) if chosen in halving.seen[rung])
                    log.append((chosen, at))
                    running[chosen] = at + 1
                elif begun < count:
                    running[begun] = 0
                    begun += 1
                else:
                    break
            if not running:
                return log, halving
            trial = source.choice([*running])
            rung = running.pop(trial)
            if rung < rungs and source.random() > 0.1:
                for reach in range(rung, min(rungs, rung + (2 if short and trial % 3 == 0 else 1))):
                    halving.reach(trial, reach, source.random())

    log, halving = play()
    assert play()[0] == log
    assert len(log) == len(set(log))
    for rung in range(rungs):
        seen, sent = halving.seen[rung], [trial for trial, at in log if at == rung]
        assert set(sent) <= set(seen)
        passed = {t for t in seen if rung + 1 < rungs and t in halving.seen[rung + 1]}
        # The best at every rung went on, and at the end at least so many as promised.
        wanted = sorted(seen, key=lambda t: seen[t], reverse=True)[: max(math.ceil(len(seen) / reduction), least)]
        assert set(wanted) <= set(sent) | passed
