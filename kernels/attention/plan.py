"""What the fused kernels read of a batch: a context's tensors, for one spec, in the form in which tiles can use them.

Derived once per batch and shared by the layers. Every tensor is int32 or int8; `None` stands for "plays no part".
Legend: B batch (1 where all sequences agree), T queries, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .context import AttentionContext
from .spec import AttentionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """q_pos [B, T], k_pos [B, S]    explicit positions; both or none
    q_doc [B, T], k_doc [B, S]       documents as small numbers, equal exactly where the ids are
    q_span [B, T, 4]                 of each query's document: first key, the range of keys that is it alone (empty when
                                     its keys are scattered), end of keys; k_span [B, S, 4] the same of queries
    lengths [B]                      keys that exist
    always [B, S], n_always [B]      keys that everybody may see (sinks, global tokens), by index, those first
    is_global [B, T] int8            queries that may see everything; rows [B, T], n_rows [B]: which ones, those first
    most_always, most_rows           bounds of n_always and n_rows
    """

    q_pos: Tensor | None = None
    k_pos: Tensor | None = None
    q_doc: Tensor | None = None
    k_doc: Tensor | None = None
    q_span: Tensor | None = None
    k_span: Tensor | None = None
    lengths: Tensor | None = None
    always: Tensor | None = None
    n_always: Tensor | None = None
    is_global: Tensor | None = None
    rows: Tensor | None = None
    n_rows: Tensor | None = None
    most_always: int = 0
    most_rows: int = 0


def make_plan(
    context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
) -> Plan:
    """The plan of `context` for `spec`. Finding out how many keys and how many rows are global waits for the device.

    Raises ValueError for explicit positions that triton cannot count, or that lie past a block layout.
    """
    q_pos = k_pos = None
    if context.q_positions is not None or context.kv_positions is not None:
        q_pos = _narrowed("q_positions", context.query_positions(n_queries, n_keys, device), spec)
        k_pos = _narrowed("kv_positions", context.key_positions(n_keys, device), spec)
    q_doc = k_doc = q_span = k_span = None
    if spec.documents:
        q_doc, k_doc, q_span, k_span = _documents(*context.documents(n_queries, n_keys))

    always = n_always = is_global = rows = n_rows = None
    most_always = most_rows = 0
    has_globals = spec.global_tokens and context.is_global is not None
    if narrows(spec) and (spec.sink_tokens or has_globals):
        always, n_always, most_always = _gathered(_always_visible(context, spec, n_queries, n_keys, device))
    if narrows(spec) and has_globals:
        flags = context.global_queries(spec, n_queries, n_keys)
        rows, n_rows, most_rows = _gathered(flags)
        is_global = flags.to(torch.int8)
    if most_always == 0:
        always = n_always = None
    if most_rows == 0:
        is_global = rows = n_rows = None
    return Plan(
        q_pos=q_pos,
        k_pos=k_pos,
        q_doc=q_doc,
        k_doc=k_doc,
        q_span=q_span,
        k_span=k_span,
        lengths=None if context.kv_lengths is None else context.kv_lengths.clamp(0, n_keys).int(),
        always=always,
        n_always=n_always,
        is_global=is_global,
        rows=rows,
        n_rows=n_rows,
        most_always=most_always,
        most_rows=most_rows,
    )


def _narrowed(name: str, positions: Tensor, spec: AttentionSpec) -> Tensor:
    """Positions as int32. Raises ValueError for those that do not fit, and for those past a block layout's pattern."""
    if positions.numel() and not torch.compiler.is_compiling():  # values cannot be looked at while tracing
        last, layout = int(positions.max()), spec.block_sparse
        if last >= 2**30:
            raise ValueError(f"context.{name} reaches {last}; triton takes positions below {2**30}")
        if layout is not None:
            queries = name == "q_positions"
            n = len(layout.pattern) * layout.q_block if queries else len(layout.pattern[0]) * layout.kv_block
            if last >= n:
                raise ValueError(f"block_sparse covers {n} positions, but context.{name} reaches {last}")
    return positions.clamp(min=-(2**30)).int().contiguous()  # an empty slot stays negative, however it is marked


def narrows(spec: AttentionSpec) -> bool:
    """Does the window or the layout hide anything that causality and documents would show?"""
    window = spec.window
    return (
        window.left is not None
        or (window.right is not None and not spec.causal)
        or window.dilation > 1
        or spec.block_sparse is not None
    )


def _always_visible(
    context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
) -> Tensor:
    flags = torch.zeros(1, n_keys, dtype=torch.bool, device=device)
    if spec.sink_tokens:
        flags = flags | context.sink_keys(spec, n_queries, n_keys, device)
    if spec.global_tokens and context.is_global is not None:
        flags = flags | context.is_global
    exists = context.existing_keys(n_keys)
    return flags if exists is None else flags & exists


_ROUND = 16  # counts are rounded up to this, so that few distinct ones reach a compiler


def _gathered(flags_BN: Tensor) -> tuple[Tensor, Tensor, int]:
    """(indices, the flagged ones first and in order [B, N], how many [B], a bound of that)."""
    order_BN = (~flags_BN).to(torch.int8).argsort(dim=1, stable=True).int()
    count_B = flags_BN.sum(dim=1, dtype=torch.int32)
    n = flags_BN.shape[1]
    if torch.compiler.is_compiling():  # values cannot be looked at while tracing
        return order_BN, count_B, n
    most = int(count_B.max()) if count_B.numel() else 0
    return order_BN, count_B, min(n, -(-most // _ROUND) * _ROUND)


def _documents(q_BT: Tensor, kv_BS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q_doc, k_doc, q_span, k_span) of document ids in any order."""
    batch = max(q_BT.shape[0], kv_BS.shape[0])
    q_BT, kv_BS = q_BT.expand(batch, -1).contiguous(), kv_BS.expand(batch, -1).contiguous()
    sorted_BS, order_BS = kv_BS.sort(dim=1, stable=True)
    k_doc, _ = _among(kv_BS, sorted_BS, order_BS)
    q_doc, q_span = _among(q_BT, sorted_BS, order_BS)
    _, k_span = _among(kv_BS, *q_BT.sort(dim=1, stable=True))
    return q_doc, k_doc, q_span, k_span


def _among(ids_BN: Tensor, sorted_BM: Tensor, order_BM: Tensor) -> tuple[Tensor, Tensor]:
    """Each id's number among the sorted ids (-2 when it is not there), and its span [B, N, 4] (see Plan)."""
    n = sorted_BM.shape[1]
    begin = torch.searchsorted(sorted_BM, ids_BN)
    end = torch.searchsorted(sorted_BM, ids_BN, right=True)
    known = end > begin
    if n:
        first = order_BM.gather(1, begin.clamp(max=n - 1))
        last = order_BM.gather(1, (end - 1).clamp(min=0))
    else:
        first = last = torch.zeros_like(begin)
    alone = known & (last - first == end - begin - 1)
    span = (
        torch.where(known, first, n),
        torch.where(alone, first, n),
        torch.where(alone, last + 1, 0),
        torch.where(known, last + 1, 0),
    )
    return torch.where(known, begin, -2).int(), torch.stack(span, dim=-1).int().contiguous()
