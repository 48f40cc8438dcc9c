"""Turning heads onto each other: what is found is found again, and is no worse than what else there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longspan.model.positions import Rotary, rotate
from longspan.model.surgery.alignment import (
    Freedom,
    Pooling,
    align,
    distances,
    from_blocks,
    gram,
    low_rank,
    to_blocks,
)

N, K, C = 3, 6, 17
FREEDOMS: tuple[Freedom, ...] = ("all", "planes")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unitary(freedom: Freedom, *, seed: int) -> Tensor:
    """Turns of N heads that the freedom allows, [N, P, M, M]."""
    if freedom == "planes":
        angles = normal(N, K // 2, 1, 1, seed=seed)
        return torch.polar(torch.ones_like(angles), angles)
    return torch.linalg.qr(normal(N, 1, K, K, seed=seed)).Q


def residual(pooling: Pooling, blocks_NPMC: Tensor) -> float:
    one_PMC = (pooling.into_NPMM @ blocks_NPMC).sum(dim=0)
    return float((blocks_NPMC - pooling.turn_NPMM @ one_PMC).abs().square().sum())


def identity_readers(freedom: Freedom) -> Tensor:
    p, m, dtype = (K // 2, 1, torch.complex128) if freedom == "planes" else (1, K, torch.float64)
    return torch.eye(m, dtype=dtype).expand(p, N, m, m)


def test_blocks_there_and_back() -> None:
    heads_NKC = normal(N, K, C)
    assert to_blocks(heads_NKC, "planes").shape == (N, K // 2, 1, C)
    for freedom in FREEDOMS:
        assert torch.equal(from_blocks(to_blocks(heads_NKC, freedom)), heads_NKC)


def test_a_turn_in_the_planes_passes_through_the_rotation_of_positions() -> None:
    heads_NKC, x_BTC = normal(N, K, C), normal(1, 5, C, seed=1)
    turn_NPMM = unitary("planes", seed=2)
    rotation = Rotary(K, 5, 100.0)(torch.arange(5)[None], 5)

    def keys(heads_NKC: Tensor) -> Tensor:
        return rotate(torch.einsum("nkc,btc->btnk", heads_NKC, x_BTC).float(), rotation)

    turned_NKC = from_blocks(turn_NPMM @ to_blocks(heads_NKC, "planes"))
    first_then_rotated = keys(turned_NKC)
    rotated_BTNK = keys(heads_NKC)
    turned_BTNK = torch.stack(
        [from_blocks(turn_NPMM @ to_blocks(x_NK[..., None].double(), "planes"))[..., 0] for x_NK in rotated_BTNK[0]]
    )[None]
    torch.testing.assert_close(first_then_rotated.double(), turned_BTNK, atol=1e-5, rtol=0)
    anything_NPMM = unitary("all", seed=2)  # does not
    assert not torch.allclose(keys((anything_NPMM @ heads_NKC[:, None])[:, 0]).double(), turned_BTNK, atol=0.1)


@pytest.mark.parametrize("freedom", FREEDOMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_heads_that_differ_by_a_turn_lose_nothing(freedom: Freedom, weighted: bool) -> None:
    one_PMC = to_blocks(normal(1, K, C), freedom)[0]
    blocks_NPMC = unitary(freedom, seed=3) @ one_PMC
    factor = normal(C, C, seed=4)
    gram_PNMNM = gram(blocks_NPMC, factor @ factor.T if weighted else None)
    for pooling in (align(gram_PNMNM), low_rank(gram_PNMNM, identity_readers(freedom))):
        assert residual(pooling, blocks_NPMC) < 1e-16 * float(blocks_NPMC.abs().square().sum()) * 1e4
    assert float(distances(gram_PNMNM, turned=True).max()) < 1e-9 * float(distances(gram_PNMNM, turned=False).max())


def test_alignment_of_two_is_procrustes() -> None:
    """Of two heads the solution is closed: the turn of one onto the other (Schönemann 1966)."""
    blocks_NPMC = normal(2, 1, K, C)
    pooling = align(gram(blocks_NPMC))
    u, _, vh = torch.linalg.svd(blocks_NPMC[0, 0] @ blocks_NPMC[1, 0].T)
    torch.testing.assert_close(pooling.turn_NPMM[0, 0] @ pooling.turn_NPMM[1, 0].T, u @ vh, atol=1e-3, rtol=0)
    best = distances(gram(blocks_NPMC), turned=True)[0, 1] / 2
    assert residual(pooling, blocks_NPMC) == pytest.approx(float(best), rel=1e-9)


@pytest.mark.parametrize("freedom", FREEDOMS)
def test_alignment_is_unitary_and_no_small_turn_is_better(freedom: Freedom) -> None:
    blocks_NPMC = to_blocks(normal(N, K, C), freedom)
    pooling = align(gram(blocks_NPMC))
    eye = torch.eye(pooling.turn_NPMM.shape[-1], dtype=pooling.turn_NPMM.dtype)
    torch.testing.assert_close(pooling.turn_NPMM.mH @ pooling.turn_NPMM, eye.expand_as(pooling.turn_NPMM))
    found = residual(pooling, blocks_NPMC)
    for seed in range(20):
        skew = torch.randn(eye.shape, generator=torch.Generator().manual_seed(seed), dtype=eye.dtype) * 1e-2
        near = pooling.turn_NPMM.clone()
        near[seed % N] = near[seed % N] @ torch.linalg.matrix_exp(skew - skew.mH)
        assert residual(Pooling(near.mH / N, near), blocks_NPMC) >= found * (1 - 1e-12)
    unturned = Pooling(eye.expand_as(pooling.turn_NPMM) / N, eye.expand_as(pooling.turn_NPMM))
    assert found < 0.95 * residual(unturned, blocks_NPMC)


def test_low_rank_is_the_singular_value_decomposition_of_the_products() -> None:
    heads_NKC, readers_NKX = normal(N, K, C), normal(N, K, 29, seed=1)
    pooling = low_rank(gram(heads_NKC[:, None]), (readers_NKX @ readers_NKX.mT)[None])
    one_KC = (pooling.into_NPMM[:, 0] @ heads_NKC).sum(dim=0)
    torch.testing.assert_close(
        (pooling.turn_NPMM.mH @ pooling.turn_NPMM).mean(dim=0)[0], torch.eye(K, dtype=torch.float64)
    )
    products = (readers_NKX.mT @ heads_NKC).flatten(0, 1)
    approximated = (readers_NKX.mT @ pooling.turn_NPMM[:, 0] @ one_KC).flatten(0, 1)
    u, s, vh = torch.linalg.svd(products, full_matrices=False)
    torch.testing.assert_close(approximated, u[:, :K] * s[:K] @ vh[:K], atol=1e-9, rtol=0)


def test_low_rank_in_planes_is_of_rank_one_in_each() -> None:
    blocks_NPMC, readers_HPMX = to_blocks(normal(N, K, C), "planes"), to_blocks(normal(N, K, 29, seed=1), "planes")
    pooling = low_rank(gram(blocks_NPMC), (readers_HPMX @ readers_HPMX.mH).transpose(0, 1))
    one_PMC = (pooling.into_NPMM @ blocks_NPMC).sum(dim=0)
    for plane in range(K // 2):
        products = (readers_HPMX[:, plane].mH @ blocks_NPMC[:, plane]).flatten(0, 1)
        near = (readers_HPMX[:, plane].mH @ pooling.turn_NPMM[:, plane] @ one_PMC[plane]).flatten(0, 1)
        u, s, vh = torch.linalg.svd(products, full_matrices=False)
        torch.testing.assert_close(near, s[0] * u[:, :1] @ vh[:1], atol=1e-9, rtol=0)


def test_low_rank_under_the_inputs_moment_minimises_what_heads_compute() -> None:
    heads_NKC, x_LC = normal(N, K, C), normal(400, C, seed=5) @ normal(C, C, seed=6)
    pooling = low_rank(gram(heads_NKC[:, None], x_LC.T @ x_LC / 400), identity_readers("all"))
    one_KC = (pooling.into_NPMM[:, 0] @ heads_NKC).sum(dim=0)
    outputs = torch.cat([head @ x_LC.T for head in heads_NKC])
    near = torch.cat([turn @ one_KC @ x_LC.T for turn in pooling.turn_NPMM[:, 0]])
    u, s, vh = torch.linalg.svd(outputs, full_matrices=False)
    torch.testing.assert_close(near, u[:, :K] * s[:K] @ vh[:K], atol=1e-8, rtol=0)


@pytest.mark.parametrize("freedom", FREEDOMS)
def test_a_head_of_zeros_is_harmless(freedom: Freedom) -> None:
    blocks_NPMC = to_blocks(torch.cat([normal(1, K, C), torch.zeros(N - 1, K, C, dtype=torch.float64)]), freedom)
    for pooling in (align(gram(blocks_NPMC)), low_rank(gram(blocks_NPMC), identity_readers(freedom))):
        assert torch.isfinite(torch.view_as_real(pooling.turn_NPMM + 0j)).all()
        assert torch.isfinite(torch.view_as_real(pooling.into_NPMM + 0j)).all()
    nothing = torch.zeros_like(blocks_NPMC)
    assert residual(low_rank(gram(nothing), identity_readers(freedom)), nothing) == 0.0


def test_distances() -> None:
    heads_NKC = normal(N, K, C)
    expected = torch.stack([torch.stack([(a - b).square().sum() for b in heads_NKC]) for a in heads_NKC])
    for freedom in FREEDOMS:
        torch.testing.assert_close(distances(gram(to_blocks(heads_NKC, freedom)), turned=False), expected)
    planes_N = torch.view_as_complex(torch.stack(heads_NKC.chunk(2, dim=1), dim=-1))  # [N, K/2, C]
    angles = torch.linspace(0, 2 * torch.pi, 20001, dtype=torch.float64)
    best = sum(
        (planes_N[0, p] - torch.polar(torch.ones_like(angles), angles)[:, None] * planes_N[1, p])
        .abs()
        .square()
        .sum(dim=1)
        .min()
        for p in range(K // 2)
    )
    turned = distances(gram(to_blocks(heads_NKC, "planes")), turned=True)[0, 1]
    torch.testing.assert_close(turned, torch.as_tensor(best), rtol=1e-6, atol=0)
