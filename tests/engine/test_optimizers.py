"""Promises of named optimizers: each does what torch's own does, and goes on from its state to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraloom.engine.flat_adamw import FlatAdamW
from loraloom.engine.optimizers import NamedOptimizer, build, find
from loraloom.errors import ConfigError

SHAPES = [(3, 2), (2, 4), (5,)]
#: Muon updates matrices alone.
NAMES = [
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"),
    "SGD",
]


def named(members: list[nn.Parameter]) -> dict[str, tuple[nn.Parameter, float]]:
    return {f"layer.{i}": (parameter, 1.0) for i, parameter in enumerate(members)}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=source, dtype=torch.float64)) for shape in SHAPES]


def gradients(step: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(100 + step)
    return [torch.randn(*shape, generator=source, dtype=torch.float64) for shape in SHAPES]


def give(members: list[nn.Parameter], step: int, times: float = 1.0) -> None:
    for parameter, gradient in zip(members, gradients(step), strict=True):
        parameter.grad = times * gradient


@pytest.mark.parametrize("name", NAMES)
def test_each_does_what_torchs_own_does_with_clipped_gradients(name: str) -> None:
    mine, theirs = parameters(), parameters()
    one = build(name, named(mine), 0.0, {})
    other: Any = getattr(torch.optim, name)(theirs, **({"weight_decay": 0.0} if name == "AdamW" else {}))
    for step in range(5):
        give(mine, step)
        give(theirs, step)
        norm = one.step(0.01, 2.0)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, 2.0)))
        other.param_groups[0]["lr"] = 0.01
        other.step()
        assert all(p.grad is None for p in mine)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_that_goes_on_from_its_state_is_the_same_to_the_bit(name: str) -> None:
    arguments = {"momentum": 0.9} if name == "SGD" else {}
    whole, before = parameters(), parameters()
    one, first = (build(name, named(ps), 0.0, arguments) for ps in (whole, before))
    for step in range(6):
        give(whole, step)
        one.step(0.01, 1.0)
        if step < 3:
            give(before, step)
            first.step(0.01, 1.0)
    after = [nn.Parameter(p.detach().clone()) for p in before]
    second = build(name, named(after), 0.0, arguments)
    saved = {key: value.clone() for key, value in first.state_dict().items()}
    second.load_state_dict(dict(sorted(saved.items(), key=lambda item: item[0][::-1])))  # in any order
    for step in range(3, 6):
        give(after, step)
        second.step(0.01, 1.0)
    for a, b in zip(whole, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["adamw", "AdamW", "SGD"])
def test_scaled_gradients_and_those_of_several_processes_give_the_same_step(name: str) -> None:
    plain, scaled = parameters(), parameters()
    one, other = (build(name, named(ps), 0.0, {}) for ps in (plain, scaled))

    def twice(tensor: Tensor) -> None:
        tensor.mul_(2)

    for step in range(3):
        give(plain, step)
        give(scaled, step, times=512.0)
        assert one.step(0.01, 1.0) == pytest.approx(other.step(0.01, 1.0, scale=1024.0, reduce=twice))
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "SGD"])
def test_gradients_that_are_not_finite_change_nothing(name: str) -> None:
    members = parameters()
    before = [p.detach().clone() for p in members]
    one = build(name, named(members), 0.1, {})
    give(members, 0)
    assert members[1].grad is not None
    members[1].grad[0, 0] = float("nan")
    assert not one.step(0.01, 1.0) < float("inf")
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(members, before, strict=True))


def test_parameters_have_rates_of_their_own() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    one = build("SGD", {"a": (a, 1.0), "b": (b, 4.0)}, 0.0, {})
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    one.step(0.1, 100.0)
    torch.testing.assert_close(b.detach(), 4 * a.detach())


def test_the_usual_one_is_the_flat_one_and_classes_are_torchs() -> None:
    assert isinstance(build("adamw", {}, 0.0, {}), FlatAdamW)
    assert isinstance(build("AdamW", named(parameters()[:1]), 0.0, {"amsgrad": True}), NamedOptimizer)


@pytest.mark.parametrize(
    ("name", "decay", "arguments", "said"),
    [
        ("adam", 0.0, {}, "optim: torch.optim has no 'adam'; did you mean 'adamw'?"),
        ("Lion", 0.0, {}, "optim: torch.optim has no 'Lion'; there are adamw, ASGD"),
        ("LBFGS", 0.0, {}, "optim: LBFGS needs a closure"),
        ("SparseAdam", 0.0, {}, "optim: SparseAdam needs sparse gradients"),
        ("Rprop", 0.1, {}, "weight_decay: Rprop has none, found 0.1"),
        ("SGD", 0.0, {"lr": 1}, "optim_args: lr is set by learning_rate"),
        ("SGD", 0.0, {"momentun": 1}, "optim_args: SGD takes no 'momentun'; did you mean 'momentum'?"),
    ],
)
def test_what_cannot_be_made_is_said_with_its_option(name: str, decay: float, arguments: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        find(name, decay, arguments)
    assert str(error.value).startswith(said)


def test_a_value_that_the_class_refuses_is_an_input_error() -> None:
    with pytest.raises(ConfigError, match="optim: SGD cannot be made"):
        build("SGD", named(parameters()[:1]), 0.0, {"momentum": -1})
