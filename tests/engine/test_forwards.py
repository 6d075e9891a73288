"""Promises of the division of a step into forwards: the cheapest there is, and each adapter in exactly one."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loraloom.engine.forwards import divide, fixed_cost

Sizes = dict[str, tuple[int, int]]


def cost(groups: list[list[str]], sizes: Sizes, fixed: float) -> float:
    places = (sum(sizes[n][0] for n in group) * max(sizes[n][1] for n in group) for group in groups)
    return fixed * len(groups) + sum(places)


def partitions(names: list[str]) -> list[list[list[str]]]:
    if not names:
        return [[]]
    first, *rest = names
    found = []
    for one in partitions(rest):
        found.append([[first], *one])
        found += [[*one[:i], [first, *one[i]], *one[i + 1 :]] for i in range(len(one))]
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 16), st.sampled_from([16, 32, 48, 128])), min_size=1, max_size=6),
    st.sampled_from([0.0, 40.0, 400.0, 1e9]),
)
def test_no_other_division_costs_less_and_each_adapter_has_one_forward(
    extents: list[tuple[int, int]], fixed: float
) -> None:
    sizes = {f"a{number}": extent for number, extent in enumerate(extents)}
    groups = divide(list(sizes), sizes, fixed)
    assert sorted(name for group in groups for name in group) == sorted(sizes)
    assert all(group == sorted(group) for group in groups)
    assert cost(groups, sizes, fixed) <= min(cost(other, sizes, fixed) for other in partitions(list(sizes))) + 1e-6


def test_a_forward_costs_more_places_in_a_smaller_model() -> None:
    models = [nn.Sequential(nn.Embedding(999, 8), nn.Linear(width, width)) for width in (16, 64, 1024)]
    costs = [fixed_cost(model.requires_grad_(False), layers=1) for model in models]
    assert all(more > less > 0 for more, less in pairwise(costs))
    models[0][0].weight = nn.Parameter(torch.zeros(5, 8), requires_grad=False)
    assert fixed_cost(models[0], layers=1) == costs[0]  # looking up rows is no product
