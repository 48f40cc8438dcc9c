"""The per-batch tensors of attention, and `allowed`: the one definition of which key a query sees.

Legend: B batch, T queries, S keys, G key/value heads, D and E head dims; q and kv are slices into T and S.
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
    # Whoever changes a tensor of a context in place makes a new context instead, or empties this.
    derived: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

    # -- the definition ---------------------------------------------------------------------------------------------

    def allowed(
        self,
        spec: AttentionSpec,
        q: slice,
        kv: slice,
        *,
        lengths: tuple[int, int] | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Which of the keys in `kv` each query in `q` sees: bool, broadcastable to [B, q, kv].

        `q` and `kv` are slices with explicit ends into the T queries and S keys. `lengths` is (T, S); without it, the
        tensors of the context tell T and S, and where none does, the slices' ends stand for them (bottom-right
        alignment is then to those ends). `device` is for contexts without tensors.

            visible = exists(k) ∧ same document ∧ (k ≤ q if causal)
                      ∧ ((in window ∧ in block layout) ∨ sink(k) ∨ global(k) ∨ global(q))

        Raises ValueError when the spec needs a tensor that the context lacks, or the tensors' lengths disagree.
        """
        n_queries, n_keys = self._lengths(spec, q.stop, kv.stop) if lengths is None else lengths
        q_pos = self.query_positions(n_queries, n_keys, device)[:, q, None]
        kv_pos = self.key_positions(n_keys, device)[:, None, kv]

        visible = in_window(spec.window, q_pos, kv_pos)
        if spec.block_sparse is not None:
            visible = visible & in_layout(spec.block_sparse, q_pos, kv_pos)
        if spec.sink_tokens:
            visible = visible | self.sink_keys(spec, n_queries, n_keys, device)[:, None, kv]
        if spec.global_tokens and self.is_global is not None:
            visible = visible | self.is_global[:, None, kv]
            visible = visible | self.global_queries(spec, n_queries, n_keys)[:, q, None]

        exists = self.existing_keys(n_keys)
        if exists is not None:
            visible = visible & exists[:, None, kv]
        if spec.causal:
            visible = visible & (kv_pos <= q_pos)
        if spec.documents:
            q_documents, kv_documents = self.documents(n_queries, n_keys)
            visible = visible & (q_documents[:, q, None] == kv_documents[:, None, kv])
        return visible

    # -- its parts, also used by backends that compile the definition instead of materialising it ---------------------

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
        return torch.arange(n_keys - n_queries, n_keys, device=self.device(device))[None, :]

    def key_positions(self, n_keys: int, device: torch.device | None = None) -> Tensor:
        """[B or 1, S] absolute positions of the keys."""
        if self.kv_positions is not None:
            return self.kv_positions
        return torch.arange(n_keys, device=self.device(device))[None, :]

    def existing_keys(self, n_keys: int) -> Tensor | None:
        """[B, S] bool: slots that hold a key (within kv_lengths, no negative position); None: all of them."""
        exists = None
        if self.kv_positions is not None:
            exists = self.kv_positions >= 0
        if self.kv_lengths is not None:
            within = torch.arange(n_keys, device=self.kv_lengths.device)[None, :] < self.kv_lengths[:, None]
            exists = within if exists is None else exists & within
        return exists

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
        exists = self.existing_keys(n_keys)
        exists = torch.ones_like(kv_pos, dtype=torch.bool) if exists is None else exists
        # Relabel the ids to 0 … S-1 in each row (sorted runs), so that one scatter finds every document's start
        # whatever the ids are; all shapes are static, so this traces.
        ids, order = kv_documents.sort(dim=1)
        run = torch.zeros_like(order)
        run[:, 1:] = (ids[:, 1:] != ids[:, :-1]).cumsum(dim=1)
        label = torch.empty_like(order).scatter(1, order, run)
        far = torch.iinfo(kv_pos.dtype).max // 2
        start = torch.full_like(kv_pos, far).scatter_reduce(1, label, torch.where(exists, kv_pos, far), "amin")
        return exists & (kv_pos - start.gather(1, label) < spec.sink_tokens)

    def global_queries(self, spec: AttentionSpec, n_queries: int, n_keys: int) -> Tensor:
        """[B, T] bool: queries whose own key (same position, and same document under `spec.documents`) is global."""
        if self.is_global is None:
            raise ValueError("the context has no is_global")
        exists = self.existing_keys(n_keys)
        is_global = self.is_global if exists is None else self.is_global & exists
        if spec.documents:
            q_documents, kv_documents = self.documents(n_queries, n_keys)
        else:
            q_documents = kv_documents = None

        if self.q_positions is None and self.kv_positions is None:  # query i's own key is key S - T + i
            before = max(0, n_queries - n_keys)  # queries that stand before the first key
            own = slice(max(0, n_keys - n_queries), n_keys)
            flags = is_global[:, own]
            if q_documents is not None and kv_documents is not None:
                flags = flags & (q_documents[:, before:] == kv_documents[:, own])
            return torch.nn.functional.pad(flags, (before, 0))

        own_key = (
            self.query_positions(n_queries, n_keys)[:, :, None]
            == self.key_positions(n_keys, is_global.device)[:, None, :]
        )
        if q_documents is not None and kv_documents is not None:
            own_key = own_key & (q_documents[:, :, None] == kv_documents[:, None, :])
        return (own_key & is_global[:, None, :]).any(dim=-1)

    def without_empty_slots(self, k_BSGD: Tensor, v_BSGE: Tensor) -> tuple[Tensor, Tensor]:
        """k and v with zeros in the slots that hold no key. What lies there may be anything, and 0 · NaN is NaN, so a
        weight of zero does not keep it out."""
        exists = self.existing_keys(k_BSGD.shape[1])
        if exists is None:
            return k_BSGD, v_BSGE
        gone = ~exists[:, :, None, None]
        return k_BSGD.masked_fill(gone, 0), v_BSGE.masked_fill(gone, 0)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are given, by name."""
        return {name: tensor for name in _TENSORS if (tensor := getattr(self, name)) is not None}

    def device(self, default: torch.device | None = None) -> torch.device | None:
        """Where the context lives; `default` when it has no tensors."""
        for tensor in self.tensors().values():
            return tensor.device
        return default

    def _lengths(self, spec: AttentionSpec, n_queries: int, n_keys: int) -> tuple[int, int]:
        """T and S as the tensors tell them; the arguments where none does."""
        documents = (self.q_documents, self.kv_documents) if spec.documents else (None, None)
        for tensor in (self.q_positions, documents[0]):
            if tensor is not None:
                n_queries = tensor.shape[1]
        for tensor in (self.kv_positions, documents[1], self.is_global):
            if tensor is not None:
                n_keys = tensor.shape[1]
        if spec.documents and (documents[0] is None) != (documents[1] is None):  # one serves both
            n_queries = n_keys = next(ids.shape[1] for ids in documents if ids is not None)
        return n_queries, n_keys


_TENSORS = ("q_positions", "kv_positions", "q_documents", "kv_documents", "is_global", "kv_lengths", "page_table")


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
    """Elementwise: does the block pattern let the query at `q_pos` look at the key at `kv_pos`?

    Raises ValueError for a position past the pattern (under torch.compile, where values cannot be looked at, the
    gather itself fails)."""
    pattern = torch.tensor(layout.pattern, dtype=torch.bool, device=q_pos.device)
    q_block, kv_block = q_pos // layout.q_block, kv_pos // layout.kv_block
    if not torch.compiler.is_compiling() and (
        int(q_block.max()) >= pattern.shape[0] or int(kv_block.max()) >= pattern.shape[1]
    ):
        raise ValueError(
            f"block_sparse covers {pattern.shape[0] * layout.q_block} query and {pattern.shape[1] * layout.kv_block} "
            f"key positions, but the call reaches {int(q_pos.max()) + 1} and {int(kv_pos.max()) + 1}"
        )
    return in_layout_pattern(layout, pattern, q_pos, kv_pos)


def in_layout_pattern(layout: BlockLayout, pattern: Tensor, q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    """`in_layout` with the pattern as a tensor [query blocks, key blocks] and no check."""
    # Negative positions (queries before the first key, empty key slots) lie in no block.
    q_block, kv_block = (q_pos // layout.q_block).clamp(min=0), (kv_pos // layout.kv_block).clamp(min=0)
    return pattern[q_block, kv_block] & (q_pos >= 0) & (kv_pos >= 0)
