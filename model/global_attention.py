"""Global tokens that ask with projections of their own (Beltagy et al. 2020, arXiv 2004.05150, §3.1).

Ordinary rows see global keys and their window in one softmax, through the layer's usual projections: that is the spec's
business. What is here is the other half: a second attention for the rows of global tokens alone, over everything that
exists, whose result takes the place of theirs. It costs (global tokens) × (tokens), not (tokens) × (tokens).

Legend: B batch, T tokens, N global tokens of the row of the batch that has most, D model width, H query heads,
G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from longspan.kernels.attention import (
    AttentionCall,
    AttentionContext,
    AttentionParams,
    AttentionSpec,
    Phase,
    Window,
)
from longspan.kernels.attention.registry import attend, prepare

from .attention import BackendChoice, effective
from .config import HeadGroup
from .positions import FixedTable, rotate, slope_table

_FEWEST = 16  # rows, where there are more than one: what a tensor core multiplies


@dataclass(frozen=True, slots=True)
class GlobalRows:
    """Where the global tokens of a batch are.

    index_BN   their indices, in order; rows of the batch that have fewer than N are filled up with other tokens. N is 1
               or a power of two from 16 on (at most T), so that few numbers reach a compiler
    is_one_BN  which of them are global tokens
    context    of their attention: N queries over T keys
    """

    index_BN: Tensor
    is_one_BN: Tensor
    context: AttentionContext

    def of(self, x_BTxx: Tensor) -> Tensor:
        """[B, N, …] of [B or 1, T, …]."""
        rest = x_BTxx.shape[2:]
        index = self.index_BN.reshape(*self.index_BN.shape, *(1 for _ in rest)).expand(-1, -1, *rest)
        return x_BTxx.expand(self.index_BN.shape[0], -1, *rest).gather(1, index)

    def put(self, out_BTHK: Tensor, out_BNHK: Tensor) -> Tensor:
        """`out_BTHK` with the global tokens' rows taken from `out_BNHK`."""
        rows = torch.where(self.is_one_BN[:, :, None, None], out_BNHK.to(out_BTHK.dtype), self.of(out_BTHK))
        index = self.index_BN[:, :, None, None].expand_as(rows)
        return out_BTHK.scatter(1, index, rows)


def find_global_rows(context: AttentionContext, shape: tuple[int, int], *, distances: bool) -> GlobalRows | None:
    """The global tokens that a context flags in tokens of `shape` [B, T]; None where there are none.

    Their number is read back from the device: once a batch, for all layers. `distances` says that some layer's scores
    depend on positions (ALiBi).
    """
    if context.is_global is None:
        return None
    n_rows, n_tokens = shape
    exists = context.existing_keys(n_tokens)
    is_global_BT = context.is_global if exists is None else context.is_global & exists
    is_global_BT = is_global_BT.expand(n_rows, -1)
    n_global_B = is_global_BT.sum(dim=1)
    most = int(n_global_B.max())
    if most == 0:
        return None
    if most > 1:
        most = min(n_tokens, max(_FEWEST, 1 << (most - 1).bit_length()))
    index_BN = torch.argsort(is_global_BT, dim=1, descending=True, stable=True)[:, :most]
    is_one_BN = torch.arange(most, device=index_BN.device)[None] < n_global_B[:, None]

    def ours(of_tokens: Tensor) -> Tensor:
        return of_tokens.expand(n_rows, -1).gather(1, index_BN)

    documents = context.q_documents if context.q_documents is not None else context.kv_documents
    positions = context.query_positions(n_tokens, n_tokens, index_BN.device) if distances else None
    rows_context = AttentionContext(
        q_positions=None if positions is None else ours(positions),
        kv_positions=context.kv_positions,
        q_documents=None if documents is None else ours(documents),
        kv_documents=context.kv_documents if context.kv_documents is not None else documents,
        kv_lengths=context.kv_lengths,
    )
    return GlobalRows(index_BN, is_one_BN, rows_context)


class GlobalAttention(nn.Module):
    """The global rows' own q, k and v projections, and their attention; the output projection is the layer's."""

    def __init__(
        self, *, groups: Sequence[HeadGroup], d_model: int, n_heads: int, n_kv_heads: int, head_dim: int, bias: bool
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.shared = n_heads // n_kv_heads
        self.q_proj = nn.Linear(d_model, n_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim, bias=bias)
        self.groups = _seeing_everything(groups)
        # In every situation (documents, training); made here, since masks are found by them and tracing makes no keys.
        self.specs = {
            (documents, training): tuple(
                effective(group.spec, documents=documents, global_tokens=False, training=training)
                for group in self.groups
            )
            for documents in (False, True)
            for training in (False, True)
        }
        biased = any(group.spec.alibi for group in groups)
        self.slopes = FixedTable(partial(slope_table, n_heads)) if biased else None

    def forward(
        self,
        x_BTD: Tensor,
        out_BTHK: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        rows: GlobalRows,
        backend: BackendChoice,
    ) -> Tensor:
        """`out_BTHK`, the layer's attention, with the rows of global tokens replaced."""
        q_BNHK = self.q_proj(rows.of(x_BTD)).unflatten(-1, (-1, self.head_dim))
        k_BTGK = self.k_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTGK = self.v_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        if rotation is not None:
            cos, sin = rotation
            q_BNHK, k_BTGK = rotate(q_BNHK, (rows.of(cos), rows.of(sin))), rotate(k_BTGK, rotation)

        outputs, head = [], 0
        for group, spec in zip(self.groups, self._specs(rows)):
            kv = head // self.shared, group.heads // self.shared
            slopes = None if self.slopes is None or not group.spec.alibi else self.slopes.values
            output = attend(
                q_BNHK.narrow(2, head, group.heads),
                k_BTGK.narrow(2, *kv),
                v_BTGK.narrow(2, *kv),
                spec=spec,
                context=rows.context,
                params=None if slopes is None else AttentionParams(alibi_slopes=slopes.narrow(0, head, group.heads)),
                backend=backend,
            )
            outputs.append(output.out)
            head += group.heads
        return rows.put(out_BTHK, outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2))

    def prepare(
        self,
        rows: GlobalRows,
        *,
        n_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        needs_grad: bool,
        backend: BackendChoice,
    ) -> None:
        """As `Attention.prepare`, for the rows of global tokens."""
        for group, spec in zip(self.groups, self._specs(rows)):
            call = AttentionCall(
                phase=Phase.TRAIN,
                device=device.type,
                dtype=dtype,
                head_dim=self.head_dim,
                n_heads=group.heads,
                n_kv_heads=group.heads // self.shared,
                n_queries=rows.index_BN.shape[1],
                n_keys=n_tokens,
                needs_grad=needs_grad,
                positions=rows.context.q_positions is not None or rows.context.kv_positions is not None,
                kv_lengths=rows.context.kv_lengths is not None,
            )
            prepare(rows.context, spec, call, device=device, backend=backend)

    def _specs(self, rows: GlobalRows) -> tuple[AttentionSpec, ...]:
        return self.specs[rows.context.q_documents is not None, self.training]


def _seeing_everything(groups: Sequence[HeadGroup]) -> tuple[HeadGroup, ...]:
    """A layer's head groups for queries that see every key. Groups that differed in their window are then one."""
    merged: list[HeadGroup] = []
    for group in groups:
        spec: AttentionSpec = replace(
            group.spec, window=Window(), global_tokens=False, sink_tokens=0, block_sparse=None
        )
        if merged and merged[-1].spec == spec:
            merged[-1] = HeadGroup(heads=merged[-1].heads + group.heads, spec=spec)
        else:
            merged.append(HeadGroup(heads=group.heads, spec=spec))
    return tuple(merged)
