"""Promises of intervals: they hold the truth as often as they say, and claim no more than rows and seeds carry."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.inference.intervals import Difference, SeedNoise, Seeds, beta_cdf, compare, share, t_quantile
from loraloom.inference.jackknife import divide


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


def figures(goodness: np.ndarray, weights: np.ndarray | None = None) -> Seeds:
    """Goodness [seeds, rows] → of each seed the mean over all rows, then without each part of them."""
    parts = divide(range(goodness.shape[-1]))
    kept = np.ones((1 + len(parts), goodness.shape[-1])) * (1.0 if weights is None else weights)
    for place, part in enumerate(parts, 1):
        kept[place, part] = 0.0
    found: Seeds = (goodness @ (kept / kept.sum(1, keepdims=True)).T).tolist()
    return found


def difference(
    one: np.ndarray, other: np.ndarray, *, weights: np.ndarray | None = None, noise: SeedNoise | None = None
) -> Difference:
    """How much better ``one`` is than ``other``: goodness [seeds, rows] of the same rows."""
    return compare(figures(one, weights), figures(other, weights), noise, rows=one.shape[-1])


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
    more = [np.tile(x, (1, math.ceil(1.5 * found.rows_needed / 100))) for x in (one, other)]
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
    assert SeedNoise.pooled(picked, spread=0.03, weight=0.5) == SeedNoise(pytest.approx(0.006), 2.5)


VALUES = st.lists(st.floats(-10, 10), min_size=6, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=3), st.lists(VALUES, min_size=1, max_size=3), st.floats(0, 1))
def test_who_is_compared_with_whom_turns_the_difference_round(mine: Seeds, its: Seeds, variance: float) -> None:
    noise = SeedNoise(variance, 3)
    forth, back = compare(mine, its, noise, rows=50), compare(its, mine, noise, rows=50)
    lower = compare(mine, its, noise, rows=50, greater_is_better=False)
    for other in (back, lower):
        found = other.value, other.low, other.high
        assert found == pytest.approx((-forth.value, -forth.high, -forth.low), rel=1e-9, abs=1e-9)
        assert (other.rows_needed, other.seeds, other.clear) == (forth.rows_needed, forth.seeds, forth.clear)


@settings(max_examples=60, deadline=None)
@given(VALUES, VALUES, st.floats(-5, 5), st.floats(0.1, 10))
def test_the_unit_of_a_metric_does_not_matter(mine: list[float], its: list[float], shift: float, scale: float) -> None:
    plain = compare([mine], [its], rows=50)
    other = compare([[scale * (x + shift) for x in mine]], [[scale * (x + shift) for x in its]], rows=50)
    assert (other.value, other.low, other.high) == pytest.approx(
        (scale * plain.value, scale * plain.low, scale * plain.high), rel=1e-6, abs=1e-6
    )


def test_with_one_seed_nothing_is_claimed_of_configurations() -> None:
    one, two, noise = [[0.8] * 21], [[0.7] * 21] * 2, SeedNoise(0.1**2, 4)
    assert compare(one, two, noise, rows=100).seeds == compare(two, one, noise, rows=100).seeds == 1
    assert compare(two, two, None, rows=100).seeds == 1
    about, alone = compare(two, two, noise, rows=100), compare(two, one, noise, rows=100)
    assert about.seeds == 2
    assert about.high - about.low > 2 * (alone.high - alone.low)


@pytest.mark.parametrize("rows", [20, 100, 400])
def test_shares_that_agree_on_all_rows_may_still_differ(rows: int) -> None:
    """Of a share that no row showed, the exact limit is 3.7 over the rows (Clopper and Pearson 1934)."""
    same = [[1.0] * 21]
    found = compare(same, same, rows=rows, unit=1.0)
    assert (found.value, found.clear) == (0.0, False)
    assert found.high == pytest.approx(2.09 / rows, rel=0.01)


@pytest.mark.parametrize("kind", ["rows", "documents", "perplexity"])
def test_the_jackknife_holds_a_difference_of_any_metric(kind: str) -> None:
    """Macro F1 of rows, accuracy of documents of several examples, and perplexity: 300 draws of 200 rows each."""
    source, held = np.random.default_rng(0), []
    draw, metric = {"rows": (classes, f1), "documents": (documents, ratio), "perplexity": (losses, perplexity)}[kind]
    whole = draw(source, 200_000).sum(0)
    truth = metric(whole[0]) - metric(whole[1])
    for _ in range(300):
        counts = draw(source, 200)
        kept = [counts.sum(0), *(counts.sum(0) - counts[part].sum(0) for part in divide(range(200)))]
        one, other = ([[metric(total[place]) for total in kept]] for place in (0, 1))
        found = compare(one, other, rows=200)
        held.append(found.low <= truth <= found.high)
    assert 0.91 <= np.mean(held) <= 0.99


def classes(source: np.random.Generator, rows: int) -> np.ndarray:
    """[row, model, class, (hit, false alarm, miss)] of two models that find the same rows hard."""
    right, hard = source.choice(3, rows, p=[0.7, 0.2, 0.1]), source.normal(0, 1, rows)
    counts = np.zeros((rows, 2, 3, 3))
    for model, skill in enumerate((1.2, 1.0)):
        said = np.where(hard + source.normal(0, 0.5, rows) < skill - 0.3 * right, right, (right + 1) % 3)
        for name in range(3):
            yes, true = said == name, right == name
            counts[:, model, name] = np.stack([yes & true, yes & ~true, ~yes & true], 1)
    return counts


def documents(source: np.random.Generator, rows: int) -> np.ndarray:
    """[document, model, (right, examples)]: one to eight examples each, easy or hard together."""
    size, easy = source.integers(1, 9, rows), source.normal(0, 1, rows)
    counts = np.zeros((rows, 2, 2))
    for model, skill in enumerate((0.9, 0.6)):
        counts[:, model, 0] = source.binomial(size, 1 / (1 + np.exp(-skill - easy - source.normal(0, 0.3, rows))))
        counts[:, model, 1] = size
    return counts


def losses(source: np.random.Generator, rows: int) -> np.ndarray:
    """[row, model, (sum of losses, tokens)]: lengths and losses with long tails."""
    tokens, hard = np.ceil(np.exp(source.normal(3, 1, rows))), np.exp(source.normal(1, 0.4, rows))
    each = [hard * factor + source.normal(0, 0.15, rows) for factor in (1.0, 1.05)]
    return np.stack([np.stack([one * tokens, tokens], 1) for one in each], 1)


def f1(counts: np.ndarray) -> float:
    hit, alarm, miss = counts.T
    return float((2 * hit / np.maximum(2 * hit + alarm + miss, 1)).mean())


def ratio(counts: np.ndarray) -> float:
    return float(counts[0] / counts[1])


def perplexity(counts: np.ndarray) -> float:
    return math.exp(ratio(counts))
