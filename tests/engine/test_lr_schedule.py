"""Promises of a schedule: it follows from the step alone, wastes none on a rate of zero, and ends as it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom.config.train import SCHEDULES
from loraloom.engine.lr_schedule import Schedule


def test_warmup_stable_decay_rises_stays_and_falls_in_lines() -> None:
    schedule = Schedule(1.0, steps=10, warmup=2, kind="warmup_stable_decay", decay=4)
    rates = [schedule.rate(step) for step in range(10)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_a_decay_longer_than_what_is_left_begins_after_the_warmup() -> None:
    schedule = Schedule(1.0, steps=4, warmup=2, kind="warmup_stable_decay", decay=4)
    assert [schedule.rate(step) for step in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.5])


@given(
    kind=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    decay=st.integers(0, 300),
)
def test_every_step_has_a_rate_above_zero_and_at_most_the_peak_which_is_reached(
    kind: str, steps: int, warmup: int, decay: int
) -> None:
    schedule = Schedule(0.3, steps, min(warmup, steps), kind, min(decay, steps))
    rates = [schedule.rate(step) for step in range(steps)]
    assert all(0 < rate <= 0.3 + 1e-12 for rate in rates)
    assert max(rates) == pytest.approx(0.3)
    top = rates.index(max(rates))
    assert all(a >= b - 1e-12 for a, b in zip(rates[top:], rates[top + 1 :]))
