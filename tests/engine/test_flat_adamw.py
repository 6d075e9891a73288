"""Promises of the optimizer: it is torch's AdamW for every parameter, and goes on where it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loraloom.engine.flat_adamw import FlatAdamW


def named(members: list[nn.Parameter], factors: list[float] | None = None) -> dict[str, tuple[nn.Parameter, float]]:
    return {f"p{i}": (p, factors[i] if factors else 1.0) for i, p in enumerate(members)}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((3, 2), (4,), (2, 5))]


def give(ours: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(step)
    for parameter in ours:
        parameter.grad = scale * torch.randn(parameter.shape, generator=draw)


def test_it_is_torchs_adamw_with_a_rate_for_each_and_one_norm_for_all() -> None:
    mine, theirs = parameters(), parameters()
    times = [1.0, 4.0, 1.0]
    one = FlatAdamW(named(mine, times), weight_decay=0.1)
    other = torch.optim.AdamW([{"params": [p]} for p in theirs], weight_decay=0.1, fused=True)
    for step in range(5):
        give(mine, step), give(theirs, step)
        for group, factor in zip(other.param_groups, times, strict=True):
            group["lr"] = 1e-2 * factor
        norm = nn.utils.clip_grad_norm_(theirs, 0.7)
        other.step()
        assert one.step(1e-2, 0.7) == pytest.approx(float(norm), rel=1e-6)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_it_goes_on_to_the_bit_from_what_it_says_of_its_state() -> None:
    mine = parameters()
    late = mine.pop()  # has its first gradient later than the others
    one = FlatAdamW(named([*mine, late]), weight_decay=0.1)
    for step in range(3):
        give(mine if step < 2 else [*mine, late], step)
        one.step(1e-2, 1.0)
    copies = [nn.Parameter(p.detach().clone()) for p in (*mine, late)]
    two = FlatAdamW(named(copies), weight_decay=0.1)
    two.load_state_dict({key: value.clone() for key, value in one.state_dict().items()})
    for step in range(3, 6):
        give([*mine, late], step), give(copies, step)
        assert one.step(1e-2, 1.0) == two.step(1e-2, 1.0)
    assert all(torch.equal(a, b) for a, b in zip((*mine, late), copies, strict=True))


def test_it_follows_parameters_that_were_moved_elsewhere() -> None:
    mine, theirs = parameters(), parameters()
    one, two = (FlatAdamW(named(ps), weight_decay=0.0) for ps in (mine, theirs))
    for step in range(4):
        give(mine, step), give(theirs, step)
        one.step(1e-2, 1.0), two.step(1e-2, 1.0)
        for parameter in mine:
            parameter.data = parameter.data.clone()  # as module.to(...) does
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_new_numbers_put_into_a_parameter_are_what_it_goes_on_from() -> None:
    mine = parameters()
    one = FlatAdamW(named(mine), weight_decay=0.0)
    give(mine, 0)
    one.step(1e-3, 1.0)
    with torch.no_grad():
        mine[0].fill_(7.0)
    give(mine, 1)
    one.step(1e-3, 1.0)
    assert (mine[0] - 7).abs().max() < 0.01
