"""Promises of the maths: the fused projections equal the plain ones, and keep no more than they must."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraloom.lora.dropout import Dropped
from loraloom.lora.functional import Projection, lora_linear, lora_projections, row_norms

CALM = settings(max_examples=40, deadline=None)  # two cores are shared: a slow example is no failure


def make(
    n: int,
    dtype: torch.dtype = torch.float64,
    *,
    inside: int = 6,
    ranks: tuple[int, ...] = (2, 3, 1),
    bias: bool = True,
) -> list[Projection]:
    draw = torch.Generator().manual_seed(n)

    def numbers(*shape: int, train: bool = False) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_(train)

    return [
        Projection(
            numbers(4 + i, inside),
            numbers(4 + i, train=True) if bias else None,
            numbers(ranks[i], inside, train=True),
            numbers(4 + i, ranks[i], train=True),
            0.5 + i,
        )
        for i in range(n)
    ]


def plain(x: Tensor, projections: list[Projection], dropped: Dropped | None = None) -> list[Tensor]:
    """By torch's own operations, with the mask multiplied in."""
    seen = x if dropped is None else x * dropped.apply(torch.ones_like(x)) * dropped.gain
    return [F.linear(x, p.weight, p.bias) + p.scale * F.linear(F.linear(seen, p.a), p.b) for p in projections]


def leaves(x: Tensor, projections: list[Projection]) -> list[Tensor]:
    return [t for t in (x, *(t for p in projections for t in (p.bias, p.a, p.b))) if t is not None and t.requires_grad]


def gradients(out: list[Tensor] | tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum((y.double() ** 2).sum() for y in out), inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropped", [None, Dropped(0.4, 7)], ids=["whole", "dropout"])
@pytest.mark.parametrize("n", [1, 3])
def test_gradients_are_those_of_the_function(n: int, dropped: Dropped | None) -> None:
    projections = make(n)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return lora_projections(x, projections, dropped)

    assert torch.autograd.gradcheck(call, leaves(x, projections))


@CALM
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    n=st.integers(1, 3),
    trained=st.booleans(),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.3]),
)
def test_they_equal_the_plain_operations(shape: list[int], n: int, trained: bool, bias: bool, p: float) -> None:
    projections = make(n, bias=bias)
    x = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=trained)
    if p and x.dim() < 2:
        x = x.detach().expand(2, 6).clone().requires_grad_(trained)
    dropped = Dropped(p, 3) if p else None
    found, wanted = lora_projections(x, projections, dropped), plain(x, projections, dropped)
    inputs = leaves(x, projections)
    pairs = [*zip(found, wanted, strict=True), *zip(gradients(found, inputs), gradients(wanted, inputs), strict=True)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_input_that_is_not_contiguous_is_as_good_as_its_copy() -> None:
    projections = make(2)
    x = torch.randn(6, 5, 3, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    found, wanted = lora_projections(x, projections), lora_projections(x.contiguous(), projections)
    inputs = leaves(x, projections)
    for a, b in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_output_that_the_loss_does_not_use_gets_no_gradient_and_disturbs_none() -> None:
    projections = make(3)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    found, wanted = lora_projections(x, projections), plain(x, projections)
    used = [x, projections[1].a, projections[1].b]
    for a, b in zip(gradients(found[1:2], used), gradients(wanted[1:2], used), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_answer_has_the_same_bits_alone_and_beside_others() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        projections = make(3, dtype, inside=64, ranks=(8, 16, 5), bias=False)
        x = torch.randn(9, 64).to(dtype)
        for together, one in zip(lora_projections(x, projections), projections, strict=True):
            assert torch.equal(together, lora_projections(x, [one])[0])


def test_half_precision_is_as_close_to_the_truth_as_the_plain_operations_are() -> None:
    projections = [p._replace(weight=p.weight.bfloat16()) for p in make(2, torch.float32, inside=64, bias=False)]
    x = torch.randn(16, 64).bfloat16().requires_grad_()

    def errors(call: object) -> list[float]:
        out = call()  # type: ignore[operator]
        inputs = leaves(x, projections)
        exact = [Projection(p.weight.double(), None, p.a.double(), p.b.double(), p.scale) for p in projections]
        truth = plain(x.double(), exact)
        wanted = gradients(truth, inputs)
        found = gradients(out, inputs)
        pairs = [*zip(out, truth, strict=True), *zip(found, wanted, strict=True)]
        return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs]

    fused = errors(lambda: lora_projections(x, projections))
    separate = errors(
        lambda: [F.linear(x, p.weight) + lora_linear(x, p.a, p.b, p.scale) for p in projections],
    )
    assert all(a < 1.2 * b + 1e-3 for a, b in zip(fused, separate, strict=True))
    assert all(p.a.grad_fn is None and p.a.dtype is torch.float32 for p in projections)


def test_only_the_input_the_low_rank_products_and_the_factors_are_kept() -> None:
    projections = make(3, torch.float32, inside=64, ranks=(2, 3, 1), bias=False)
    x = torch.randn(128, 64, requires_grad=True)
    kept: dict[int, int] = {}
    weights = {p.weight.data_ptr() for p in projections}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lora_projections(x, projections, Dropped(0.5, 1))
    factors = sum(p.a.numel() + p.b.numel() for p in projections)
    assert sum(kept.values()) == x.numel() + 128 * (2 + 3 + 1) + factors


def test_a_frozen_input_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    projections = make(2, bias=False)
    x = torch.randn(5, 6, dtype=torch.float64)
    out = lora_projections(x, projections)
    products: list[tuple[int, ...]] = []
    plain_mm = torch.mm

    def mm(a: Tensor, b: Tensor) -> Tensor:
        products.append(tuple(b.shape))
        return plain_mm(a, b)

    monkeypatch.setattr(torch, "mm", mm)
    gradients(out, leaves(x, projections))
    assert tuple(projections[0].weight.shape) not in products


def test_a_second_derivative_is_refused_and_not_silently_wrong() -> None:
    projections = make(1)
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    (y,) = lora_projections(x, projections)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad((y**2).sum(), x, create_graph=True)


@CALM
@given(out=st.integers(1, 6), inside=st.integers(1, 9), r=st.integers(1, 4), scale=st.floats(-3, 3), once=st.booleans())
def test_row_norms_are_those_of_the_whole_product(out: int, inside: int, r: int, scale: float, once: bool) -> None:
    draw = torch.Generator().manual_seed(out * 100 + inside * 10 + r)
    weight, a, b = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((out, inside), (r, inside), (out, r))
    )
    squared = weight.square().sum(1) if once else None
    wanted = (weight + scale * b @ a).norm(dim=1)
    torch.testing.assert_close(row_norms(weight, a, b, scale, squared), wanted, rtol=1e-9, atol=1e-7)
    found = row_norms(weight.float(), a.float(), b.float(), scale)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-2)


def test_row_norms_make_no_product_as_large_as_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = torch.mm

    def mm(a: Tensor, b: Tensor) -> Tensor:
        out = plain(a, b)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch, "mm", mm)
    row_norms(torch.randn(50, 40), torch.randn(2, 40), torch.randn(50, 2), 1.0)
    assert max(sizes) == 50 * 2
