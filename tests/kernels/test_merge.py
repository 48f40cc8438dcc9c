"""Partial attention over pieces of the keys merges into attention over all of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionOutput, AttentionSpec, attend, merge_partials

B, T, S, H, D = 2, 4, 9, 2, 3
SPEC = AttentionSpec(causal=True)


def qkv(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, n, H, D, generator=generator, dtype=torch.float64).to(dtype) for n in (T, S, S)]


def part(q: Tensor, k: Tensor, v: Tensor, start: int, stop: int) -> AttentionOutput:
    context = AttentionContext(
        q_positions=torch.arange(T).repeat(B, 1) + S - T, kv_positions=torch.arange(start, stop).repeat(B, 1)
    )
    return attend(
        q, k[:, start:stop], v[:, start:stop], spec=SPEC, context=context, backend="reference", return_lse=True
    )


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(1, S - 1)), st.randoms())
def test_any_split_in_any_order_is_the_whole(cuts: set[int], random: st.randoms) -> None:  # pyright: ignore[reportInvalidTypeForm]
    q, k, v = qkv()
    whole = attend(q, k, v, spec=SPEC, backend="reference", return_lse=True)
    edges = [0, *sorted(cuts), S]
    parts = [part(q, k, v, *edge) for edge in itertools.pairwise(edges)]
    random.shuffle(parts)
    merged = merge_partials(parts)
    torch.testing.assert_close(merged.out, whole.out, rtol=0, atol=1e-14)
    torch.testing.assert_close(merged.lse, whole.lse, rtol=0, atol=1e-14)


def test_gradients_are_those_of_the_whole() -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    whole = attend(*leaves, spec=SPEC, backend="reference", return_lse=True)
    merged = merge_partials([part(*leaves, 0, 2), part(*leaves, 2, 8), part(*leaves, 8, 9)])
    assert whole.lse is not None
    assert merged.lse is not None
    expected = torch.autograd.grad(whole.out.square().sum() + whole.lse.sum(), leaves)
    ours = torch.autograd.grad(merged.out.square().sum() + merged.lse.sum(), leaves)
    for x, y in zip(ours, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)


def test_rows_empty_everywhere_stay_zero_with_finite_gradients() -> None:
    outs = [torch.randn(1, 2, 1, 3, requires_grad=True) for _ in range(2)]
    lses = [
        torch.tensor([[[-torch.inf, 0.5]]], requires_grad=True),
        torch.tensor([[[-torch.inf, -torch.inf]]], requires_grad=True),
    ]
    merged = merge_partials([AttentionOutput(out, lse) for out, lse in zip(outs, lses)])
    assert merged.lse is not None
    assert merged.lse.tolist() == [[[-torch.inf, 0.5]]]
    assert torch.equal(merged.out[0, 0], torch.zeros(1, 3))
    assert torch.equal(merged.out[0, 1], outs[0][0, 1])
    merged.out.sum().backward()
    for x in (*outs, *lses):
        assert x.grad is not None
        assert bool(torch.isfinite(x.grad).all())


def test_half_outputs_are_merged_in_fp32() -> None:
    q, k, v = qkv(torch.bfloat16)
    merged = merge_partials([part(q, k, v, 0, 4), part(q, k, v, 4, 9)])
    assert merged.out.dtype == torch.bfloat16
    assert merged.lse is not None
    assert merged.lse.dtype == torch.float32
    whole = attend(q, k, v, spec=SPEC, backend="reference").out
    torch.testing.assert_close(merged.out, whole, rtol=0, atol=0.02)


def test_errors() -> None:
    with pytest.raises(ValueError, match="no parts"):
        merge_partials([])
    with pytest.raises(ValueError, match="return_lse=True"):
        merge_partials([AttentionOutput(torch.zeros(1, 1, 1, 1))])
