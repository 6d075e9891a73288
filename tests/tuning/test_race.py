"""Promises of the race: nobody is paused by noise, before one has taken off, or by coming late; never all."""

from __future__ import annotations

import random
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from loraloom.inference.jackknife import PARTS
from loraloom.tuning.race import MORE, Race, behind, threshold
from loraloom.tuning.rungs import Standing

SHARES = [1 / 9, 2 / 9, 1 / 3, 1 / 2, 2 / 3]


def race(least: int = 1, budget: float = 1 / 3, reduction: int = 2) -> Race:
    return Race(len(SHARES), reduction, least, shares=list(SHARES), budget=budget)


def figures(rows: list[float]) -> list[float]:
    """The mean over all rows, and over all but each part."""
    parts = [rows[part::PARTS] for part in range(PARTS)]
    total = sum(rows)
    return [total / len(rows), *((total - sum(part)) / (len(rows) - len(part)) for part in parts)]


def stand(
    mean: float, spread: float = 0.0, rows: int = 100, off: bool = True, seed: int = 0, **more: float
) -> Standing:
    """A trial whose rows have losses of ``mean``, each ``spread`` away from it at random."""
    source = random.Random(seed)
    losses = [mean + spread * source.gauss(0, 1) for _ in range(rows)]
    return Standing(off, figures(losses), figures([-loss for loss in losses]), rows, **more)  # type: ignore[arg-type]


def drawn(source: random.Random, count: int, rows: int = 40) -> dict[int, Standing]:
    return {
        number: stand(
            source.random(), source.random(), rows, source.random() < 0.7, source.randrange(2**32),
            parameters=source.randrange(4), fall=source.random(),
        )
        for number in range(count)
    }  # fmt: skip


def test_half_continue_and_a_quarter_if_so_many_have_taken_off() -> None:
    assert race().quota(16, 3) == 8
    assert race().quota(16, 4) == 4
    assert race(least=3).quota(8, 3) == 3
    assert race(reduction=3).quota(18, 2) == 2


def test_what_is_surely_worse_is_paused_and_what_cannot_be_told_apart_continues_while_the_budget_lasts() -> None:
    stands = {number: stand(1.0, 1.0, seed=number) for number in range(4)}
    stands |= {number: stand(9.0, 1.0, seed=number) for number in range(4, 8)}
    for left, count in ((0.0, 0), (1.0, 1), (9.0, 9)):
        found = race().decide(stands, left)
        assert set(found.promoted) <= {0, 1, 2, 3}
        assert len(found.undecided) <= count
    assert found.promoted == [0, 1, 2, 3]


def test_when_the_budget_is_spent_the_smaller_adapters_stop_first() -> None:
    sizes = [1, 1, 5, 2, 9, 3, 4, 8]
    stands = {number: stand(1.0, 1.0, seed=number, parameters=size) for number, size in enumerate(sizes)}
    found = race().decide(stands, 2.1)
    paused = set(stands) - set(found.promoted)
    assert found.undecided
    assert paused
    assert max(sizes[number] for number in paused) <= min(sizes[number] for number in found.undecided)


def test_a_slow_starter_continues() -> None:
    stands = {number: stand(1.0 + number, 0.1, seed=number, fall=0.1) for number in range(8)}
    stands[7] = stand(8.0, 0.1, seed=7, fall=9.0)
    assert race().decide(stands).promoted == [0, 1, 7]


def test_those_that_cannot_be_told_apart_are_measured_on_more_rows_up_to_all() -> None:
    stands = {number: stand(1.0, 1.0, 64, seed=number) for number in range(4)}
    stands |= {number: stand(9.0, 1.0, 64, seed=number) for number in range(4, 8)}
    one = race()
    assert one.ask(stands, 1000) == dict.fromkeys(range(4), 64 * MORE)
    assert one.ask(stands, 100) == dict.fromkeys(range(4), 100)
    assert one.ask(stands, 64) == {}  # there are no more
    more = stands | {number: stand(1.0 + number, 0.1, 256, seed=number) for number in range(4)}
    assert one.ask(more, 1000) == {}  # decided
    assert one.decide(more).promoted == [0, 1]  # those measured on fewer rows were worse on these


def test_the_threshold_holds_at_any_look_and_a_difference_is_paired() -> None:
    assert threshold(1) > threshold(4) > 2.0
    source = random.Random(0)
    crossed = 0
    for _ in range(300):
        rows = [source.gauss(0, 1) for _ in range(640)]
        looks = [(count, behind(figures([0.0] * count), figures(rows[:count]))) for count in (40, 160, 640)]
        crossed += any(score > threshold(count / 40) for count, score in looks)
    assert crossed < 0.1 * 300
    rough = [source.gauss(0, 9) for _ in range(100)]
    assert behind(figures(rough), figures([row + 0.01 for row in rough])) > threshold(1)


def test_it_looks_back_and_resumes_what_was_as_close_as_the_winner_was() -> None:
    one = race(budget=1.0)
    stands = {0: stand(1.0, 0.1, seed=0), 1: stand(2.0, 0.1, seed=1, fall=3.0), 2: stand(2.5, 0.1), 3: stand(5.0, 0.1)}
    assert one.decide(stands).promoted == [0, 1]
    for _ in SHARES[1:]:
        one.pass_all([0, 1])
    ends = {0: stand(0.9, 0.1, seed=0), 1: stand(0.1, 0.1, seed=1)}
    past: list[Mapping[int, Standing]] = [stands, {}, {}, {}, {}]
    found = one.look_back(past, ends, 1.0)
    assert found is not None
    assert (found.rung, found.winner, found.leader, found.paused, found.resumed) == (0, 1, 0, [2], [2])
    assert one.suspended(range(4)) == {3: 0}
    assert one.looked
    # The leader still wins: what paused the others held.
    assert race().look_back(past, {0: ends[1], 1: ends[0]}, 1.0) is None


@given(st.integers(1, 20), st.integers(1, 3), st.integers(2, 4), st.floats(0, 8), st.integers(0, 2**32))
def test_decisions_do_not_depend_on_the_order_and_some_always_continue(
    count: int, least: int, reduction: int, left: float, seed: int
) -> None:
    source = random.Random(seed)
    stands = drawn(source, count)
    numbers = list(stands)
    source.shuffle(numbers)
    found = race(least, reduction=reduction).decide(stands, left)
    assert found == race(least, reduction=reduction).decide({number: stands[number] for number in numbers}, left)
    assert len(found.promoted) >= min(least, count)
    assert set(found.undecided) <= set(found.promoted) <= set(stands)
    best = max(stands, key=lambda number: stands[number].good[0])
    assert stands[best].good[0] in [stands[number].good[0] for number in found.promoted]
    asked = race(least, reduction=reduction).ask(stands, 1000)
    assert asked == race(least, reduction=reduction).ask({number: stands[number] for number in numbers}, 1000)


@given(st.integers(4, 16), st.integers(0, 2**32))
def test_while_there_is_budget_nobody_is_paused_within_the_noise(count: int, seed: int) -> None:
    source = random.Random(seed)
    stands = {number: stand(1.0, 1.0, 40, seed=source.randrange(2**32)) for number in range(count)}
    paused = set(stands) - set(race().decide(stands, 99.0).promoted)
    for number in paused:
        gaps = [
            behind([-loss for loss in stands[number].loss], [-loss for loss in other.loss]) for other in stands.values()
        ]
        assert max(gaps) > threshold(1)
