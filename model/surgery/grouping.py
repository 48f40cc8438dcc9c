"""Which heads share one: groups of one size in which heads differ as little as can be.

Legend: N heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

Groups = tuple[tuple[int, ...], ...]


def contiguous_groups(n_heads: int, size: int) -> Groups:
    """(0 … size-1), (size … 2 size-1), … (Ainslie et al. 2023, arXiv 2305.13245, §2.2)."""
    return tuple(tuple(range(first, first + size)) for first in range(0, n_heads, size))


def similar_groups(squared_NN: Tensor, size: int) -> Groups:
    """Groups of `size` heads with a small sum of squared distances inside them, which is `size` times what a mean over
    each group leaves out.

    Exchanges of two heads between groups, the best one first, until none helps; from contiguous groups and from groups
    gathered greedily, of which the better end is taken. So the result is never worse than contiguous groups, and no
    promise that it is the best. Groups are in the order of their first heads, heads in their own.
    """
    squared_NN = squared_NN.double()
    n = squared_NN.shape[0]
    starts = (contiguous_groups(n, size), _gathered(squared_NN, size))
    ends = [_improved(squared_NN, start) for start in starts]
    best = min(ends, key=lambda groups: spread(squared_NN, groups))  # the first of equals
    return tuple(sorted(tuple(sorted(group)) for group in best))


def spread(squared_NN: Tensor, groups: Groups) -> float:
    """The sum of squared distances of all pairs that share a group."""
    return sum(float(squared_NN[list(group)][:, list(group)].sum()) / 2 for group in groups)


def _gathered(squared_NN: Tensor, size: int) -> Groups:
    """Each group begins with the free head that is farthest from the others that are free, and takes the nearest."""
    free, groups = list(range(squared_NN.shape[0])), []
    while free:
        among = squared_NN[free][:, free]
        group = [free.pop(int(among.sum(dim=1).argmax()))]
        while len(group) < size:
            group.append(free.pop(int(squared_NN[group][:, free].sum(dim=0).argmin())))
        groups.append(tuple(group))
    return tuple(groups)


def _improved(squared_NN: Tensor, groups: Groups) -> Groups:
    n = squared_NN.shape[0]
    member_of = torch.empty(n, dtype=torch.int64)
    for index, group in enumerate(groups):
        member_of[list(group)] = index
    enough = 1e-12 * float(squared_NN.sum())
    while True:
        belongs_NG = torch.nn.functional.one_hot(member_of, len(groups)).double()
        to_group_NG = squared_NN @ belongs_NG  # of each head to all heads of each group
        own_N = (to_group_NG * belongs_NG).sum(dim=1)
        theirs_NN = to_group_NG[:, member_of]  # of head i to the group of head j
        change_NN = theirs_NN + theirs_NN.T - own_N[:, None] - own_N[None] - 2 * squared_NN
        change_NN[member_of[:, None] == member_of[None]] = 0.0
        best = int(change_NN.argmin())
        i, j = divmod(best, n)
        if float(change_NN[i, j]) >= -enough:
            break
        member_of[i], member_of[j] = int(member_of[j]), int(member_of[i])
    return tuple(tuple((member_of == index).nonzero().flatten().tolist()) for index in range(len(groups)))
