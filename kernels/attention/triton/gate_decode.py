"""The decode calls among what the compile gate compiles (`gate_variants` has the rest, and how it is done)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import AttentionSpec, Window

B, S, H = 8, 32_768, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCase:
    """One call of B = 8 and 16 query heads over 32,768 keys that lie as a cache keeps them, a head's keys together.

    group    query heads that share a key/value head
    queries  of each row
    stored   dtype of keys and values in eight bits; None: `dtype`
    page     keys in a page; such a cache has lengths and positions too
    quick    compiled by the tests that run by default
    """

    name: str
    spec: AttentionSpec
    head_dim: int
    kernels: tuple[str, ...] = ("decode",)
    dtype: torch.dtype = torch.bfloat16
    group: int = 1
    queries: int = 1
    stored: torch.dtype | None = None
    page: int | None = None
    quick: bool = False

    @property
    def archs(self) -> tuple[int, ...]:
        return (80, 90)

    def variant(self, kernel: str) -> str:
        return f"{self.name} {kernel}"


DECODING = (
    DecodeCase(
        name="d128 8:1",
        spec=AttentionSpec(causal=True),
        head_dim=128,
        group=8,
        kernels=("decode", "join_splits"),
        quick=True,
    ),
    DecodeCase(
        name="d64 window paged",
        spec=AttentionSpec(causal=True, window=Window.causal_keys(1024), sink_tokens=4),
        head_dim=64,
        page=16,
    ),
    DecodeCase(name="d128 int8 4:1", spec=AttentionSpec(causal=True), head_dim=128, group=4, stored=torch.int8),
    DecodeCase(
        name="d128 documents 4:1", spec=AttentionSpec(causal=True, documents=True), head_dim=128, group=4, queries=2
    ),
)


def call(case: DecodeCase) -> None:
    """Launches what `case` launches, over tensors without data."""
    from .decode_launch import decode_attention

    def meta(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    G, T, D, stored = H // case.group, case.queries, case.head_dim, case.stored or case.dtype
    rows, row = (B, S) if case.page is None else (B * S // case.page, case.page)
    k = meta(rows, G, row, D, dtype=stored).transpose(1, 2)
    scale = None if case.stored is None else meta(rows, G, row, dtype=torch.float32).transpose(1, 2)
    paged = case.page is not None
    decode_attention(
        meta(B, T, H, D),
        k,
        k,
        scale,
        scale,
        None,
        None,
        meta(B, T, dtype=torch.int64) if paged else None,
        None,
        meta(B, dtype=torch.int64) if paged else None,
        meta(B, S // row, dtype=torch.int32) if paged else None,
        meta(B, T, S, dtype=torch.bool) if case.spec.documents else None,
        case.spec,
    )
