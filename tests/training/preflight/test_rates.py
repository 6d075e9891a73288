"""What a run file begins with follows the model's width, the task and the rows; a run that ended early says so."""

from __future__ import annotations

import pytest

from loraloom.tasks import TASKS
from loraloom.training.preflight.rates import HIGHEST, LOWEST, falls, start


@pytest.mark.parametrize(
    ("hidden", "task", "rows", "rate", "epochs"),
    [
        (384, "seq-cls", 300, 1.8e-3, 15),  # a 22M encoder
        (768, "token-cls", 10_000, 1.0e-3, 3),
        (2048, "causal-lm", 50_000, 4.9e-4, 2),
        (4096, "causal-lm", 1_000, 2.9e-4, 3),
        (4096, "causal-lm", 50, 4.3e-4, 5),  # under 100 steps
        (8, "seq-cls", 300, HIGHEST, 15),
        (10**6, "causal-lm", 5_000, LOWEST, 3),
        (None, "seq2seq-lm", 5_000, 5e-4, 3),
    ],
)
def test_rate_and_epochs_follow_width_task_and_rows(
    hidden: int | None, task: str, rows: int, rate: float, epochs: int
) -> None:
    assert start(hidden, TASKS[task], rows, 16) == (rate, epochs)


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([1.0, 0.8, 0.6], (0.8, 0.6)),
        ([1.0, 0.8, 0.799], None),
        ([1.0, 0.5, 0.6], None),
        ([0.4, 0.9, 0.5], None),  # falls, from a rise
        ([0.0004, 0.0002], None),  # there is nothing left to fall
        ([0.5], None),
        ([1.0, float("nan")], None),
    ],
)
def test_a_loss_that_still_falls_at_the_end_is_seen(losses: list[float], found: tuple[float, float] | None) -> None:
    assert falls([{"step": i, "loss": loss} for i, loss in enumerate(losses)]) == found
