"""Promises of the maths: the fused projections equal the plain ones, and keep no more than they must."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraloom.lora import functional, matmul
from loraloom.lora.dropout import DropoutMask
from loraloom.lora.frozen import DenseLinear
from loraloom.lora.functional import RANK_MULTIPLE, SlotGroup, Update, lora_linear

CALM = settings(max_examples=40, deadline=None)  # two cores are shared: a slow example is no failure


class Projection(NamedTuple):
    """A frozen layer and the one update beside it."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float


def lora_projections(
    x: Tensor, projections: list[Projection], dropout: DropoutMask | None = None
) -> tuple[Tensor, ...]:
    """Of one slot, which has all rows."""
    group = SlotGroup(0, None, (dropout,), tuple((Update(p.a, p.b, p.scale),) for p in projections))
    return functional.lora_projections(x, [DenseLinear(p.weight, p.bias) for p in projections], [group])


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


def plain(x: Tensor, projections: list[Projection], dropout: DropoutMask | None = None) -> list[Tensor]:
    """By torch's own operations, with the mask multiplied in."""
    seen = x if dropout is None else x * dropout.apply(torch.ones_like(x)) * dropout.gain
    return [F.linear(x, p.weight, p.bias) + p.scale * F.linear(F.linear(seen, p.a), p.b) for p in projections]


def leaves(x: Tensor, projections: list[Projection]) -> list[Tensor]:
    return [t for t in (x, *(t for p in projections for t in (p.bias, p.a, p.b))) if t is not None and t.requires_grad]


def gradients(out: list[Tensor] | tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum((y.double() ** 2).sum() for y in out), inputs)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [None, DropoutMask(0.4, 7)], ids=["whole", "dropout"])
@pytest.mark.parametrize("n", [1, 3])
def test_gradients_are_those_of_the_function(n: int, dropout: DropoutMask | None) -> None:
    projections = make(n)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return lora_projections(x, projections, dropout)

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
    dropout = DropoutMask(p, 3) if p else None
    found, wanted = lora_projections(x, projections, dropout), plain(x, projections, dropout)
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


@pytest.mark.parametrize("native", [True, False], ids=["in half precision", "in float32"])
def test_half_precision_is_as_close_to_the_truth_as_the_plain_operations_are(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over many draws: of one, with its dozens of numbers, either way may come out nearer by chance."""
    monkeypatch.setattr(matmul, "native", lambda *_: native)
    draw = torch.Generator().manual_seed(0)

    def errors(found: tuple[Tensor, ...] | list[Tensor], x: Tensor, projections: list[Projection]) -> Tensor:
        """Squared, relative to the truth; of the outputs, then of the gradients: [n]."""
        exact = [Projection(p.weight.double(), None, p.a.double(), p.b.double(), p.scale) for p in projections]
        truth, inputs = plain(x.double(), exact), leaves(x, projections)
        pairs = [
            *zip(found, truth, strict=True),
            *zip(gradients(found, inputs), gradients(truth, inputs), strict=True),
        ]
        with torch.no_grad():
            return torch.stack([((a - b).norm() / b.norm()) ** 2 for a, b in pairs])

    fused, separate = [], []
    for _ in range(50):
        projections = [
            p._replace(weight=p.weight.bfloat16(), a=p.a.detach() + 0, b=p.b.detach() + 0)
            for p in make(2, torch.float32, inside=64, bias=False)
        ]
        for p in projections:
            p.a.normal_(generator=draw).requires_grad_()
            p.b.normal_(generator=draw).requires_grad_()
        x = torch.randn(16, 64, generator=draw).bfloat16().requires_grad_()
        fused.append(errors(lora_projections(x, projections), x, projections))
        plainly = [F.linear(x, p.weight) + lora_linear(x, p.a, p.b, p.scale) for p in projections]
        separate.append(errors(plainly, x, projections))
        assert all(p.a.grad_fn is None and p.a.dtype is torch.float32 for p in projections)
    ratio = (torch.stack(fused).mean(0) / torch.stack(separate).mean(0)).sqrt()
    assert (ratio < 1.1).all(), ratio


def test_a_processor_without_half_precision_draws_the_same_dropout_and_keeps_the_input_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matmul, "native", lambda *_: False)
    ps = [p._replace(weight=p.weight.bfloat16()) for p in make(2, torch.float32, inside=64, bias=False)]
    x = torch.randn(16, 64).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        found = lora_projections(x, ps, DropoutMask(0.5, 3))
    exact = [Projection(p.weight.double(), None, p.a.double(), p.b.double(), p.scale) for p in ps]
    wide = x.detach().double().requires_grad_()
    wanted = plain(wide, exact, DropoutMask(0.5, 3))
    assert sum(t.dtype is torch.bfloat16 and t.numel() == x.numel() for t in kept) == 1
    assert not any(t.dtype is torch.float32 and t.numel() == x.numel() for t in kept)
    (d_x,), (d_wanted,) = gradients(found, [x]), gradients(wanted, [wide])
    for a, b in [*zip(found, wanted, strict=True), (d_x, d_wanted)]:
        assert a.dtype is torch.bfloat16
        assert float((a.detach().double() - b).norm() / b.norm()) < 2**-7


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
        lora_projections(x, projections, DropoutMask(0.5, 1))
    ranks = 3 * RANK_MULTIPLE  # filled up with zeros
    assert sum(kept.values()) == x.numel() + 128 * ranks + ranks * 64 + RANK_MULTIPLE * (4 + 5 + 6)


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
@given(
    slots=st.lists(
        st.tuples(
            st.tuples(st.sampled_from([0, 1, 3, 16, 20]), st.sampled_from([0, 1, 3, 16])).filter(any),
            st.sampled_from([None, 0.25, 0.5]),
        ),
        min_size=1,
        max_size=4,
    ),
    rows=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_slots_side_by_side_are_as_each_alone(
    slots: list[tuple[tuple[int, int], float | None]], rows: int, seed: int
) -> None:
    """Ranks of any kind, 0 where a slot leaves a projection alone; the outputs and all gradients."""
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape: int, train: bool = True) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_(train)

    x = numbers(rows * len(slots) + 1, 3, 6)  # the last row is nobody's
    frozen = [DenseLinear(numbers(4 + i, 6, train=False), None) for i in range(2)]
    updates = [
        [None if r == 0 else Update(numbers(r, 6), numbers(4 + i, r), 0.5 + i + k) for i, r in enumerate(ranks)]
        for k, (ranks, _) in enumerate(slots)
    ]
    dropout = [None if p is None else DropoutMask(p, seed + k) for k, (_, p) in enumerate(slots)]
    groups: list[SlotGroup] = []
    for k, mine in enumerate(updates):
        before = groups[-1] if groups else None
        if before and [bool(u) for u in before.updates] == [u is not None for u in mine]:
            both = tuple((*u, one) if one else () for u, one in zip(before.updates, mine, strict=True))
            groups[-1] = SlotGroup(before.start, (k + 1) * rows, (*before.dropout, dropout[k]), both)
        else:
            groups.append(
                SlotGroup(k * rows, (k + 1) * rows, (dropout[k],), tuple((one,) if one else () for one in mine))
            )

    found = functional.lora_projections(x, frozen, groups)
    wanted = []
    for i, layer in enumerate(frozen):
        parts = [F.linear(x, layer.weight)]
        for k, mine in enumerate(updates):
            part, update, drop = x[k * rows : (k + 1) * rows], mine[i], dropout[k]
            if update is not None:
                if drop is not None:
                    part = part * drop.apply(torch.ones_like(part)) * drop.gain
                y = update.scale * F.linear(F.linear(part, update.a), update.b)
                parts.append(F.pad(y, (0, 0, 0, 0, k * rows, x.shape[0] - (k + 1) * rows)))
        wanted.append(torch.stack(parts).sum(0))
    torch.testing.assert_close(list(found), wanted, rtol=1e-12, atol=1e-12)
    inputs = [x, *(t for mine in updates for one in mine if one for t in (one.a, one.b))]
    torch.testing.assert_close(gradients(found, inputs), gradients(wanted, inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["whole", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_has_the_same_bits_alone_and_beside_others_that_are_no_numbers(dtype: torch.dtype, p: float) -> None:
    """Rows never mix: neighbours of any rank, of NaN and infinity, change no bit of a slot's outputs and gradients."""
    torch.manual_seed(0)
    weight = torch.randn(64, 96).to(dtype)
    ranks, bad = (4, 40, 16, 8), {1: torch.nan, 2: torch.inf}
    a = [torch.full((r, 96), bad[i]) if i in bad else torch.randn(r, 96) / 9 for i, r in enumerate(ranks)]
    b = [torch.randn(64, r) for r in ranks]
    dropout = [DropoutMask(p * (i + 1), i) if p else None for i in range(4)]
    x = torch.randn(4 * 2, 16, 96).to(dtype)

    def run(slots: list[int]) -> list[Tensor]:
        updates = [Update(a[i].clone().requires_grad_(), b[i].clone().requires_grad_(), 0.7 + i) for i in slots]
        rows = torch.cat([x[2 * i : 2 * i + 2] for i in slots]).requires_grad_()
        group = SlotGroup(0, len(rows), tuple(dropout[i] for i in slots), (tuple(updates),))
        (y,) = functional.lora_projections(rows, [DenseLinear(weight, None)], [group])
        y.float().square().sum().backward()
        assert rows.grad is not None
        found = [
            (y[2 * k : 2 * k + 2], rows.grad[2 * k : 2 * k + 2], u.a.grad, u.b.grad) for k, u in enumerate(updates)
        ]
        return [t for k, i in enumerate(slots) if i in (0, 3) for t in found[k] if t is not None]

    together = run([0, 1, 2, 3])
    for one, other in zip(together, [*run([0]), *run([3])], strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
