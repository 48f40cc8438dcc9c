"""An attention's weights head by head, and what may be done to them: reorder, turn, share.

Legend: H query heads, G key/value heads, N those that come to share one, K head dim, P and M its blocks and their
dimensions (`alignment`), D model width, C the same and one more where there is a bias: a column for an input that is
always 1. X, Y widths of whatever stands there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .alignment import Freedom, Pooling, align, distances, from_blocks, gram, low_rank, to_blocks
from .grouping import Groups, similar_groups

Init = Literal["mean", "first", "random", "aligned", "svd"]


@dataclass(frozen=True, slots=True)
class Branch:
    """One set of projections of an attention: the layer's own, or those of global tokens.

    moment_CC   second moment of the inputs of k and v, E[x x^T]; None: as if they were white
    asking_CC   the same of the inputs of q
    """

    q_HKC: Tensor
    k_GKC: Tensor
    v_GKC: Tensor
    moment_CC: Tensor | None = None
    asking_CC: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """The weights of one attention in fp64.

    branches  all read out through one output projection, so all have the same heads in the same order
    out_HKD   the output projection, transposed; its bias belongs to no head
    sinks_H   learned sink logits; None where no head has one
    """

    branches: tuple[Branch, ...]
    out_HKD: Tensor
    sinks_H: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.branches[0].k_GKC.shape[0]


@dataclass(frozen=True, slots=True)
class Lost:
    """What sharing leaves out of keys and of values: squared size of the differences between each head and what stands
    for it, in that of all heads. 0: nothing; 1: as much as zeros would."""

    keys: float
    values: float


def reordered(heads: Heads, order: Sequence[int]) -> Heads:
    """Key/value heads in another order, and what belongs to their query heads with them: the same function, as long as
    each query head keeps its mask and its slope."""
    index_G = torch.tensor(order)
    shared = heads.out_HKD.shape[0] // heads.kv_heads
    index_H = (index_G[:, None] * shared + torch.arange(shared)).flatten()
    branches = tuple(
        replace(branch, q_HKC=branch.q_HKC[index_H], k_GKC=branch.k_GKC[index_G], v_GKC=branch.v_GKC[index_G])
        for branch in heads.branches
    )
    sinks_H = None if heads.sinks_H is None else heads.sinks_H[index_H]
    return Heads(branches, heads.out_HKD[index_H], sinks_H)


def find_groups(heads: Heads, size: int, *, runs: Sequence[int], init: Init, freedom: Freedom, normed: bool) -> Groups:
    """Groups of `size` key/value heads that are similar, none of them across the `runs` of heads, in order, that have
    an attention pattern each. Keys and values of every branch count alike; for inits that turn heads before they pool
    them, what counts is how near heads come when turned."""
    total_GG = torch.zeros(heads.kv_heads, heads.kv_heads, dtype=torch.float64)
    turned = init in ("aligned", "svd")
    sites: list[tuple[Tensor, bool]] = []
    for branch in heads.branches:
        k_GKC = _balanced(branch.k_GKC) if normed else branch.k_GKC
        sites.append((gram(to_blocks(k_GKC, freedom), branch.moment_CC), turned and freedom != "none"))
    sites.append((_gram_of([(branch.v_GKC, branch.moment_CC) for branch in heads.branches], "all"), turned))
    for gram_PGMGM, with_turns in sites:
        squared_GG = distances(gram_PGMGM, turned=with_turns)
        size_of_all = torch.einsum("pgmgm->", gram_PGMGM).real
        total_GG += squared_GG / size_of_all if size_of_all > 0 else 0.0
    groups: list[tuple[int, ...]] = []
    first = 0
    for run in runs:
        of_run = similar_groups(total_GG[first : first + run, first : first + run], size)
        groups += [tuple(first + head for head in group) for group in of_run]
        first += run
    return tuple(groups)


def shared(heads: Heads, size: int, *, init: Init, freedom: Freedom, normed: bool) -> tuple[Heads, Lost]:
    """Each run of `size` key/value heads made one by `init`; what read them, turned with them.

    freedom  of keys (`alignment`); values and the output projection are always free
    normed   keys are normalised after the projection: only their directions count, and no turn passes
    """
    branches: list[Branch] = []
    lost = whole = 0.0
    for branch in heads.branches:
        k_GKC = _balanced(branch.k_GKC) if normed else branch.k_GKC
        (k_GKC,), q_HKC, of_keys = _share(
            [(k_GKC, branch.moment_CC)],
            branch.q_HKC,
            branch.asking_CC,
            size,
            init="mean" if freedom == "none" and init != "first" else init,
            freedom=freedom,
        )
        lost, whole = lost + of_keys[0], whole + of_keys[1]
        branches.append(replace(branch, q_HKC=q_HKC, k_GKC=k_GKC))
    values, out_HKD, of_values = _share(
        [(branch.v_GKC, branch.moment_CC) for branch in heads.branches],
        heads.out_HKD,
        None,
        size,
        init=init,
        freedom="all",
    )
    branches = [replace(branch, v_GKC=v_GKC) for branch, v_GKC in zip(branches, values, strict=True)]
    return (
        Heads(tuple(branches), out_HKD, heads.sinks_H),
        Lost(keys=lost / whole if whole else 0.0, values=of_values[0] / of_values[1] if of_values[1] else 0.0),
    )


def turned(heads_NKX: Tensor, turn_NPMM: Tensor, freedom: Freedom) -> Tensor:
    """turn^H @ head, of the heads and of what reads them alike."""
    blocks_NPMX = to_blocks(heads_NKX, freedom)
    return from_blocks(turn_NPMM.mH @ blocks_NPMX)


Sources = Sequence[tuple[Tensor, Tensor | None]]  # heads [G, K, C] and the second moment of their inputs


def _share(
    sources: Sources, readers_HKX: Tensor, asking_XX: Tensor | None, size: int, *, init: Init, freedom: Freedom
) -> tuple[list[Tensor], Tensor, tuple[float, float]]:
    """Sources of a group made one together, under the same turns; the readers turned; (what is lost, of how much)."""
    n_heads = sources[0][0].shape[0]
    each = readers_HKX.shape[0] // n_heads
    pooled: list[list[Tensor]] = [[] for _ in sources]
    readers: list[Tensor] = []
    lost = whole = 0.0
    for first in range(0, n_heads, size):
        group = [(heads_GKC[first : first + size], moment) for heads_GKC, moment in sources]
        reading_RKX = readers_HKX[first * each : (first + size) * each]
        pooling = None
        if init == "aligned":
            pooling = align(_gram_of(group, freedom))
        elif init == "svd":
            asking_NPMM = _asked(reading_RKX, asking_XX, freedom, each)
            pooling = low_rank(_gram_of(group, freedom), asking_NPMM.transpose(0, 1))
        for place, (heads_NKC, moment) in enumerate(group):
            one_KC, stand_ins_NKC = _pooled(heads_NKC, init, pooling, freedom)
            pooled[place].append(one_KC)
            lost += _size(heads_NKC - stand_ins_NKC, moment)
            whole += _size(heads_NKC, moment)
        if pooling is not None:
            reading_RKX = turned(reading_RKX, pooling.turn_NPMM.repeat_interleave(each, dim=0), freedom)
        readers.append(reading_RKX)
    return [torch.stack(heads) for heads in pooled], torch.cat(readers), (lost, whole)


def _pooled(heads_NKC: Tensor, init: Init, pooling: Pooling | None, freedom: Freedom) -> tuple[Tensor, Tensor]:
    """The one head, [K, C], and what stands for each of the others through it."""
    if pooling is None:
        one_KC = heads_NKC[0] if init == "first" else heads_NKC.mean(dim=0)
        return one_KC, one_KC.expand_as(heads_NKC)
    one_PMC = (pooling.into_NPMM @ to_blocks(heads_NKC, freedom)).sum(dim=0)
    return from_blocks(one_PMC[None])[0], from_blocks(pooling.turn_NPMM @ one_PMC)


def _gram_of(sources: Sources, freedom: Freedom) -> Tensor:
    """Inner products of heads whose inputs stand side by side."""
    first, *others = [gram(to_blocks(heads_GKC, freedom), moment) for heads_GKC, moment in sources]
    for other in others:
        first = first + other
    return first


def _asked(readers_HKX: Tensor, asking_XX: Tensor | None, freedom: Freedom, each: int) -> Tensor:
    """How large the readers of each head are in each of its directions, [N, P, M, M]."""
    blocks_HPMX = to_blocks(readers_HKX, freedom)
    metric = blocks_HPMX if asking_XX is None else blocks_HPMX @ asking_XX.to(blocks_HPMX.dtype)
    return (metric @ blocks_HPMX.mH).unflatten(0, (-1, each)).sum(dim=1)


def _balanced(heads_GKC: Tensor) -> Tensor:
    """All heads of one size, their mean: where keys are normalised later, only directions count."""
    sizes_G = heads_GKC.flatten(1).norm(dim=1)
    return heads_GKC * (sizes_G.mean() / sizes_G.clamp(min=torch.finfo(sizes_G.dtype).tiny))[:, None, None]


def _size(heads_NKC: Tensor, moment_CC: Tensor | None) -> float:
    metric = heads_NKC if moment_CC is None else heads_NKC @ moment_CC
    return float((metric * heads_NKC).sum())
