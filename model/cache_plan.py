"""Which keys each layer keeps, and what that weighs: settled by the config alone. (No torch here.)

    contiguous   one slot for each position, `length` of them
    ring         layers that see only a limited stretch to the left keep that many slots and overwrite the oldest; the
                 first `sink_tokens` positions stay
    paged        pages of `page_size` slots from a pool that all rows share

Legend: B rows, L slots of a row, G key/value heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from longspan.kernels.attention.spec import AttentionSpec

from .accounting import bytes_of
from .config import DecoderConfig, Seq2SeqConfig

if TYPE_CHECKING:
    import torch

CacheKind = Literal["auto", "contiguous", "paged"]
Storage = Literal["int8", "float8_e4m3fn"]

INDEX_BYTES = 8  # lengths, page tables and document ids are int64
SCALE_BYTES = 4  # fp32


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that keep the same slots of a row.

    layers         their numbers
    slots          keys that a row keeps in each
    sinks          positions 0 … sinks-1 that a ring never overwrites
    ring           the other slots are reused in turn
    documents      some spec among them separates documents, so the ids of past tokens are kept too
    global_tokens  some spec among them has global tokens, so the flags of past tokens are kept too
    """

    layers: tuple[int, ...]
    slots: int
    sinks: int
    ring: bool
    documents: bool
    global_tokens: bool


def layer_kinds(
    config: DecoderConfig, length: int, *, rings: bool = False, globals_possible: bool = True
) -> tuple[LayerKind, ...]:
    """How a cache for `length` tokens a row keeps them. `rings`: windowed layers keep no more than they can see;
    `globals_possible`: a call may flag global tokens, which every later query sees, however far back."""
    found: dict[tuple[int, int, bool], list[int]] = {}
    specs = [tuple(group.spec for group in config.head_groups(layer)) for layer in range(config.n_layers)]
    for layer, of_layer in enumerate(specs):
        slots, sinks = ring_slots(of_layer, globals_possible=globals_possible) if rings else (None, 0)
        ring = slots is not None and slots < length
        found.setdefault((slots, sinks, True) if ring and slots is not None else (length, 0, False), []).append(layer)
    return tuple(
        LayerKind(
            layers=tuple(layers),
            slots=slots,
            sinks=sinks,
            ring=ring,
            documents=any(spec.documents for layer in layers for spec in specs[layer]),
            global_tokens=not ring and any(spec.global_tokens for layer in layers for spec in specs[layer]),
        )
        for (slots, sinks, ring), layers in found.items()
    )


def ring_slots(specs: tuple[AttentionSpec, ...], *, globals_possible: bool) -> tuple[int | None, int]:
    """(slots, sinks) of a ring that serves all head groups of a layer: sinks + widest span + the query's own key. No
    slots (None) where some query may see a key that is further back."""
    spans = [spec.window.span[0] for spec in specs]
    sinks = max(spec.sink_tokens for spec in specs)
    reaches_back = any(
        spec.block_sparse is not None
        or (spec.global_tokens and globals_possible)
        or (spec.sink_tokens > 0 and spec.documents)  # each document has sinks of its own
        for spec in specs
    )
    limited = [span for span in spans if span is not None]
    if reaches_back or len(limited) < len(spans):
        return None, 0
    return sinks + max(limited) + 1, sinks


# -- bytes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """Bytes of a cache's tensors.

    keys_values  what attention reads
    scales       of 8-bit keys and values: one fp32 number per token, key/value head and tensor
    bookkeeping  lengths, page table, document ids and global flags of past tokens
    """

    keys_values: int
    scales: int = 0
    bookkeeping: int = 0

    @property
    def total(self) -> int:
        return self.keys_values + self.scales + self.bookkeeping

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(
            self.keys_values + other.keys_values, self.scales + other.scales, self.bookkeeping + other.bookkeeping
        )


def cache_bytes(
    config: DecoderConfig,
    batch: int,
    length: int,
    dtype: torch.dtype | str = "float32",
    *,
    kind: CacheKind = "auto",
    storage: Storage | None = None,
    page_size: int = 16,
    globals_possible: bool = False,
) -> CacheBytes:
    """Bytes of the cache that `create_cache` makes of the same arguments, exactly:

        keys and values   Σ layers  2 · B · slots · G · K · bytes of an element (1 with 8-bit storage)
        scales            Σ layers  2 · B · slots · G · 4, with 8-bit storage
        bookkeeping       8 · B for the lengths; per kind of layers that needs them, B · slots · 8 for document ids and
                          B · slots for global flags; paged, 8 for each entry of the page table

    where `slots` is the length, a ring's slots, or the length rounded up to whole pages.
    """
    check_kind(kind, storage, page_size)
    lengths = CacheBytes(0, bookkeeping=batch * INDEX_BYTES)
    if kind == "paged":
        pages = batch * pages_for(length, page_size)
        table = CacheBytes(0, bookkeeping=pages * INDEX_BYTES)
        return pool_bytes(config, pages, page_size, dtype, storage=storage) + table + lengths
    kinds = layer_kinds(config, length, rings=kind == "auto", globals_possible=globals_possible)
    return sum((_kind_bytes(config, of, batch * of.slots, dtype, storage) for of in kinds), start=lengths)


def pool_bytes(
    config: DecoderConfig,
    n_pages: int,
    page_size: int,
    dtype: torch.dtype | str = "float32",
    *,
    storage: Storage | None = None,
) -> CacheBytes:
    """Bytes of a `PagePool`; each cache over it adds 8 for every row and page-table entry."""
    (kind,) = layer_kinds(config, n_pages * page_size)
    return _kind_bytes(config, kind, n_pages * page_size, dtype, storage)


def _kind_bytes(
    config: DecoderConfig, kind: LayerKind, places: int, dtype: torch.dtype | str, storage: Storage | None
) -> CacheBytes:
    heads = 2 * len(kind.layers) * places * config.kv_heads
    return CacheBytes(
        keys_values=heads * config.dim_per_head * (1 if storage else bytes_of(dtype)),
        scales=heads * SCALE_BYTES if storage else 0,
        bookkeeping=places * (INDEX_BYTES * kind.documents + kind.global_tokens),
    )


def cross_cache_bytes(
    config: Seq2SeqConfig, batch: int, length: int, dtype: torch.dtype | str = "float32", *, padded: bool = False
) -> CacheBytes:
    """Bytes of what every decoder layer keeps of `batch` sources of `length` tokens, however many targets read them:
    Σ layers  2 · B · length · G · K · bytes of an element, and 8 · B for the lengths of `padded` ones."""
    half = config.decoder_half
    heads = 2 * half.n_layers * batch * length * config.cross_heads
    return CacheBytes(heads * half.dim_per_head * bytes_of(dtype), bookkeeping=batch * INDEX_BYTES * padded)


def pages_for(length: int, page_size: int) -> int:
    return -(-length // page_size)


def check_kind(kind: str, storage: str | None, page_size: int) -> None:
    """Raises ValueError for a kind, storage or page size that does not exist."""
    if page_size < 1:
        raise ValueError(f"page_size={page_size}: a page holds at least one token")
    if kind not in get_args(CacheKind):
        raise ValueError(f"cache={kind!r}: it is one of {', '.join(get_args(CacheKind))}")
    if storage is not None and storage not in get_args(Storage):
        raise ValueError(
            f"storage={storage!r}: it is one of {', '.join(get_args(Storage))}, or null for the cache's dtype"
        )
