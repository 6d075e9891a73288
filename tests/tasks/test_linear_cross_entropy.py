"""Promises of the loss in parts: the plain loss's value and gradient, and never all logits at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loraloom.lora import matmul
from loraloom.tasks.linear_cross_entropy import AT_A_TIME, Logits, head_cross_entropy, linear_cross_entropy

CALM = settings(max_examples=40, deadline=None)  # two cores are shared: a slow example is no failure


def given_tensors(tokens: int, vocabulary: int, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(tokens * 1000 + vocabulary)
    hidden = torch.randn(tokens, 8, generator=draw, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocabulary, 8, generator=draw, dtype=torch.float64).to(dtype)
    offsets = torch.randn(vocabulary, generator=draw, dtype=torch.float64).to(dtype) if bias else None
    return hidden.requires_grad_(), weight, offsets, torch.randint(0, vocabulary, (tokens,), generator=draw)  # type: ignore[return-value]


def value_and_gradient(total: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return total.detach(), torch.autograd.grad(total * 3, hidden)[0] / 3


@CALM
@given(tokens=st.integers(0, 20), vocabulary=st.integers(1, 9), at_a_time=st.integers(1, 50), bias=st.booleans())
def test_value_and_gradient_are_those_of_the_plain_loss_for_any_parts(
    tokens: int, vocabulary: int, at_a_time: int, bias: bool
) -> None:
    hidden, weight, offsets, targets = given_tensors(tokens, vocabulary, torch.float64, bias)
    wanted = value_and_gradient(F.cross_entropy(F.linear(hidden, weight, offsets), targets, reduction="sum"), hidden)
    before, AT_A_TIME["cpu"] = AT_A_TIME["cpu"], at_a_time
    try:
        found = {
            "frozen": value_and_gradient(linear_cross_entropy(hidden, weight, offsets, targets).sum(), hidden),
            "any": value_and_gradient(
                head_cross_entropy(hidden, lambda h: F.linear(h, weight, offsets), vocabulary, targets).sum(), hidden
            ),
        }
    finally:
        AT_A_TIME["cpu"] = before
    for which in found.values():
        for a, b in zip(which, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [Logits(0.3), Logits(cap=2.0), Logits(5.0, 1.5)])
def test_scaled_and_capped_logits_have_the_plain_losses_gradient(shape: Logits) -> None:
    hidden, weight, offsets, targets = given_tensors(9, 7, torch.float64)
    plain = F.cross_entropy(shape(F.linear(hidden, weight, offsets)), targets, reduction="sum")
    wanted = value_and_gradient(plain, hidden)
    found = value_and_gradient(linear_cross_entropy(hidden, weight, offsets, targets, shape).sum(), hidden)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        total = linear_cross_entropy(hidden, weight, offsets, targets, shape).sum()
    assert float(total) == pytest.approx(float(wanted[0]), rel=1e-9)


@pytest.mark.parametrize(("dtype", "native"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
def test_each_dtype_is_as_close_as_the_plain_loss(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "native", lambda *_: native)
    hidden, weight, _, targets = given_tensors(64, 500, dtype, bias=False)
    exact = hidden.detach().double().requires_grad_()
    truth = value_and_gradient(F.cross_entropy(F.linear(exact, weight.double()), targets, reduction="sum"), exact)
    plain = value_and_gradient(F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum"), hidden)
    found = value_and_gradient(linear_cross_entropy(hidden, weight, None, targets).sum(), hidden)
    for a, b, wanted in zip(found, plain, truth, strict=True):
        error, allowed = ((t.double() - wanted).norm() / wanted.norm() for t in (a, b))
        assert error < 1.2 * allowed + 1e-6
    assert found[0].dtype is torch.float32
    if dtype is torch.float32:
        torch.testing.assert_close(found[0], plain[0], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[1], plain[1], rtol=1e-5, atol=1e-5)


def test_great_logits_do_not_overflow() -> None:
    hidden, weight, _, targets = given_tensors(5, 7, torch.float32, bias=False)
    total, gradient = value_and_gradient(linear_cross_entropy(hidden, weight * 1e4, None, targets).sum(), hidden)
    assert torch.isfinite(total)
    assert torch.isfinite(gradient).all()


def test_no_more_logits_exist_than_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AT_A_TIME, "cpu", 100)
    hidden, weight, _, targets = given_tensors(64, 20, torch.float64, bias=False)
    sizes: list[int] = []
    plain = F.linear

    def linear(*tensors: Tensor | None) -> Tensor:
        out = plain(*tensors)  # type: ignore[arg-type]
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(F, "linear", linear)
    linear_cross_entropy(hidden, weight, None, targets).sum().backward()
    assert max(sizes) == 100
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        linear_cross_entropy(hidden, weight, None, targets)
    assert sum(kept) == hidden.numel()


def test_a_head_that_trains_gets_its_gradient() -> None:
    hidden, _, _, targets = given_tensors(9, 7, torch.float64)
    head = nn.Linear(8, 7, dtype=torch.float64)
    head_cross_entropy(hidden, head, 7, targets).sum().backward()
    found = [p.grad.clone() for p in head.parameters() if p.grad is not None]
    head.zero_grad()
    F.cross_entropy(head(hidden.detach()), targets, reduction="sum").backward()
    for a, p in zip(found, head.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-12)


def test_the_loss_is_a_sum_whatever_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, offsets, targets = given_tensors(30, 6, torch.float64)
    wanted = float(F.cross_entropy(F.linear(hidden, weight, offsets), targets, reduction="sum"))
    for at_a_time in (1, 50, 10_000):
        monkeypatch.setitem(AT_A_TIME, "cpu", at_a_time)
        with torch.inference_mode():
            anyhow = head_cross_entropy(hidden, lambda h: F.linear(h, weight, offsets), 6, targets)
            frozen = linear_cross_entropy(hidden, weight, offsets, targets)
        assert [float(each.sum()) for each in (anyhow, frozen)] == pytest.approx([wanted] * 2, rel=1e-12)
