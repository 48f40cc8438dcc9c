"""Every kind of cache means what training meant, whatever the layers, pieces and rows; and known bugs are seen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionSpec, Feature, Window
from longspan.kernels.attention.caching import AS_STORED, CachedKeys, CacheStep, KeyValueCache
from longspan.kernels.attention.quantize import dequantize, quantize
from longspan.kernels.testing import CacheCase, CacheReport, ConformanceError, cache_conformance
from longspan.model import cache as cache_module
from longspan.model import cache_layers, cache_plan, paging
from longspan.model.cache import ContiguousCache
from longspan.model.cache_plan import Storage
from longspan.model.config import AttentionPlan, DecoderConfig, HeadGroup
from longspan.model.paging import PagedCache, PagePool

Layers = tuple[tuple[AttentionSpec, ...], ...]
MakeCache = Callable[[Layers, int, int, int, int, torch.dtype], KeyValueCache]


def config_of(layers: Layers, length: int, kv_heads: int, head_dim: int) -> DecoderConfig:
    """A decoder with these layers; its cache needs nothing else of it."""
    patterns = {
        f"layer {i}": tuple(HeadGroup(heads=kv_heads // len(specs), spec=spec) for spec in specs)
        for i, specs in enumerate(layers)
    }
    return DecoderConfig(
        vocab_size=2,
        n_layers=len(layers),
        d_model=kv_heads * head_dim,
        n_heads=kv_heads,
        head_dim=head_dim,
        d_ff=1,
        max_positions=length,
        positions="none",
        attention=AttentionPlan(patterns=patterns, layers=tuple(patterns)),
    )


def poisoned(stores: list[cache_layers.Store]) -> None:
    for store in stores:
        for x in store.tensors():
            x.fill_(torch.nan if x.is_floating_point() else 127)


def contiguous(storage: Storage | None = None, *, rings: bool = False, globals_possible: bool = True) -> MakeCache:
    def make(
        layers: Layers, batch: int, length: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> ContiguousCache:
        cache = ContiguousCache(
            config_of(layers, length, kv_heads, head_dim),
            batch,
            length,
            dtype=dtype,
            storage=storage,
            rings=rings,
            globals_possible=globals_possible,
        )
        poisoned([lane.store for lane in cache._lanes])
        return cache

    return make


def paged(storage: Storage | None = None, *, page_size: int = 4, wrap: type | None = None) -> MakeCache:
    def make(
        layers: Layers, batch: int, length: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> KeyValueCache:
        pages = batch * -(-length // page_size)
        config = config_of(layers, length, kv_heads, head_dim)
        pool = PagePool(config, pages + 2 * batch * (wrap is not None), page_size, dtype=dtype, storage=storage)
        poisoned([pool.store])
        order = torch.randperm(pool.allocator.total, generator=torch.Generator().manual_seed(length))
        pool.allocator._free = order.tolist()
        cache = pool.cache([pool.open() for _ in range(batch)], length=length)
        return cache if wrap is None else wrap(cache)

    return make


class Forking:
    """Before each call every row is forked, the fork goes on, and the one left behind writes something else."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache

    @property
    def length(self) -> int:
        return self.cache.length

    def begin(self, n_tokens: int, context: AttentionContext) -> CacheStep:
        pool, behind = self.cache.pool, self.cache.sequences
        ahead = [sequence.fork() for sequence in behind]
        marks = AttentionContext(
            q_documents=None if context.q_documents is None else context.q_documents[:, :1] + 1,
            is_global=None if context.is_global is None else ~context.is_global[:, :1],
        )
        self.cache = pool.cache(ahead, length=self.cache.capacity)
        step = self.cache.begin(n_tokens, context)
        if self.cache.length < self.cache.capacity:
            other = pool.cache(behind, length=self.cache.capacity)
            garbage = other.begin(1, marks)
            x = torch.full((len(behind), 1, *pool.store.keys[0].shape[1::2]), 1e3)
            for layer in range(len(pool.store.keys)):
                garbage.append(layer, x, x)
            garbage.finish()
        for sequence in behind:
            sequence.free()
        return step

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)


class InFixedSteps:
    """Single tokens of all rows go through `fixed_step`, as a recorded step takes them; everything else as it comes."""

    def __init__(self, cache: ContiguousCache | PagedCache) -> None:
        self.cache = cache

    @property
    def length(self) -> int:
        return self.cache.length

    def begin(self, n_tokens: int, context: AttentionContext) -> CacheStep:
        if n_tokens > 1 or context.kv_lengths is not None:
            return self.cache.begin(n_tokens, context)
        stack = ExitStack()
        stack.enter_context(self.cache.fixed_step())
        FIXED_STEPS.append(n_tokens)
        return _LeftWhenFinished(self.cache.begin(n_tokens, context), stack)

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)


FIXED_STEPS: list[int] = []


class _LeftWhenFinished:
    def __init__(self, step: CacheStep, stack: ExitStack) -> None:
        self._step, self._stack = step, stack
        self.positions_BT, self.reach, self.capacity = step.positions_BT, step.reach, step.capacity

    def append(self, layer: int, k_BTGD: Tensor, v_BTGE: Tensor) -> CachedKeys:
        return self._step.append(layer, k_BTGD, v_BTGE)

    def finish(self) -> None:
        self._step.finish()
        self._stack.close()


def in_fixed_steps(make: MakeCache) -> MakeCache:
    def wrapped(*arguments: Any) -> KeyValueCache:
        cache = make(*arguments)
        assert isinstance(cache, ContiguousCache | PagedCache)
        return InFixedSteps(cache)

    return wrapped


def in_eight_bits(storage: Storage) -> Callable[[Tensor], Tensor]:
    def stored(x: Tensor) -> Tensor:
        return dequantize(*quantize(x, getattr(torch, storage)), torch.float32)

    return stored


KINDS: dict[str, Callable[[Storage | None], MakeCache]] = {
    "contiguous": contiguous,
    "rings": lambda storage: contiguous(storage, rings=True),
    "paged": paged,
    "pages of 16": lambda storage: paged(storage, page_size=16),
    "forked": lambda storage: paged(storage, wrap=Forking),
    "rings in fixed steps": lambda storage: in_fixed_steps(contiguous(storage, rings=True)),
    "pages in fixed steps": lambda storage: in_fixed_steps(paged(storage)),
}


def conforms(kind: str, storage: Storage | None = None, **settings: Any) -> CacheReport:
    stored = None if storage is None else in_eight_bits(storage)
    return cache_conformance(KINDS[kind](storage), stored=stored, **settings)


@pytest.mark.parametrize(
    ("kind", "storage"),
    [*((kind, None) for kind in KINDS), ("rings", "int8"), ("forked", "int8"), ("paged", "float8_e4m3fn")],
)
def test_every_cache_conforms(kind: str, storage: Storage | None) -> None:
    FIXED_STEPS.clear()
    conforms(kind, storage, thorough=False, examples=5).raise_if_failed()
    assert (len(FIXED_STEPS) > 20) == ("fixed" in kind)


@pytest.mark.parametrize("backend", ["reference", ("decode", "reference")])
@pytest.mark.parametrize(("kind", "storage"), [("rings", None), ("paged", "int8")])
def test_caches_conform_on_every_backend(kind: str, storage: Storage | None, backend: str | tuple[str, ...]) -> None:
    conforms(kind, storage, backend=backend, thorough=False, examples=5, seed=1).raise_if_failed()


def test_caches_conform_in_half_precision() -> None:
    report = conforms("rings", dtypes=[torch.bfloat16, torch.float16], thorough=False, examples=5, seed=2)
    report.raise_if_failed()


def test_rings_that_forget_global_keys_conform_without_flags() -> None:
    make = contiguous(rings=True, globals_possible=False)
    report = cache_conformance(make, without={Feature.GLOBAL_TOKENS}, thorough=False, examples=5, seed=3)
    report.raise_if_failed()
    flags = "this cache forgets keys outside of the window, global ones too"
    assert flags in cache_conformance(make, thorough=False, examples=0).text()


@pytest.mark.slow
@pytest.mark.parametrize("storage", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_cache_conforms_in_every_case(kind: str, storage: Storage | None) -> None:
    conforms(kind, storage, examples=100, seed=4).raise_if_failed()


# -- known bugs -------------------------------------------------------------------------------------------------------


def rings_read_only_what_is_left(patch: pytest.MonkeyPatch) -> None:
    """Of a chunk, only the last keys fit, and the first queries miss theirs."""

    def wrapped(lane: Any, new: cache_layers.NewTokens) -> tuple[cache_layers.Exchange, AttentionContext]:
        writes = cache_layers.ring_writes(new, lane.kind.slots, lane.kind.sinks)
        one = slice(0, 1) if new.uniform else slice(None)
        positions = cache_layers.ring_positions(new.ends_B[one], lane.kind.slots, lane.kind.sinks)
        return cache_layers.Exchange(*writes), new.context(kv_positions=positions)

    patch.setattr(cache_module._Lane, "_wrapped", wrapped)


def the_wrong_end_is_read(patch: pytest.MonkeyPatch) -> None:
    right = cache_layers.Exchange._read

    def from_the_end(exchange: cache_layers.Exchange, held: Tensor, new: Tensor) -> Tensor:
        read = right(exchange, held, new)
        limit = exchange.limit if exchange.read is cache_layers.Read.STORED else None
        return held[:, -limit:] if limit is not None and new.shape[1] == 1 else read

    patch.setattr(cache_layers.Exchange, "_read", from_the_end)


def rings_are_one_slot_short(patch: pytest.MonkeyPatch) -> None:
    right = cache_plan.ring_slots

    def short(*args: Any, **settings: Any) -> tuple[int | None, int]:
        slots, sinks = right(*args, **settings)
        return (slots if slots is None else max(slots - 1, sinks + 1)), sinks

    patch.setattr(cache_plan, "ring_slots", short)


def rings_overwrite_the_sinks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cache_layers, "ring_slot", lambda positions, slots, sinks: positions % slots)


def forks_write_to_shared_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(paging.PageAllocator, "users", lambda self, page: 1)


def copies_forget_the_marks(patch: pytest.MonkeyPatch) -> None:
    right = PagePool.copy_pages

    def keys_alone(pool: PagePool, sources: list[int], targets: list[int]) -> None:
        marks, pool.marks = pool.marks, cache_layers.Marks(1, 1, documents=False, global_tokens=False, device="cpu")
        right(pool, sources, targets)
        pool.marks = marks

    patch.setattr(PagePool, "copy_pages", keys_alone)


def lengths_stay_after_going_back(patch: pytest.MonkeyPatch) -> None:
    def host_alone(cache: ContiguousCache, length: int) -> None:
        cache._starts = [min(start, length) for start in cache._starts]

    patch.setattr(ContiguousCache, "truncate", host_alone)


def lengths_stay_after_pages_are_left(patch: pytest.MonkeyPatch) -> None:
    right = PagedCache._show

    def pages_alone(cache: PagedCache) -> None:
        cache._lengths_shown = list(cache.lengths)
        right(cache)

    patch.setattr(PagedCache, "_show", pages_alone)


def the_table_is_one_page_off(patch: pytest.MonkeyPatch) -> None:
    right = PagedCache._show

    def shifted(cache: PagedCache) -> None:
        before = list(cache._pages_shown)
        right(cache)
        for row, pages in enumerate(cache._pages_shown):
            if pages is not before[row]:
                cache._table_BP[row] = cache._table_BP[row].roll(1)

    patch.setattr(PagedCache, "_show", shifted)


def padding_is_kept(patch: pytest.MonkeyPatch) -> None:
    right = cache_layers.ContextReader.read

    def all_real(reader: Any, n_tokens: int, context: AttentionContext, batch: int, **settings: Any) -> Any:
        marks = AttentionContext(q_documents=context.q_documents, is_global=context.is_global)
        return right(reader, n_tokens, marks, batch, **settings)

    patch.setattr(cache_layers.ContextReader, "read", all_real)


def a_first_prefill_is_not_rounded(patch: pytest.MonkeyPatch) -> None:
    right = cache_layers.Store.append

    def exact(store: Any, layer: int, k: Tensor, v: Tensor, exchange: Any, context: AttentionContext) -> CachedKeys:
        keys = right(store, layer, k, v, exchange, context)
        new = exchange.read is cache_layers.Read.NEW
        return CachedKeys(k, v, context) if new and k.shape[1] > AS_STORED else keys

    patch.setattr(cache_layers.Store, "append", exact)


BUGS: dict[Callable[[pytest.MonkeyPatch], None], tuple[str, Storage | None]] = {
    rings_read_only_what_is_left: ("rings", None),
    the_wrong_end_is_read: ("contiguous", None),
    rings_are_one_slot_short: ("rings", None),
    rings_overwrite_the_sinks: ("rings", None),
    forks_write_to_shared_pages: ("forked", None),
    copies_forget_the_marks: ("forked", None),
    lengths_stay_after_going_back: ("contiguous", None),
    lengths_stay_after_pages_are_left: ("forked", None),
    the_table_is_one_page_off: ("paged", None),
    padding_is_kept: ("contiguous", None),
    a_first_prefill_is_not_rounded: ("rings", "int8"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_known_bugs_are_seen(bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, storage = BUGS[bug]
    bug(monkeypatch)
    report = conforms(kind, storage, thorough=False, examples=0)
    assert not report.ok
    assert "out" in report.failures or "positions" in report.failures, report.text()


def test_a_report_names_the_smallest_case(monkeypatch: pytest.MonkeyPatch) -> None:
    rings_are_one_slot_short(monkeypatch)
    report = conforms("rings", thorough=False, examples=25)
    case, problem = report.failures["out"]
    assert case.size < 40, report.text()
    assert "Window(left=" in problem
    with pytest.raises(ConformanceError, match="the cache DOES NOT CONFORM"):
        report.raise_if_failed()
    names = {"AttentionSpec": AttentionSpec, "Window": Window, "CacheCase": CacheCase}
    assert eval(repr(case), names) == case
