"""What lets several heads share one: transforms of their coordinates that the rest of the layer can undo.

Attention reads keys through queries and values through the output projection. Where keys are k = W x and queries q, any
invertible A gives the same scores with keys A^-1 W and queries A^H q; likewise values under the output projection. So
heads may be turned towards each other before they are averaged, and nothing but the averaging changes the model. Which
A there are is what position encoding leaves: with rotary positions keys are rotated after their projection, and only
what commutes with that rotation passes, which is a complex number for each plane that is rotated; without them, any.

Coordinates are therefore kept in blocks: with `freedom="all"` one block of all K real dimensions; with "planes" K / 2
blocks of one complex dimension, the pair (i, i + K/2) that `model.positions.rotate` turns. The arithmetic is the same.

Everything here needs the heads' inner products alone, `gram`: under the second moment of the inputs, if it is known,
they are those of what the heads compute, not only of their weights.

Legend: N heads, P blocks, M dimensions of a block, K = P * M (2 * P, complex) dimensions of a head, C inputs (the
model's width, and one more that is always 1 where there is a bias).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Freedom = Literal["all", "planes", "none"]

_ROUNDS, _SETTLED = 100, 1e-10


@dataclass(frozen=True, slots=True)
class Pooling:
    """How heads become one: shared = sum over heads of into @ head, and head ≈ turn @ shared. What read the head reads
    the shared one once it is multiplied by turn^H.

    into_NPMM, turn_NPMM   one matrix for each head and block
    """

    into_NPMM: Tensor
    turn_NPMM: Tensor


def to_blocks(heads_NKC: Tensor, freedom: Freedom) -> Tensor:
    """[N, P, M, C], complex for planes."""
    if freedom != "planes":
        return heads_NKC[:, None]
    first, second = heads_NKC.chunk(2, dim=1)
    return torch.complex(first, second)[:, :, None]


def from_blocks(blocks_NPMC: Tensor) -> Tensor:
    """[N, K, C], `to_blocks` backwards."""
    if not blocks_NPMC.is_complex():
        return blocks_NPMC.squeeze(1)
    planes_NPC = blocks_NPMC.squeeze(2)
    return torch.cat([planes_NPC.real, planes_NPC.imag], dim=1)


def gram(blocks_NPMC: Tensor, moment_CC: Tensor | None = None) -> Tensor:
    """Inner products of all heads' dimensions in each block, [P, N, M, N, M]; under the inputs' second moment E[x x^T]
    if it is given, else as if inputs were white."""
    n, _, m, _ = blocks_NPMC.shape
    rows_PRC = blocks_NPMC.transpose(0, 1).flatten(1, 2)
    metric = rows_PRC if moment_CC is None else rows_PRC @ moment_CC.to(rows_PRC.dtype)
    return (metric @ rows_PRC.mH).unflatten(2, (n, m)).unflatten(1, (n, m))


def align(gram_PNMNM: Tensor) -> Pooling:
    """Orthogonal (unitary) turns under which the heads are closest to their mean: the minimum over turns A_j of
    sum_j ||W_j - A_j S||^2, S = mean_j A_j^H W_j. Generalised Procrustes analysis (Gower 1975, Psychometrika 40; the
    single step is Schönemann 1966, Psychometrika 31): each head in turn is rotated onto the mean of all, from the turns
    that the best low-rank basis suggests, until that no longer helps.

    Of all rotations of S, which are equally good, the one that keeps the heads' own coordinates best is taken.
    """
    p, n, m = gram_PNMNM.shape[:3]
    gram_PNNMM = gram_PNMNM.transpose(2, 3)
    turn_PNMM = _polar(_leading(gram_PNMNM.reshape(p, n * m, n * m), m).unflatten(1, (n, m)))
    before = None
    for _ in range(_ROUNDS):
        onto_mean_PNMM = torch.einsum("pijab,pjbc->piac", gram_PNNMM, turn_PNMM) / n
        turn_PNMM = _polar(onto_mean_PNMM)
        # What is maximised: ||S||^2 up to a constant, each round at least as large.
        gained = (turn_PNMM.conj() * onto_mean_PNMM).real.sum(dim=(1, 2, 3))
        if before is not None and bool(((gained - before).abs() <= _SETTLED * gained.abs()).all()):
            break
        before = gained
    turn_PNMM = turn_PNMM @ _polar(turn_PNMM.mean(dim=1)).mH[:, None]
    turn_NPMM = turn_PNMM.transpose(0, 1)
    return Pooling(turn_NPMM.mH / n, turn_NPMM)


def low_rank(gram_PNMNM: Tensor, readers_PNMM: Tensor) -> Pooling:
    """The shared head and the matrices A_j that minimise sum_j ||R_j (W_j - A_j S)||^2, where R_j^H R_j is
    `readers_PNMM`, the inner products of what reads head j: the best M-dimensional approximation of the products of
    readers and heads (scores, for keys; contributions to the residual stream, for values), by the singular value
    decomposition of all of a group stacked (Eckart & Young 1936, Psychometrika 1).

    S and A_j are determined up to an invertible matrix: the one with sum_j A_j^H A_j = N and with A_j, on average, as
    near the identity as can be.
    """
    p, n, m = gram_PNMNM.shape[:3]
    weight_PNMM = _power(readers_PNMM, 0.5)
    weighted_PNMNM = torch.einsum("piab,pibjc,pjcd->piajd", weight_PNMM, gram_PNMNM, weight_PNMM)
    basis_PNMM = _leading(weighted_PNMNM.reshape(p, n * m, n * m), m).unflatten(1, (n, m))
    into_PNMM = basis_PNMM.mH @ weight_PNMM  # the sum of into_j W_j spans the leading directions
    onto_PNMM = torch.einsum("piajb,pjcb->piac", gram_PNMNM, into_PNMM.conj())
    shared_PMM = (into_PNMM @ onto_PNMM).sum(dim=1)
    turn_PNMM = onto_PNMM @ _power(shared_PMM, -1.0)[:, None]
    size_PMM = (turn_PNMM.mH @ turn_PNMM).mean(dim=1)
    turn_PNMM = turn_PNMM @ _power(size_PMM, -0.5)[:, None]
    gauge_PMM = _polar(turn_PNMM.mean(dim=1))
    turn_PNMM = turn_PNMM @ gauge_PMM.mH[:, None]
    into_PNMM = (gauge_PMM @ _power(size_PMM, 0.5))[:, None] @ into_PNMM
    return Pooling(into_PNMM.transpose(0, 1), turn_PNMM.transpose(0, 1))


def distances(gram_PNMNM: Tensor, *, turned: bool) -> Tensor:
    """Squared distances between heads, [N, N]; `turned`: after the best turn of one onto the other."""
    n = gram_PNMNM.shape[1]
    pairs = gram_PNMNM.transpose(2, 3)  # [P, N, N, M, M]
    if turned:
        common_NN = torch.linalg.svdvals(pairs).sum(dim=(0, 3))
    else:
        common_NN = pairs.diagonal(dim1=3, dim2=4).real.sum(dim=(0, 3))
    sizes_N = pairs[:, range(n), range(n)].diagonal(dim1=2, dim2=3).real.sum(dim=(0, 2))
    squared_NN = (sizes_N[:, None] + sizes_N[None] - common_NN - common_NN.T).clamp(min=0.0)
    return squared_NN.fill_diagonal_(0.0)


def _leading(gram_PRR: Tensor, count: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, [P, R, count]."""
    return torch.linalg.eigh(gram_PRR).eigenvectors[..., -count:]


def _polar(x: Tensor) -> Tensor:
    """The unitary matrix nearest to each of x: of its singular value decomposition U S V^H, U V^H."""
    if x.shape[-1] == 1:
        return torch.where(x == 0, torch.ones_like(x), x.sgn())
    u, _, vh = torch.linalg.svd(x)
    return u @ vh


def _power(hermitian: Tensor, exponent: float) -> Tensor:
    """A power of positive semi-definite matrices; what has no size stays without, whatever the exponent."""
    values, vectors = torch.linalg.eigh(hermitian)
    floor = values[..., -1:].clamp(min=0.0) * values.shape[-1] * torch.finfo(values.dtype).eps
    powers = torch.where(values > floor, values.clamp(min=torch.finfo(values.dtype).tiny).pow(exponent), 0.0)
    return (vectors * powers[..., None, :].to(vectors.dtype)) @ vectors.mH
