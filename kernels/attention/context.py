"""The per-batch tensors of attention, and `allowed`: the one definition of which key a query sees.

Legend: B batch, T queries, S keys, q and kv the lengths of the requested slices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .spec import AttentionSpec, BlockLayout, Window


@dataclass(slots=True, kw_only=True)
class AttentionContext:
    """What a batch adds to a spec; built once, shared by all layers. Every field may be `None`.

    q_positions    [B, T] int64 absolute positions of the queries; None: the last query stands at the last key
                   (bottom-right), so query i is at S - T + i
    kv_positions   [B, S] int64; None: 0 … S-1. A negative key position marks an empty slot (left padding, an unused
                   ring-cache slot): no query sees it
    q_documents    [B, T] int64 ids, in any order
    kv_documents   [B, S]; when T == S and only one of the two is given, it serves both
    is_global      [B, S] bool over keys; a query is global when the key at its position (and in its document) is
    kv_lengths     [B] number of valid keys: key j exists iff j < kv_lengths[b] (right padding, ragged caches)
    page_table     [B, pages] int: k and v are pools [n_pages, page, G, D] and key j of sequence b lies in
                   pool[page_table[b, j // page], j % page]
    """

    q_positions: Tensor | None = None
    kv_positions: Tensor | None = None
    q_documents: Tensor | None = None
    kv_documents: Tensor | None = None
    is_global: Tensor | None = None
    kv_lengths: Tensor | None = None
    page_table: Tensor | None = None
    # Masks that backends derive from this context and one spec; a context is built per batch, so they die with it.
    derived: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

    # -- the definition ---------------------------------------------------------------------------------------------

    def allowed(self, spec: AttentionSpec, q: slice, kv: slice, device: torch.device | None = None) -> Tensor:
        """Which of the keys in `kv` each query in `q` sees: bool, broadcastable to [B, q, kv].

        `q` and `kv` are slices with explicit ends into the T queries and S keys. Where no tensor of the context tells
        T or S, the slices' ends stand for them (positions are then bottom-right aligned to those ends).

            visible = exists(k) ∧ same document ∧ (k ≤ q if causal)
                      ∧ ((in window ∧ in block layout) ∨ sink(k) ∨ global(k) ∨ global(q))

        Raises ValueError when the spec needs a tensor that the context lacks.
        """
        n_queries, n_keys = self.lengths(q.stop, kv.stop)
        q_pos = _part(self.query_positions(n_queries, n_keys, device), q)[:, :, None]
        kv_pos_all = self.key_positions(n_keys, device)
        kv_pos = _part(kv_pos_all, kv)[:, None, :]

        visible = in_window(spec.window, q_pos, kv_pos)
        if spec.block_sparse is not None:
            visible = visible & in_layout(spec.block_sparse, q_pos, kv_pos)
        if spec.sink_tokens:
            visible = visible | _part(self.sink_keys(spec, n_queries, n_keys, device), kv)[:, None, :]
        if spec.global_tokens and self.is_global is not None:
            visible = visible | _part(self.is_global, kv)[:, None, :]
            visible = visible | _part(self.global_queries(spec, n_queries, n_keys), q)[:, :, None]

        visible = visible & (kv_pos >= 0)
        if self.kv_lengths is not None:
            index = torch.arange(kv.start or 0, kv.stop, device=kv_pos.device)
            visible = visible & (index[None, None, :] < self.kv_lengths[:, None, None])
        if spec.causal:
            visible = visible & (kv_pos <= q_pos)
        if spec.documents:
            q_documents, kv_documents = self.documents(n_queries, n_keys)
            visible = visible & (_part(q_documents, q)[:, :, None] == _part(kv_documents, kv)[:, None, :])
        return visible

    # -- its parts, also used by backends that compile the definition instead of materialising it ---------------------

    def lengths(self, n_queries: int, n_keys: int) -> tuple[int, int]:
        """T and S as the tensors tell them; the arguments where none does."""
        for tensor in (self.q_positions, self.q_documents):
            if tensor is not None:
                n_queries = tensor.shape[1]
        for tensor in (self.kv_positions, self.kv_documents, self.is_global):
            if tensor is not None:
                n_keys = tensor.shape[1]
        return n_queries, n_keys

    def query_positions(self, n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
        """[B or 1, T] absolute positions of the queries."""
        if self.q_positions is not None:
            return self.q_positions
        if self.kv_positions is not None:
            if n_queries > n_keys:
                raise ValueError(
                    f"{n_queries} queries over {n_keys} keys with kv_positions but no q_positions: the queries that "
                    "stand before the first key have no position; pass q_positions"
                )
            return self.kv_positions[:, n_keys - n_queries :]
        return torch.arange(n_keys - n_queries, n_keys, device=self._device(device))[None, :]

    def key_positions(self, n_keys: int, device: torch.device | None = None) -> Tensor:
        """[B or 1, S] absolute positions of the keys."""
        if self.kv_positions is not None:
            return self.kv_positions
        return torch.arange(n_keys, device=self._device(device))[None, :]

    def documents(self, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor]:
        """Document ids of queries [B, T] and keys [B, S]."""
        q_documents = self.q_documents if self.q_documents is not None else self.kv_documents
        kv_documents = self.kv_documents if self.kv_documents is not None else self.q_documents
        if q_documents is None or kv_documents is None:
            raise ValueError("spec.documents=True, but the context has neither q_documents nor kv_documents")
        if q_documents.shape[1] != n_queries or kv_documents.shape[1] != n_keys:
            raise ValueError(
                f"document ids for {q_documents.shape[1]} queries and {kv_documents.shape[1]} keys, "
                f"but attention is over {n_queries} and {n_keys}; pass both q_documents and kv_documents"
            )
        return q_documents, kv_documents

    def sink_keys(self, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device | None = None) -> Tensor:
        """[B or 1, S] bool: the first `spec.sink_tokens` keys of each document, of the sequence where there are none.

        A document starts at the smallest position that carries its id; a sequence at position 0.
        """
        kv_pos = self.key_positions(n_keys, device)
        if not spec.documents:
            return (kv_pos >= 0) & (kv_pos < spec.sink_tokens)
        _, kv_documents = self.documents(n_queries, n_keys)
        kv_pos = kv_pos.expand(kv_documents.shape)
        # Relabel ids to 0…S-1 a row so that one scatter finds each document's first position, whatever the ids are.
        _, label = torch.unique(kv_documents, return_inverse=True)
        offset = torch.arange(kv_pos.shape[0], device=kv_pos.device)[:, None] * (label.max() + 1)
        flat = (label + offset).flatten()
        far = torch.iinfo(kv_pos.dtype).max
        candidates = torch.where(kv_pos >= 0, kv_pos, far).flatten()
        first = torch.full((kv_pos.shape[0] * int(label.max() + 1),), far, dtype=kv_pos.dtype, device=kv_pos.device)
        first = first.scatter_reduce(0, flat, candidates, "amin")
        start = first[flat].view(kv_pos.shape)
        return (kv_pos >= 0) & (kv_pos - start < spec.sink_tokens)

    def global_queries(self, spec: AttentionSpec, n_queries: int, n_keys: int) -> Tensor:
        """[B, T] bool: queries whose own key (same position, and same document under `spec.documents`) is global."""
        if self.is_global is None:
            raise ValueError("the context has no is_global")
        device = self.is_global.device
        q_pos = self.query_positions(n_queries, n_keys, device)
        kv_pos = self.key_positions(n_keys, device)
        own = q_pos[:, :, None] == kv_pos[:, None, :]
        if spec.documents:
            q_documents, kv_documents = self.documents(n_queries, n_keys)
            own = own & (q_documents[:, :, None] == kv_documents[:, None, :])
        if self.kv_lengths is not None:
            own = own & (torch.arange(n_keys, device=device)[None, None, :] < self.kv_lengths[:, None, None])
        return (own & self.is_global[:, None, :]).any(dim=-1)

    def _device(self, device: torch.device | None) -> torch.device | None:
        for tensor in (
            self.q_positions,
            self.kv_positions,
            self.q_documents,
            self.kv_documents,
            self.is_global,
            self.kv_lengths,
            self.page_table,
        ):
            if tensor is not None:
                return tensor.device
        return device


def in_window(window: Window, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    """Elementwise: is the key at `kv_pos` one of the neighbours that `window` grants the query at `q_pos`?"""
    back = q_pos - kv_pos  # positions to the left of the query; negative to its right
    left, right = window.span
    inside = torch.ones_like(back, dtype=torch.bool)
    if left is not None:
        inside = inside & (back <= left)
    if right is not None:
        inside = inside & (back >= -right)
    if window.dilation > 1:
        inside = inside & (back % window.dilation == 0)
    return inside


def in_layout(layout: BlockLayout, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    """Elementwise: does the block pattern let the query at `q_pos` look at the key at `kv_pos`?"""
    pattern = torch.tensor(layout.pattern, dtype=torch.bool, device=q_pos.device)
    q_block, kv_block = q_pos // layout.q_block, kv_pos // layout.kv_block
    if int(q_block.max()) >= pattern.shape[0] or int(kv_block.max()) >= pattern.shape[1]:
        raise ValueError(
            f"block_sparse covers {pattern.shape[0] * layout.q_block} query and {pattern.shape[1] * layout.kv_block} "
            f"key positions, but the call reaches {int(q_pos.max()) + 1} and {int(kv_pos.max()) + 1}"
        )
    # Negative positions (queries before the first key, empty key slots) lie in no block.
    inside = pattern[q_block.clamp(min=0), kv_block.clamp(min=0)]
    return inside & (q_pos >= 0) & (kv_pos >= 0)


def _part(rows: Tensor, part: slice) -> Tensor:
    """Columns `part` of [B or 1, N]."""
    return rows[:, part]
