"""Promises of a slot: its schedule, its optimizer and its order of rows follow from its own arguments alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loraloom.data.batches import bucketed
from loraloom.data.example import Example
from loraloom.distributed.process_group import ProcessGroup
from loraloom.engine.slot import GROWTH_INTERVAL, Slot

ROWS = [Example([1] * (1 + i % 5), i) for i in range(10)]


def slot(*parameters: nn.Parameter, **changes: Any) -> Slot:
    given = {str(i): p for i, p in enumerate(parameters or [nn.Parameter(torch.zeros(1))])}
    return Slot("s", given, ROWS, **{"steps": 10, "batch_size": 4, "learning_rate": 1.0, **changes})


def go_on(one: Slot, loss: float = 0.0) -> list[Example]:
    """Take the next rows and update from whatever gradients there are."""
    examples, _ = one.next_examples()
    one.update(loss)
    return examples


@pytest.mark.parametrize(
    ("warmup", "rates"),
    [
        (0.0, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (0.2, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (0.11, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),  # a share of a step is a step
        (1.0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
    ],
)
def test_the_rate_rises_linearly_and_falls_linearly_and_no_step_is_wasted_on_zero(
    warmup: float, rates: list[float]
) -> None:
    one = slot(warmup_ratio=warmup)
    while not one.done:
        go_on(one)
    assert one.curve.learning_rate == pytest.approx(rates)


def test_a_single_step_has_the_whole_rate() -> None:
    assert slot(steps=1, warmup_ratio=0.05).rate(0) == 1.0


def test_an_update_is_adamw_with_decay_and_one_norm_for_all_gradients() -> None:
    source = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 2, generator=source, dtype=torch.float64) for _ in range(2)]
    mine, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    one = slot(*mine, weight_decay=0.1, max_grad_norm=0.5, warmup_ratio=0.3, steps=6)
    reference = torch.optim.AdamW(theirs, weight_decay=0.1, fused=False)
    for step in range(6):
        gradients = [torch.randn(3, 2, generator=source, dtype=torch.float64) for _ in range(2)]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for a, b, g in zip(mine, theirs, gradients, strict=True):
            a.grad, b.grad = g.clone(), g * min(1.0, 0.5 / float(norm))
        reference.param_groups[0]["lr"] = one.rate(step)
        reference.step()
        go_on(one, float(step))
        assert all(p.grad is None for p in mine)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert one.curve.loss == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert one.done


def test_a_parameter_without_a_gradient_stays() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    one = slot(used, unused, weight_decay=0.5)
    used.grad = torch.ones(2)
    go_on(one)
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))


def test_rows_come_in_the_order_of_the_seed_whatever_the_global_generator_says() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, twin, other = slot(seed=3), slot(seed=3), slot(seed=4)
    first = [[e.labels for e in go_on(one)] for _ in range(6)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert [[e.labels for e in go_on(twin)] for _ in range(6)] == first
    assert [[e.labels for e in go_on(other)] for _ in range(6)] != first
    lengths = [len(e.input_ids) for e in ROWS]
    assert first == bucketed(lengths, 4, 3, 0) + bucketed(lengths, 4, 3, 1)
    assert first[:3] != first[3:]


def test_accumulated_gradients_weigh_each_forward_by_its_share_of_the_labels() -> None:
    rows = [Example([1] * n, [-100] + [1] * (n - 1)) for n in (2, 3, 5, 9)]
    one = Slot("s", {}, rows, steps=2, batch_size=1, learning_rate=1.0, gradient_accumulation_steps=4)
    shares, seeds = [], set()
    for _ in range(4):
        (example,), share = one.next_examples()
        assert share == (len(example.input_ids) - 1) / 15
        seeds.add(one.dropout_seed)
        shares.append(share)
        assert one.step == 0
        one.update(3.0)
    assert sum(shares) == pytest.approx(1)
    assert len(seeds) == 4
    assert (one.step, one.curve.loss) == (1, [pytest.approx(3.0)])


@pytest.mark.parametrize(("schedule", "halfway"), [("constant", 1.0), ("cosine", 0.5), ("linear", 0.5)])
def test_a_schedule_begins_with_the_warmup_and_ends_as_it_says(schedule: str, halfway: float) -> None:
    one = slot(lr_scheduler_type=schedule, steps=6, warmup_ratio=0.3)
    assert [one.rate(step) for step in range(3)] == [0.5, 1.0, 1.0]
    assert one.rate(4) == pytest.approx(halfway)
    assert one.rate(6) == pytest.approx(0.0 if schedule != "constant" else 1.0)


def test_a_ratio_gives_b_a_rate_of_its_own() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    named = {"base_model.model.q.lora_A.weight": a, "base_model.model.q.lora_B.weight": b}
    one = Slot("s", named, ROWS, steps=10, batch_size=4, learning_rate=1e-3, loraplus_lr_ratio=16.0)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    go_on(one)
    torch.testing.assert_close(b / a, torch.full((2,), 16.0))


def test_gradients_that_are_not_finite_change_nothing_and_stop_the_slot() -> None:
    used = nn.Parameter(torch.ones(2))
    one = slot(used)
    used.grad = torch.tensor([1.0, float("inf")])
    go_on(one)
    assert one.failure == "step 1: the norm of the gradients is inf"
    assert not one.running
    assert torch.equal(used, torch.ones(2))


def test_a_scaled_step_whose_gradients_overflow_is_taken_again_with_half_the_scale() -> None:
    used = nn.Parameter(torch.zeros(2))
    one = slot(used, scaled=True, optim="SGD")
    rows, weight = one.next_examples()
    seed = one.dropout_seed
    used.grad = torch.full((2,), float("inf"))
    one.update(1.0)
    assert (one.step, one.failure, one.curve.loss) == (0, "", [])
    again, half = one.next_examples()
    assert (again, half, one.dropout_seed) == (rows, weight / 2, seed)
    used.grad = torch.full((2,), 0.1 * half)
    one.update(1.0)
    assert one.step == 1
    torch.testing.assert_close(used.detach(), torch.full((2,), -0.1))


def test_a_scale_that_went_well_for_long_grows() -> None:
    one = slot(nn.Parameter(torch.zeros(1)), scaled=True, steps=GROWTH_INTERVAL + 1)
    before = one.loss_scale
    while not one.done:
        go_on(one)
    assert (one.loss_scale, one.good_steps) == (2 * before, 1)


def test_processes_share_a_batch_and_its_weights_add_up_to_one() -> None:
    rows = [Example([1] * n, [-100] + [1] * (n - 1)) for n in (2, 3, 5, 9, 4)]
    whole = Slot("s", {}, rows, steps=2, batch_size=3, learning_rate=1.0)
    parts = [
        Slot("s", {}, rows, steps=2, batch_size=3, learning_rate=1.0, world=ProcessGroup(rank, 2)) for rank in range(2)
    ]
    seen = [one.next_examples() for one in parts]
    assert sorted(len(e.input_ids) for examples, _ in seen for e in examples) == sorted(
        len(e.input_ids) for e in whole.next_examples()[0]
    )
    assert sum(weight for _, weight in seen) == pytest.approx(1)


def test_processes_draw_masks_of_their_own() -> None:
    ones = [slot(world=ProcessGroup(rank, 3)) for rank in range(3)]
    assert len({one.dropout_seed for one in ones}) == 3
    assert ones[0].dropout_seed == slot().dropout_seed


def test_a_process_without_a_row_takes_one_that_counts_nothing() -> None:
    one = Slot("s", {}, [Example([1], 0)], steps=1, batch_size=1, learning_rate=1.0, world=ProcessGroup(1, 2))
    examples, weight = one.next_examples()
    assert (len(examples), weight) == (1, 0.0)
