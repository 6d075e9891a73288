"""Promises of intervals: they hold the truth as often as they say, and claim no more than rows and seeds carry."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loraloom.inference.intervals import Difference, SeedNoise, beta_cdf, of_errors, share, t_quantile


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 3, 3.1824463),
        (0.975, 30, 2.0422725),
        (0.995, 200, 2.6006344),
        (0.25, 5, -0.7266868),
    ],
)
def test_students_t_is_that_of_the_tables(probability: float, degrees: float, expected: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "a", "b", "expected"), [(0.3, 2, 5, 0.579825), (0.5, 1, 1, 0.5), (0.9, 0.5, 0.5, 0.7951672)]
)
def test_the_incomplete_beta_function_is_that_of_the_tables(x: float, a: float, b: float, expected: float) -> None:
    assert beta_cdf(x, a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("truth", [0.02, 0.3, 0.5, 0.97])
def test_a_share_of_rows_is_held_at_least_as_often_as_said(rows: int, truth: float) -> None:
    """Exactly, by summing over all that may be drawn."""
    held = [
        math.comb(rows, hits) * truth**hits * (1 - truth) ** (rows - hits)
        for hits in range(rows + 1)
        if share(hits, rows).low <= truth <= share(hits, rows).high
    ]
    assert math.fsum(held) >= 0.95


def difference(
    one: np.ndarray, other: np.ndarray, *, weights: np.ndarray | None = None, noise: SeedNoise | None = None
) -> Difference:
    """How much better ``one`` is than ``other``: goodness [seeds, rows] of the same rows, paired."""
    rows = one.shape[-1]
    weight = np.ones(rows) if weights is None else weights / weights.mean()
    by_row = one.mean(0) - other.mean(0)
    value = float((by_row * weight).mean())
    of_rows = max(float(((by_row - value) * weight).var(ddof=1)) / rows, (value / rows) ** 2)
    of_seeds = None if noise is None else (noise.variance * (1 / len(one) + 1 / len(other)), noise.degrees)
    seeds = 1 if noise is None else min(len(one), len(other))
    return of_errors(value, (of_rows, rows - 1), of_seeds, rows=rows, seeds=seeds)


def drawn(source: np.random.Generator, seeds: int, rows: int, gap: float, seed_noise: float) -> list[np.ndarray]:
    """Goodness [seeds, rows] of two configurations: rows are hard or easy for both, seeds are lucky or not."""
    easy = source.normal(0, 0.3, rows)
    return [
        easy + mean + source.normal(0, seed_noise, (seeds, 1)) + source.normal(0, 0.2, (seeds, rows))
        for mean in (gap, 0.0)
    ]


@pytest.mark.parametrize(("seeds", "seed_noise"), [(3, 0.05), (2, 0.02), (1, 0.0)])
def test_a_difference_holds_the_true_one_in_about_95_of_100(seeds: int, seed_noise: float) -> None:
    source, held = np.random.default_rng(0), []
    for _ in range(400):
        others = [drawn(source, seeds, 200, 0.0, seed_noise) for _ in range(3)]
        one, other = drawn(source, seeds, 200, 0.03, seed_noise)
        noise = SeedNoise.pooled([list(x.mean(1)) for pair in others for x in pair])
        found = difference(one, other, noise=noise)
        held.append(found.low <= 0.03 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.995


def test_rows_that_are_paired_tell_apart_what_unpaired_ones_cannot() -> None:
    one, other = drawn(np.random.default_rng(0), 1, 400, 0.04, 0.0)
    found = difference(one, other)
    assert found.clear
    assert found.seeds == 1
    unpaired = difference(one, other[:, ::-1])
    assert unpaired.high - unpaired.low > 1.5 * (found.high - found.low)


def test_what_cannot_be_told_apart_says_how_many_rows_would_do() -> None:
    one, other = np.zeros((1, 100)), np.zeros((1, 100))
    one[0, :12], other[0, 12:18] = 1, 1  # right on twelve rows where the other is wrong, and wrong on six
    found = difference(one, other)
    assert not found.clear
    assert found.rows_needed is not None
    assert found.rows_needed > 100
    more = [np.tile(x, (1, math.ceil(1.1 * found.rows_needed / 100))) for x in (one, other)]
    assert difference(*more).clear


def test_no_number_of_rows_helps_where_the_seeds_differ_more() -> None:
    one, other = drawn(np.random.default_rng(2), 2, 100, 0.01, 0.0)
    assert difference(one, other, noise=SeedNoise(0.2**2, 4)).rows_needed is None


def test_one_row_more_might_have_gone_the_other_way() -> None:
    """Ten rows that all differ alike leave a width."""
    found = difference(np.ones((1, 10)), np.zeros((1, 10)))
    assert found.high - found.low > 0.1


def test_tokens_weigh_rows() -> None:
    one, other = np.array([[1.0, 0.0, 0.0]]), np.zeros((1, 3))
    assert difference(one, other, weights=np.array([8.0, 1.0, 1.0])).value == pytest.approx(0.8)


def test_seeds_that_were_picked_for_being_good_count_with_the_spread_of_all() -> None:
    picked = [[0.8, 0.8], [0.8, 0.8]]
    assert SeedNoise.pooled(picked) == SeedNoise(0.0, 2)
    assert SeedNoise.pooled(picked, spread=0.03) == SeedNoise(pytest.approx(0.01), 3)
    assert SeedNoise.pooled([[0.8], [0.7]]) is None
