"""Promises of the dropout mask: as many zeros as asked for, independent, and the same whenever it is made again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.lora.dropout import DropoutMask, dropout

CALM = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 2**63 - 1)


def kept(p: float, seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return DropoutMask(p, seed).apply(torch.ones(shape, dtype=dtype)) != 0


@CALM
@given(p=st.floats(0.001, 0.999), seed=SEEDS)
def test_a_share_p_is_dropped_and_the_mean_stays(p: float, seed: int) -> None:
    dropped = DropoutMask(p, seed)
    mask = kept(p, seed, 64, 1000).double()
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(float(1 - mask.mean()) - p) < 6 * deviation + 2**-15
    # Exact on average: the gain is that of the probability that is really used.
    exact = 1 - 1 / dropped.gain
    assert abs(float(1 - mask.mean()) - exact) < 6 * deviation
    # Neither rows nor columns are favoured; where a column has a handful of zeros no bound would be tight.
    for mean, n in ((mask.mean(0), 64), (mask.mean(1), 1000)):
        assert float((mean - 1 / dropped.gain).abs().max()) < 7 * (p * (1 - p) / n) ** 0.5 + 4 / n


@CALM
@given(seed=SEEDS, rows=st.integers(1, 5), width=st.integers(1, 9), more=st.integers(0, 7))
def test_neither_more_rows_nor_longer_rows_change_what_is_there(seed: int, rows: int, width: int, more: int) -> None:
    small = kept(0.5, seed, rows, width)
    assert torch.equal(kept(0.5, seed, rows + more, width)[:rows], small)
    assert torch.equal(kept(0.5, seed, rows, width + more)[:, :width], small)
    # Padding lengthens the second dimension of three.
    long = kept(0.5, seed, rows, 3 + more, width)
    assert torch.equal(long[:, :3], kept(0.5, seed, rows, 3, width))


def test_the_mask_is_the_same_in_every_dtype_and_whenever_it_is_made() -> None:
    masks = [kept(0.3, 11, 5, 33, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert torch.equal(kept(0.3, 11, 5, 33), masks[0])


@pytest.mark.parametrize("other", [12, 11 + 2**32, 11 + 2**40])
def test_other_seeds_give_masks_that_have_nothing_to_do_with_each_other(other: int) -> None:
    a, b = (kept(0.5, seed, 100, 1000).double() - 0.5 for seed in (11, other))
    assert abs(float((a * b).mean())) < 6 * 0.25 / 100_000**0.5
    shifted = (a[1:] * b[:-1]).mean()
    assert abs(float(shifted)) < 6 * 0.25 / 99_000**0.5


def test_neighbours_are_independent() -> None:
    mask = kept(0.5, 3, 300, 1000).double() - 0.5
    for pairs in (mask[:, 1:] * mask[:, :-1], mask[1:] * mask[:-1], mask[:, 2:] * mask[:, :-2]):
        assert abs(float(pairs.mean())) < 6 * 0.25 / pairs.numel() ** 0.5


def test_what_is_left_is_untouched_and_a_dropped_nan_is_zero() -> None:
    x = torch.randn(7, 9, dtype=torch.float64)
    x[:, 0] = torch.nan
    out = DropoutMask(0.5, 5).apply(x)
    mask = kept(0.5, 5, 7, 9, dtype=torch.float64)
    assert torch.equal(out[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))
    torch.testing.assert_close(out[mask], x[mask], rtol=0, atol=0, equal_nan=True)


def test_the_gradient_goes_where_the_numbers_went() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    dropped = DropoutMask(0.4, 9)
    assert torch.autograd.gradcheck(lambda x: dropout(x, dropped), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, dropped).pow(3), x)


def test_an_input_that_is_not_contiguous_or_empty_is_no_matter() -> None:
    x = torch.randn(6, 5).T
    assert torch.equal(DropoutMask(0.5, 1).apply(x), DropoutMask(0.5, 1).apply(x.contiguous()))
    assert DropoutMask(0.5, 1).apply(torch.empty(0, 4)).shape == (0, 4)
    assert DropoutMask(0.5, 1).apply(torch.empty(3, 0)).shape == (3, 0)
