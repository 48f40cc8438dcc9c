"""What a model asks of a key/value cache, and what attention reads from one.

A cache answers where its keys stand (positions, lengths, pages) as an `AttentionContext`; what a query may see is
decided by spec and context as everywhere else. Any object that satisfies `KeyValueCache` works, and
`longspan.kernels.testing.cache_conformance` tells whether it means what training meant.

Legend: B batch rows, T new tokens of one call, S keys that attention reads, G key/value heads, D head dim of keys, E of
values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from .context import AttentionContext

# A call of at most this many tokens reads the storage as it lies (pages, 8-bit), which the `decode` backend takes;
# longer ones read plain tensors.
AS_STORED = 16


@dataclass(frozen=True, slots=True)
class CachedKeys:
    """What one layer's attention reads: all tokens so far, the new ones among them.

    k_BSGD, v_BSGE            keys and values; with `context.page_table`, pools [n_pages, page, G, D]
    context                   where these keys and the new queries stand. One object for all layers that keep their
                              keys alike, so that masks derived from it are derived once
    k_scale_BSG, v_scale_BSG  of 8-bit keys and values: stored value × scale = value; with pages, pools
    """

    k_BSGD: Tensor
    v_BSGE: Tensor
    context: AttentionContext
    k_scale_BSG: Tensor | None = None
    v_scale_BSG: Tensor | None = None


class CacheStep(Protocol):
    """One call of the model: T new tokens in every row."""

    @property
    def positions_BT(self) -> Tensor:  # noqa: N802  # names carry shapes
        """[B or 1, T] int64, the position of each new token; padding behind a row's tokens repeats the last one's."""
        ...

    @property
    def reach(self) -> int:
        """A bound above all positions, known on the host."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens that a row may come to hold: declared when the cache was made, and the same in all of its calls."""
        ...

    def append(self, layer: int, k_BTGD: Tensor, v_BTGE: Tensor) -> CachedKeys:
        """Writes the new keys (as attention reads them: rotated, one per key/value head) and values of one layer."""
        ...

    def finish(self) -> None:
        """All layers have written: the tokens count from now on."""
        ...


@runtime_checkable
class KeyValueCache(Protocol):
    """Keys and values of past tokens, for every layer of a model.

    A call that fails between `begin` and `finish` leaves the lengths as they were.
    """

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        ...

    def begin(self, n_tokens: int, context: AttentionContext) -> CacheStep:
        """Makes room for `n_tokens` more in each row. `context` describes these alone, as queries and keys of their
        own:

        q_documents  [B, T] their documents
        is_global    [B, T] which of them are global
        kv_lengths   [B] how many of the T are real in each row, the rest being padding on the right; None: all

        Raises ValueError when they do not fit, and for a context with positions or pages, which are the cache's.
        """
        ...
