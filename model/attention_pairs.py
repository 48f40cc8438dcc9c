"""How many (query, key) pairs a spec allows in one sequence, exactly: counted, not masked. (No torch here.)"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

from longspan.kernels.attention.spec import AttentionSpec


def attention_pairs(
    spec: AttentionSpec,
    length: int,
    *,
    documents: Sequence[int] | None = None,
    n_global: int = 0,
    causal_halved: bool = True,
) -> int:
    """Pairs of one head over one sequence of `length` tokens.

    documents      lengths of the documents packed into it; only a spec that separates documents cares
    n_global       the first so many tokens of each document are global; only a spec with global_tokens cares
    causal_halved  False charges each query for the whole row (all keys, or the whole window), as older reports do
    """
    lengths = (length,) if documents is None or not spec.documents else tuple(documents)
    n_global = n_global if spec.global_tokens else 0
    bare = _bare(spec)
    total = start = 0
    for count in lengths:
        if not causal_halved:
            total += count * _row_width(bare, count, n_global)
        else:
            # Only block patterns depend on where a document starts.
            total += _pairs(bare, start if bare.block_sparse is not None else 0, count, min(n_global, count))
        start += count
    return total


def pairs_by_length(spec: AttentionSpec, lengths: Iterable[int]) -> dict[int, int]:
    """Pairs of documents of these lengths, each alone, under a spec without a block pattern."""
    bare, lengths = _bare(spec), set(lengths)
    if not spec.causal:
        return {length: _pairs(bare, 0, length, 0) for length in lengths}
    up_to = _causal_pairs_up_to(bare, max(lengths, default=0))
    return {length: up_to[length] for length in lengths}


@lru_cache(maxsize=64)
def _causal_pairs_up_to(spec: AttentionSpec, length: int) -> tuple[int, ...]:
    """Of a document of 0, 1, … `length` tokens: each contains the shorter ones."""
    return (0, *accumulate(_visible_keys(spec, 0, query, query, 0) for query in range(length)))


def _bare(spec: AttentionSpec) -> AttentionSpec:
    """Without what changes no pair, so that equal counts are made once."""
    return replace(spec, alibi=False, softcap=None, scale=None, dropout=0.0, learned_sink=False)


def _row_width(spec: AttentionSpec, length: int, n_global: int) -> int:
    left, right = spec.window.left, 0 if spec.causal else spec.window.right
    if left is None or right is None:
        return -(-length // spec.window.dilation)
    return min(length, left + 1 + right + max(spec.sink_tokens, n_global))


@lru_cache(maxsize=1024)
def _pairs(spec: AttentionSpec, start: int, length: int, n_global: int) -> int:
    """Pairs of a document at positions start … start + length - 1, counted query by query."""
    last = start + length - 1
    if spec.block_sparse is None and replace(spec.window, right=None).unlimited:
        if spec.causal:
            return length * (length + 1) // 2
        if spec.window.right is None:
            return length * length
    total = 0
    for query in range(start, start + length):
        end = query if spec.causal else last
        if query < start + n_global:
            total += end - start + 1
        else:
            total += _visible_keys(spec, start, query, end, n_global)
    return total


def _visible_keys(spec: AttentionSpec, start: int, query: int, end: int, n_global: int) -> int:
    """How many of the keys start … end an ordinary query sees."""
    window, everywhere = spec.window, start + max(spec.sink_tokens, n_global)  # keys before it are always seen
    total = min(everywhere, end + 1) - start
    first, last = everywhere, end  # the window's keys, those aside: they are counted
    if window.left is not None:
        first = max(first, query - window.left * window.dilation)
    if window.right is not None:
        last = min(last, query + window.right * window.dilation)
    if spec.block_sparse is None:
        return total + _on_the_grid(first, last, query, window.dilation)
    layout = spec.block_sparse
    for block, visible in enumerate(layout.pattern[query // layout.q_block]):
        if visible:
            low, high = max(first, block * layout.kv_block), min(last, (block + 1) * layout.kv_block - 1)
            total += _on_the_grid(low, high, query, window.dilation)
    return total


def _on_the_grid(low: int, high: int, query: int, dilation: int) -> int:
    """How many of low … high are a multiple of the dilation away from the query."""
    return 0 if low > high else (high - query) // dilation - -(-(low - query) // dilation) + 1
