"""Which heads share one."""

from __future__ import annotations

from itertools import permutations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.model.surgery.grouping import Groups, contiguous_groups, similar_groups, spread


def points(n: int, seed: int) -> torch.Tensor:
    """Squared distances of n random points."""
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cdist(x, x).square()


def every_partition(n: int, size: int) -> set[Groups]:
    cuts = range(0, n, size)
    return {tuple(sorted(tuple(sorted(order[i : i + size])) for i in cuts)) for order in permutations(range(n))}


@given(seed=st.integers(0, 10_000), size=st.sampled_from([1, 2, 3, 6]))
@settings(max_examples=25, deadline=None)
def test_groups_are_even_and_never_worse_than_neighbours(seed: int, size: int) -> None:
    squared = points(6, seed)
    groups = similar_groups(squared, size)
    assert sorted(head for group in groups for head in group) == list(range(6))
    assert all(len(group) == size and list(group) == sorted(group) for group in groups)
    assert list(groups) == sorted(groups)
    assert spread(squared, groups) <= spread(squared, contiguous_groups(6, size)) + 1e-12


def test_near_the_best_of_all_partitions() -> None:
    partitions = every_partition(6, 2)
    assert len(partitions) == 15
    ratios = []
    for seed in range(40):
        squared = points(6, seed)
        best = min(spread(squared, groups) for groups in partitions)
        ratios.append(spread(squared, similar_groups(squared, 2)) / best)
    assert min(ratios) >= 1 - 1e-12
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 36


def test_heads_that_belong_together_are_found() -> None:
    planted = ((0, 5, 9), (1, 3, 11), (2, 4, 7), (6, 8, 10))
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.empty(12, 8, dtype=torch.float64)
    for centre, group in zip(centres, planted, strict=True):
        x[list(group)] = centre
    noise = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert similar_groups(torch.cdist(x + 0.05 * noise, x + 0.05 * noise).square(), 3) == planted


def test_neighbours_stay_where_nothing_is_gained() -> None:
    assert similar_groups(torch.zeros(8, 8), 4) == contiguous_groups(8, 4) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert similar_groups(points(5, 0), 1) == ((0,), (1,), (2,), (3,), (4,))
