"""What caches keep, what that weighs, what they refuse; and calls of fixed shapes, as CUDA graphs need them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionSpec, BlockLayout, Window
from longspan.kernels.attention.caching import KeyValueCache
from longspan.model import cache_layers
from longspan.model.cache import ContiguousCache, cache_bytes, create_cache
from longspan.model.cache_layers import ring_positions, ring_slot
from longspan.model.cache_plan import layer_kinds, ring_slots
from longspan.model.config import AttentionPlan
from longspan.model.decoder import Decoder
from longspan.model.paging import PagedCache, PagePool
from longspan.model.zoo import build

TOKENS = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
EVERY_KIND = pytest.mark.parametrize("kind", ["auto", "contiguous", "paged"])
EVERY_STORAGE = pytest.mark.parametrize("storage", [None, "int8", "float8_e4m3fn"])


def causal(**fields: object) -> AttentionSpec:
    return AttentionSpec(causal=True, **fields)  # type: ignore[arg-type]


FULL, WINDOW = causal(), causal(window=Window(left=4))
SINKS = causal(window=Window(left=3, dilation=2), sink_tokens=2)
PLAN = AttentionPlan(patterns={"full": FULL, "window": WINDOW, "sinks": SINKS}, layers=("full", "window", "sinks"))
MARKED = AttentionPlan(
    patterns={
        "window": causal(window=Window(left=4), documents=True),
        "full": causal(documents=True),
        "global": causal(window=Window(left=2), global_tokens=True),
    },
    layers=("window", "full", "global"),
)


def decoder(attention: AttentionPlan = PLAN, **overrides: object) -> Decoder:
    return build("llama-tiny", {"n_layers": 3, "attention": attention, "init_std": 0.2, **overrides}, seed=0).eval()


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specs", "slots", "sinks"),
    [
        ([WINDOW], 5, 0),  # four neighbours and the query itself
        ([causal(window=Window(left=0))], 1, 0),
        ([SINKS], 2 + 3 * 2 + 1, 2),
        ([WINDOW, SINKS], 2 + 6 + 1, 2),  # the widest head group, the most sinks
        ([WINDOW, FULL], None, 0),
        ([causal(sink_tokens=3)], None, 0),
        ([causal(window=Window(left=4), documents=True)], 5, 0),
        ([causal(window=Window(left=4), documents=True, sink_tokens=1)], None, 0),  # sinks of every document
        ([causal(window=Window(left=4), block_sparse=BlockLayout.from_rows([[1]]))], None, 0),
        ([causal(window=Window(left=4), global_tokens=True)], None, 0),
    ],
)
def test_slots_of_a_ring(specs: list[AttentionSpec], slots: int | None, sinks: int) -> None:
    assert ring_slots(tuple(specs), globals_possible=True) == (slots, sinks)


def test_global_tokens_that_are_never_given_cost_nothing() -> None:
    assert ring_slots((causal(window=Window(left=4), global_tokens=True),), globals_possible=False) == (5, 0)


def test_layers_of_a_kind_are_kept_together() -> None:
    config = decoder(n_layers=6).config
    kinds = {kind.layers: (kind.slots, kind.ring) for kind in layer_kinds(config, 100, rings=True)}
    assert kinds == {(0, 3): (100, False), (1, 4): (5, True), (2, 5): (9, True)}
    kinds = {kind.layers: (kind.slots, kind.ring) for kind in layer_kinds(config, 7, rings=True)}
    assert kinds == {(0, 2, 3, 5): (7, False), (1, 4): (5, True)}  # a ring longer than the text would be no ring
    assert [kind.layers for kind in layer_kinds(config, 100)] == [tuple(range(6))]


def test_a_ring_holds_the_newest_of_each_slot() -> None:
    """Against writing positions one by one."""
    for slots, sinks in ((1, 0), (5, 0), (5, 1), (7, 6)):
        held = [-1] * slots
        for position in range(20):
            assert ring_positions(torch.tensor([position]), slots, sinks).tolist() == [held]
            slot = int(ring_slot(torch.tensor(position), slots, sinks))
            assert (slot == position) if position < sinks else (slot >= sinks)
            held[slot] = position


# -- bytes ------------------------------------------------------------------------------------------------------------


@EVERY_KIND
@EVERY_STORAGE
@pytest.mark.parametrize("attention", [PLAN, MARKED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(
    kind: str, storage: str | None, attention: AttentionPlan, dtype: torch.dtype
) -> None:
    model = decoder(attention, n_kv_heads=2)
    cache = create_cache(model, 3, 50, kind=kind, storage=storage, dtype=dtype)  # type: ignore[arg-type]
    expected = cache_bytes(model.config, 3, 50, dtype, kind=kind, storage=storage)  # type: ignore[arg-type]
    assert cache.nbytes == expected
    owners = [cache.pool.store, cache.pool.marks, cache] if isinstance(cache, PagedCache) else [cache]
    for lane in cache._lanes if isinstance(cache, ContiguousCache) else ():
        owners += [lane.store, lane.marks]
    kept = [x for owner in owners for x in vars(owner).values()]
    tensors = [x for each in kept for x in (each if isinstance(each, tuple) else (each,)) if isinstance(x, Tensor)]
    assert sum(x.nbytes for x in tensors) == expected.total


def test_bytes_by_hand() -> None:
    config = decoder(MARKED, n_layers=6, n_kv_heads=2, n_heads=4, head_dim=16).config
    assert cache_bytes(config, 3, 50).keys_values == 3 * 2 * 2 * 16 * 4 * 2 * (5 + 50 + 3)
    assert cache_bytes(config, 3, 50, globals_possible=True).keys_values == 3 * 2 * 2 * 16 * 4 * 2 * (5 + 50 + 50)
    assert cache_bytes(config, 3, 50, kind="contiguous").keys_values == 3 * 2 * 2 * 16 * 4 * 6 * 50
    assert cache_bytes(config, 3, 50, kind="contiguous").bookkeeping == 3 * 8 + 3 * 50 * (8 + 1)
    assert cache_bytes(config, 3, 50).bookkeeping == 3 * 8 + 3 * (5 + 50) * 8
    assert cache_bytes(config, 3, 50, storage="int8").keys_values * 4 == cache_bytes(config, 3, 50).keys_values
    assert cache_bytes(config, 3, 50, storage="int8").scales == 3 * 2 * 2 * 4 * 2 * (5 + 50 + 3)
    paged = cache_bytes(config, 3, 50, "bfloat16", kind="paged", page_size=16)
    assert paged.keys_values == 3 * 4 * 16 * 2 * 2 * 16 * 2 * 6
    assert paged.bookkeeping == 3 * 8 + 3 * 4 * 8 + 3 * 4 * 16 * 9
    assert paged.total == paged.keys_values + paged.bookkeeping


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_cache_beyond_memory_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder()
    monkeypatch.setattr(cache_layers, "free_memory", lambda device: 3 * 2**29)
    monkeypatch.setattr(cache_layers.torch, "zeros", lambda *a, **k: pytest.fail("allocated"))
    for kind in ("auto", "contiguous", "paged"):
        total = cache_bytes(model.config, 64, 100_000, kind=kind).total / 2**30  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=rf"64 sequences of 100000 tokens takes {total:.2f} GiB, but cpu has 1.50 GiB"
        ):
            create_cache(model, 64, 100_000, kind=kind)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"a pool of 1000000 pages of 16 tokens takes .* GiB, but cpu has 1.50 GiB free"
    ):
        PagePool(model.config, 1_000_000)


def test_free_memory_is_the_machines() -> None:
    free = cache_layers.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert cache_layers.free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "ring"}, "cache='ring': it is one of auto, contiguous, paged"),
        ({"storage": "int4"}, "storage='int4': it is one of int8, float8_e4m3fn, or null"),
        ({"length": 0}, "a cache for 3 sequences of 0 tokens"),
        ({"kind": "paged", "page_size": 0}, "page_size=0"),
    ],
)
def test_settings_that_do_not_exist(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_cache(decoder(), 3, **{"length": 8, **settings})  # type: ignore[arg-type]


def test_more_tokens_than_learned_positions_are_refused() -> None:
    model = build("gpt-tiny", seed=0)
    create_cache(model, 1, 128)
    with pytest.raises(ValueError, match="a cache for 129 tokens, but the model has learned 128 positions"):
        create_cache(model, 1, 129)


WRONG = {
    "q_positions": (
        AttentionContext(q_positions=torch.zeros(3, 2, dtype=torch.int64)),
        "context.q_positions with a cache",
    ),
    "kv_documents": (
        AttentionContext(kv_documents=torch.zeros(3, 2, dtype=torch.int64)),
        "context.kv_documents with a",
    ),
    "pages": (AttentionContext(page_table=torch.zeros(3, 2, dtype=torch.int64)), "context.page_table with a cache"),
    "all keys' documents": (
        AttentionContext(q_documents=torch.zeros(3, 7, dtype=torch.int64)),
        r"context.q_documents has shape \[3, 7\]; with a cache it describes the new tokens, \[3, 2\]",
    ),
    "lengths of the cache": (AttentionContext(kv_lengths=torch.tensor([2, 3, 2])), r"kv_lengths=\[2, 3, 2\]: of 2 new"),
    "negative": (AttentionContext(kv_lengths=torch.tensor([2, -1, 2])), r"each row has 0 … 2"),
    "no documents": (
        AttentionContext(),
        "q_documents: this call comes without it, but the tokens in the cache came with",
    ),
    "flags": (
        AttentionContext(
            q_documents=torch.zeros(3, 2, dtype=torch.int64), is_global=torch.ones(3, 2, dtype=torch.bool)
        ),
        "is_global: this call comes with it, but the tokens in the cache came without",
    ),
}


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_contexts_are_refused_by_name_and_change_nothing(kind: str, name: str) -> None:
    model = decoder(MARKED)
    cache = create_cache(model, 3, 20, kind=kind)  # type: ignore[arg-type]
    with torch.no_grad():
        model(TOKENS[:, :5], AttentionContext(q_documents=torch.zeros(3, 5, dtype=torch.int64)), cache=cache)
        context, said = WRONG[name]
        with pytest.raises(ValueError, match=said):
            model(TOKENS[:, 5:7], context, cache=cache)
        assert cache.lengths == (5, 5, 5)
        again = AttentionContext(q_documents=torch.zeros(3, 2, dtype=torch.int64))
        found = model(TOKENS[:, 5:7], again, cache=cache)
        expected = model(TOKENS[:, :7], AttentionContext(q_documents=torch.zeros(3, 7, dtype=torch.int64)))[:, 5:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_rings_refuse_flags_that_they_would_forget() -> None:
    model = decoder(MARKED)
    flags = AttentionContext(is_global=torch.zeros(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="this cache forgets keys outside of the window, global ones too"):
        create_cache(model, 3, 20).begin(4, flags)
    for kind, possible in (("contiguous", False), ("paged", False), ("auto", True)):
        create_cache(model, 3, 20, kind=kind, globals_possible=possible).begin(4, flags)  # type: ignore[arg-type]


@EVERY_KIND
def test_too_many_tokens_or_rows_are_refused(kind: str) -> None:
    model = decoder()
    cache = create_cache(model, 3, 12, kind=kind)  # type: ignore[arg-type]
    with torch.no_grad():
        model(TOKENS[:, :11], cache=cache)
        with pytest.raises(ValueError, match="cache for 3 sequences of 12 tokens: 3 sequences of 13 tokens do not fit"):
            model(TOKENS[:, 11:13], cache=cache)
        with pytest.raises(ValueError, match="sequences"):
            model(TOKENS[:1, 11:12], cache=cache)  # one row must not be spread over all
        with pytest.raises(ValueError, match="a call of 0 tokens"):
            cache.begin(0, AttentionContext())
        assert cache.lengths == (11, 11, 11)
        model(TOKENS[:, 11:12], cache=cache)
    assert isinstance(cache, KeyValueCache)
    assert cache.length == 12


# -- going back -------------------------------------------------------------------------------------------------------


@EVERY_KIND
def test_a_cache_can_forget_its_end(kind: str) -> None:
    model = decoder(AttentionPlan(patterns={"f": FULL}, layers=("f",)) if kind == "auto" else PLAN)
    cache = create_cache(model, 3, 20, kind=kind)  # type: ignore[arg-type]
    with torch.no_grad():
        model(TOKENS[:, :9].flip(1), cache=cache)
        cache.truncate(0)
        model(TOKENS[:, :11], AttentionContext(kv_lengths=torch.tensor([11, 3, 8])), cache=cache)
        model(TOKENS[:, :4], cache=cache)
        cache.truncate(8)
        assert cache.lengths == (8, 7, 8)
        found = model(TOKENS[:, 20:22], cache=cache)
        rows = [TOKENS[0, :8], torch.cat([TOKENS[1, :3], TOKENS[1, :4]]), TOKENS[2, :8]]
        for i, row in enumerate(rows):
            expected = model(torch.cat([row, TOKENS[i, 20:22]])[None])[0, -2:]
            torch.testing.assert_close(found[i], expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="cannot keep 11 tokens of a cache that holds 10"):
        cache.truncate(11)


def test_a_ring_that_went_round_can_only_be_emptied() -> None:
    model = decoder()
    cache = create_cache(model, 3, 20)
    with torch.no_grad():
        model(TOKENS[:, :5], cache=cache)
        cache.truncate(4)
        model(TOKENS[:, 4:6], cache=cache)
        with pytest.raises(ValueError, match="cannot keep 5 of 6 tokens: rings of 5 slots have overwritten"):
            cache.truncate(5)
        cache.truncate(0)
        torch.testing.assert_close(model(TOKENS[:, :9], cache=cache), model(TOKENS[:, :9]), atol=1e-4, rtol=0)


def test_only_keys_that_stay_where_they_are_can_be_turned() -> None:
    def turn(k_BTGK: Tensor) -> Tensor:
        return -k_BTGK

    full, ring = (decoder(AttentionPlan(patterns={"one": spec}, layers=("one",))) for spec in (FULL, SINKS))
    for model, count in ((full, 3), (ring, 2)):
        cache = create_cache(model, 3, 20)
        assert isinstance(cache, ContiguousCache)
        with torch.no_grad():
            model(TOKENS[:, :5], cache=cache)
        (lane,) = cache._lanes
        before = [keys_BGSK.clone() for keys_BGSK in lane.store.keys]
        cache.turn_first(count, turn)
        for old, new in zip(before, lane.store.keys, strict=True):
            assert torch.equal(new[:, :, :count], -old[:, :, :count])
            assert torch.equal(new[:, :, count:], old[:, :, count:])
    both = AttentionPlan(patterns={"full": FULL, "sinks": SINKS}, layers=("full", "sinks"))
    cache = create_cache(decoder(both), 3, 20)
    assert isinstance(cache, ContiguousCache)
    with torch.no_grad():
        decoder(both)(TOKENS[:, :5], cache=cache)
    before = [keys_BGSK.clone() for lane in cache._lanes for keys_BGSK in lane.store.keys]
    with pytest.raises(ValueError, match="the first 3 tokens: a ring keeps 2 of them for good"):
        cache.turn_first(3, turn)
    with pytest.raises(ValueError, match="the first 6 tokens: a row has 5"):
        cache.turn_first(6, turn)
    after = [keys_BGSK for lane in cache._lanes for keys_BGSK in lane.store.keys]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    narrow = create_cache(full, 3, 20, kind="contiguous", storage="int8")
    assert isinstance(narrow, ContiguousCache)
    with torch.no_grad():
        full(TOKENS[:, :5], cache=narrow)
    with pytest.raises(ValueError, match="8-bit keys cannot be turned"):
        narrow.turn_first(1, turn)


# -- fixed shapes -----------------------------------------------------------------------------------------------------

DOCUMENTS = torch.tensor([[7] * 12 + [3] * 28, [1] * 19 + [0] * 21, [2] * 40])
Run = Callable[[Decoder, Tensor, AttentionContext, KeyValueCache], Tensor]


def prefilled(model: Decoder, kind: str, storage: str | None, lengths: list[int], marked: bool):
    cache = create_cache(model, 3, 40, kind=kind, storage=storage, page_size=8)  # type: ignore[arg-type]
    context = AttentionContext(kv_lengths=torch.tensor(lengths))
    if marked:
        context.q_documents = DOCUMENTS[:, : max(lengths)]
    model(TOKENS[:, : max(lengths)], context, cache=cache)
    return cache


def one_more(lengths: list[int], step: int, marked: bool) -> tuple[Tensor, AttentionContext]:
    at = torch.tensor(lengths)[:, None] + step
    return TOKENS.gather(1, at), AttentionContext(q_documents=DOCUMENTS.gather(1, at) if marked else None)


@EVERY_KIND
@EVERY_STORAGE
@pytest.mark.parametrize(("lengths", "marked"), [([3, 3, 3], False), ([2, 11, 6], True)])
@torch.no_grad()
def test_fixed_shapes_change_no_result(kind: str, storage: str | None, lengths: list[int], marked: bool) -> None:
    model = decoder(MARKED if marked else PLAN)
    plain = prefilled(model, kind, storage, lengths, marked)
    fixed = prefilled(model, kind, storage, lengths, marked)
    shapes = set()
    for step in range(14):  # past every ring and several pages
        tokens_B1, context = one_more(lengths, step, marked)
        with fixed.fixed_step():
            begun = fixed.begin(1, context)
            keys = begun.append(0, torch.zeros(3, 1, 2, 16), torch.zeros(3, 1, 2, 16))
            shapes.add((keys.k_BSGD.shape, begun.positions_BT.shape, begun.reach))
            found = model(tokens_B1, context, cache=fixed)
        torch.testing.assert_close(found, model(tokens_B1, context, cache=plain), atol=1e-4, rtol=0)
        assert fixed.lengths == plain.lengths == tuple(n + step + 1 for n in lengths)
    assert len(shapes) == 1
    with suppress(KeyboardInterrupt), fixed.fixed_step():  # what is interrupted does not count, on either side
        model(TOKENS[:, :1], context, cache=fixed)
        raise KeyboardInterrupt
    tokens_B1, context = one_more(lengths, 14, marked)
    with fixed.fixed_step():
        found = model(tokens_B1, context, cache=fixed)
    torch.testing.assert_close(found, model(tokens_B1, context, cache=plain), atol=1e-4, rtol=0)
    tokens_B1, context = one_more(lengths, 15, marked)  # and back
    torch.testing.assert_close(
        model(tokens_B1, context, cache=fixed), model(tokens_B1, context, cache=plain), atol=1e-5, rtol=0
    )


@EVERY_KIND
@pytest.mark.parametrize("storage", [None, "int8"])
@torch.no_grad()
def test_a_step_of_fixed_shapes_traces_once(kind: str, storage: str | None) -> None:
    """begin, append and finish hold nothing that a compiler or a CUDA graph could not see, and nothing that changes."""
    model, lengths = decoder(MARKED), [2, 11, 6]
    plain = prefilled(model, kind, storage, lengths, True)
    fixed = prefilled(model, kind, storage, lengths, True)
    count = torch._dynamo.testing.CompileCounter()

    def attend_all(cache: KeyValueCache, k_BTGK: Tensor, context: AttentionContext) -> list[Tensor]:
        step = cache.begin(1, context)
        read = [step.append(layer, k_BTGK * (layer + 1), k_BTGK) for layer in range(3)]
        step.finish()
        kept = [x.k_scale_BSG for x in read if x.k_scale_BSG is not None]
        return [step.positions_BT, *(x.k_BSGD.clone() for x in read), *kept]

    compiled = torch.compile(attend_all, backend=count, fullgraph=True, dynamic=False)
    for step in range(12):
        _, context = one_more(lengths, step, True)
        k_BTGK = torch.randn(3, 1, 2, 16, generator=torch.Generator().manual_seed(step))
        with fixed.fixed_step(), plain.fixed_step():
            read, expected = compiled(fixed, k_BTGK, context), attend_all(plain, k_BTGK, context)
        assert all(torch.equal(one, other) for one, other in zip(read, expected, strict=True))
    assert fixed.lengths == tuple(n + 12 for n in lengths)
    assert count.frame_count <= 2  # once more at most, when the first step has been remembered


@EVERY_KIND
def test_fixed_shapes_are_for_single_tokens(kind: str) -> None:
    cache = create_cache(decoder(), 3, 5, kind=kind)  # type: ignore[arg-type]
    with cache.fixed_step():
        with pytest.raises(ValueError, match=r"a step with fixed shapes takes one token in every row, not 2$"):
            cache.begin(2, AttentionContext())
        with pytest.raises(ValueError, match="one token in every row, not 1 with padding"):
            cache.begin(1, AttentionContext(kv_lengths=torch.tensor([1, 1, 0])))
    for _ in range(4):
        with cache.fixed_step():
            pass
    said = "cache for 3 sequences of 5 tokens: 3 sequences of 6 tokens do not fit"
    with pytest.raises(ValueError, match=said), cache.fixed_step():
        raise AssertionError("there is no room for it")


@torch.no_grad()
def test_a_row_can_be_given_to_another_sequence() -> None:
    """What a session does between steps of one graph: the device's tensors keep their place."""
    model = decoder()
    pool = PagePool(model.config, 12, 8)
    sequences = [pool.open() for _ in range(3)]
    for sequence, row, length in zip(sequences, TOKENS, (3, 9, 17), strict=True):
        model(row[None, :length], cache=pool.cache([sequence]))
    cache = pool.cache(sequences[:2], length=40)
    places = cache._lengths_B.data_ptr(), cache._table_BP.data_ptr()
    with cache.fixed_step():
        model(torch.stack([TOKENS[0, 3:4], TOKENS[1, 9:10]]), cache=cache)
    cache.hold([sequences[2], sequences[1]])
    with cache.fixed_step():
        found = model(torch.stack([TOKENS[2, 17:18], TOKENS[1, 10:11]]), cache=cache)
    assert [s.length for s in sequences] == [4, 11, 18]
    torch.testing.assert_close(found[0], model(TOKENS[2:, :18])[0, -1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[1], model(TOKENS[1:2, :11])[0, -1:], atol=1e-4, rtol=0)
    assert places == (cache._lengths_B.data_ptr(), cache._table_BP.data_ptr())
    with pytest.raises(ValueError, match="in two rows"):
        cache.hold([sequences[1]] * 2)
