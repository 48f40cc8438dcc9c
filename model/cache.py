"""Caches whose rows have their slots from the start, and the way to a cache of any kind: `create_cache`.

    cache = create_cache(model, batch, length)      # refused, with the numbers, when there is no memory for it
    logits = model(prompt_BT, cache=cache)          # prefill, whole or in any pieces
    logits = model(token_B1, cache=cache)           # decode

Legend: B rows, T new tokens, L slots of a row, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext
from longspan.kernels.attention.caching import CachedKeys

from .cache_layers import (
    EVERYTHING,
    ContextReader,
    Exchange,
    Marks,
    NewTokens,
    Read,
    Store,
    check_memory,
    ring_positions,
    ring_writes,
)
from .cache_plan import CacheBytes, CacheKind, LayerKind, Storage, cache_bytes, check_kind, layer_kinds, pages_for
from .config import DecoderConfig
from .paging import PagedCache, PagePool

if TYPE_CHECKING:
    from .conditional import Generative, Unread

__all__ = ["CacheBytes", "ContiguousCache", "cache_bytes", "create_cache"]


class ContiguousCache:
    """Keys and values in tensors allocated once and written in place: row b has its slots in every layer.

    With `rings`, layers that see only a limited stretch to the left keep that many slots (`cache_plan`); they attend to
    the same keys as with all of them. Rows may have different lengths.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        storage: Storage | None = None,
        rings: bool = False,
        globals_possible: bool = False,
    ) -> None:
        self.batch = batch
        self.capacity = length
        self._fixed = False
        self._lanes = tuple(
            _Lane(kind, batch, config.kv_heads, config.dim_per_head, dtype=dtype, storage=storage, device=device)
            for kind in layer_kinds(config, length, rings=rings, globals_possible=globals_possible)
        )
        self._lane_of = {
            layer: (i, n) for i, lane in enumerate(self._lanes) for n, layer in enumerate(lane.kind.layers)
        }
        self._starts = [0] * batch  # tokens of each row, as the host knows them …
        self._lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)  # … and as the device does
        rings_exist = any(lane.kind.ring for lane in self._lanes)
        self._reader = ContextReader(config, keeps_flags=globals_possible or not rings_exist)
        self._given: tuple[bool, bool] | None = None  # documents and flags of the tokens held

    @property
    def length(self) -> int:
        return max(self._starts)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(self._starts)

    @property
    def nbytes(self) -> CacheBytes:
        """Counted from the tensors that exist."""
        lengths = CacheBytes(0, bookkeeping=self._lengths_B.nbytes)
        return sum((lane.store.nbytes(*lane.marks.tensors()) for lane in self._lanes), start=lengths)

    def begin(self, n_tokens: int, context: AttentionContext) -> _Step:
        given = self._reader.read(n_tokens, context, self.batch, fixed_shapes=self._fixed)
        given.must_continue(self._given)
        starts = () if self._fixed else tuple(self._starts)
        new = NewTokens(n_tokens, starts, given, self._lengths_B)
        if not new.fixed and new.reach > self.capacity:
            raise self._too_small(self.batch, new.reach)
        return _Step(self, new, [lane.begin(new) for lane in self._lanes])

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens of each row (a shared prefix, a rejected draft). A ring that has
        gone round has overwritten what stood there, so it can only be emptied."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} tokens of a cache that holds {self.length}")
        smallest = min(lane.kind.slots for lane in self._lanes)
        if 0 < length < self.length and self.length > smallest:
            raise ValueError(
                f"cannot keep {length} of {self.length} tokens: rings of {smallest} slots have overwritten the keys "
                "that token would see; use cache='contiguous' or 'paged' to go back"
            )
        self._starts = [min(start, length) for start in self._starts]
        self._lengths_B.clamp_(max=length)
        self._given = self._given if length else None

    def turn_first(self, count: int, turn: Callable[[Tensor], Tensor]) -> None:
        """Turns the keys [B, count, G, K] of each row's first tokens, in every layer. With rotary positions these then
        stand elsewhere: sinks that stay before a window that has moved on (Xiao et al. 2024, arXiv 2309.17453, §3.2).

        Raises ValueError, before anything is turned, for 8-bit storage, for more tokens than a row has, and where a
        ring holds other tokens in those slots.
        """
        if count > min(self._starts):
            raise ValueError(f"the first {count} tokens: a row has {min(self._starts)}")
        for lane in self._lanes:
            if lane.store.eight_bit:
                raise ValueError("8-bit keys cannot be turned without rounding them again; use 16 or 32 bits")
            if lane.kind.ring and count > lane.kind.sinks:
                raise ValueError(f"the first {count} tokens: a ring keeps {lane.kind.sinks} of them for good")
        for lane in self._lanes:
            for keys_BGSK in lane.store.keys:
                first_BTGK = keys_BGSK[:, :, :count].transpose(1, 2)
                first_BTGK.copy_(turn(first_BTGK))

    @contextmanager
    def fixed_step(self) -> Iterator[None]:
        """Within it, `begin` is for one token in every row, with views of full capacity and lengths that live on the
        device, so that the call can be compiled, or recorded as a CUDA graph and replayed. The token counts once the
        block is left; if something is raised there, it does not.

        Raises ValueError where a row is full.
        """
        if self.length + 1 > self.capacity:
            raise self._too_small(self.batch, self.length + 1)
        self._fixed = True
        try:
            yield
        except BaseException:
            self._lengths_B.copy_(torch.tensor(self._starts))
            raise
        finally:
            self._fixed = False
        self._starts = [start + 1 for start in self._starts]

    # -- what a step needs --------------------------------------------------------------------------------------------

    def _too_small(self, batch: int, length: int) -> ValueError:
        return ValueError(
            f"cache for {self.batch} sequences of {self.capacity} tokens: "
            f"{batch} sequences of {length} tokens do not fit"
        )


class _Step:
    """One call of the model over a `ContiguousCache`."""

    def __init__(self, cache: ContiguousCache, new: NewTokens, calls: list[tuple[Exchange, AttentionContext]]) -> None:
        self._cache, self._new, self._calls = cache, new, calls
        self.positions_BT = new.positions_BT
        self.capacity = cache.capacity
        self.reach = cache.capacity if new.fixed else new.reach

    def append(self, layer: int, k_BTGD: Tensor, v_BTGE: Tensor) -> CachedKeys:
        cache = self._cache
        if k_BTGD.shape[0] != cache.batch:
            raise cache._too_small(k_BTGD.shape[0], self.reach)
        lane, place = cache._lane_of[layer]
        return cache._lanes[lane].store.append(place, k_BTGD, v_BTGE, *self._calls[lane])

    def finish(self) -> None:
        cache, new = self._cache, self._new
        cache._lengths_B.copy_(new.ends_B)
        cache._given = new.given.kinds
        if not new.fixed:
            cache._starts = list(new.ends)


class _Lane:
    """Layers that keep the same slots of a row: their storage, and one context a call for all of them."""

    def __init__(
        self,
        kind: LayerKind,
        batch: int,
        heads: int,
        dim: int,
        *,
        dtype: torch.dtype,
        storage: Storage | None,
        device: torch.device | str,
    ) -> None:
        self.kind = kind
        self.store = Store(len(kind.layers), batch, kind.slots, heads, dim, dtype=dtype, storage=storage, device=device)
        self.marks = Marks(batch, kind.slots, documents=kind.documents, global_tokens=kind.global_tokens, device=device)

    def begin(self, new: NewTokens) -> tuple[Exchange, AttentionContext]:
        goes_round = self.kind.ring and (new.fixed or new.reach > self.kind.slots)
        exchange, context = self._wrapped(new) if goes_round else self._in_order(new)
        return exchange, self.marks.write(new, exchange, context)

    def _in_order(self, new: NewTokens) -> tuple[Exchange, AttentionContext]:
        """The slot of a token is its position."""
        if new.uniform:
            written = slice(new.starts[0], new.reach)
            return Exchange(EVERYTHING, (slice(None), written), limit=new.reach), AttentionContext()
        limit = None if new.fixed else new.reach
        return Exchange(*ring_writes(new, self.kind.slots), limit=limit), new.context(kv_lengths=new.ends_B)

    def _wrapped(self, new: NewTokens) -> tuple[Exchange, AttentionContext]:
        """Slots are written again. One token reads the ring as it is then; several read what lay there before and
        themselves, because the last of them overwrite keys that the first still see."""
        slots, sinks = self.kind.slots, self.kind.sinks
        writes = ring_writes(new, slots, sinks)
        one = slice(0, 1) if new.uniform else slice(None)  # rows alike share their positions
        if new.n_tokens == 1:
            return Exchange(*writes), new.context(kv_positions=ring_positions(new.ends_B[one], slots, sinks))
        held = min(max(new.starts), slots)
        if held == 0:
            context = AttentionContext() if new.uniform else new.context(kv_lengths=new.ends_B)
            return Exchange(*writes, read=Read.NEW), context
        joined = Exchange(*writes, read=Read.JOINED, limit=held)
        if new.uniform and new.starts[0] <= slots:  # what lies there has not gone round yet
            return joined, AttentionContext()
        before_BS = ring_positions(new.lengths_B[one], slots, sinks)[:, :held]
        own_BT = new.positions_BT if new.uniform else torch.where(new.real(), new.positions_BT, -1)
        return joined, new.context(kv_positions=torch.cat([before_BS, own_BT], dim=1))


# -- making one -------------------------------------------------------------------------------------------------------


def create_cache(
    model: Generative | Unread,
    batch: int,
    length: int,
    *,
    kind: CacheKind = "auto",
    storage: Storage | None = None,
    page_size: int = 16,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    globals_possible: bool = False,
) -> ContiguousCache | PagedCache:
    """A cache for `batch` rows of up to `length` tokens of this model; `cache_bytes` says beforehand what it weighs.

    kind              auto: windowed layers keep only what they can see, the others everything; contiguous: all layers
                      keep everything; paged: pages of `page_size` slots, which rows can share
    storage           int8 or float8_e4m3fn: keys and values in 8 bits, one scale per token and head
    dtype, device     None: those of the model's weights
    globals_possible  calls may give is_global: then windowed layers with global tokens keep everything

    Raises ValueError, before anything is allocated, for a cache that does not fit into free memory and for more tokens
    than the model has learned positions.
    """
    check_kind(kind, storage, page_size)
    config, weight = model.config, model.head_weight
    dtype, device = dtype or weight.dtype, torch.device(device or weight.device)
    if batch < 1 or length < 1:
        raise ValueError(f"a cache for {batch} sequences of {length} tokens: both are at least 1")
    if config.positions == "learned" and length > config.max_positions:
        raise ValueError(
            f"a cache for {length} tokens, but the model has learned {config.max_positions} positions; "
            f"ask for at most {config.max_positions}, or convert the model's positions"
        )
    needed = cache_bytes(
        config, batch, length, dtype, kind=kind, storage=storage, page_size=page_size, globals_possible=globals_possible
    )
    check_memory(needed.total, device, f"a cache for {batch} sequences of {length} tokens")
    if kind == "paged":
        pool = PagePool(
            config, batch * pages_for(length, page_size), page_size, dtype=dtype, device=device, storage=storage
        )
        return pool.cache([pool.open() for _ in range(batch)], length=length)
    return ContiguousCache(
        config,
        batch,
        length,
        dtype=dtype,
        device=device,
        storage=storage,
        rings=kind == "auto",
        globals_possible=globals_possible,
    )
