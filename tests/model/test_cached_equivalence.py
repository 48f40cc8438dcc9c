"""Whole models over every kind of cache: teacher-forced decoding, pieces of a prompt and rows of different lengths give
the logits of one full pass, past every ring's end, under every position scheme."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionSpec, Window
from longspan.model.cache import ContiguousCache, create_cache
from longspan.model.config import AttentionPlan, HeadGroup
from longspan.model.decoder import Decoder
from longspan.model.zoo import build

B, T = 3, 37
TOLERANCE = 1e-4
TOKENS = torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.tensor([[7] * 5 + [3] * 18 + [9] * 14, [1] * 14 + [0] * 1 + [4] * 22, [2] * 30 + [1] * 7])
FLAGS = torch.zeros(B, T, dtype=torch.bool).index_put(
    (torch.tensor([0, 0, 1, 2]), torch.tensor([0, 11, 4, 20])), torch.tensor(True)
)

FULL = AttentionSpec(causal=True)
WINDOW = AttentionSpec(causal=True, window=Window(left=4))
DILATED = AttentionSpec(causal=True, window=Window(left=3, dilation=2))
SINKS = AttentionSpec(causal=True, window=Window(left=3), sink_tokens=2)
HYBRID = {"local": WINDOW, "full": FULL, "sinks": SINKS}
GROUPS = {"two": (HeadGroup(heads=2, spec=DILATED), HeadGroup(heads=2, spec=WINDOW)), "full": FULL}
DOCUMENT = {
    "local": AttentionSpec(causal=True, window=Window(left=4), documents=True),
    "full": AttentionSpec(causal=True, sink_tokens=1, documents=True),
}
GLOBAL = {"global": AttentionSpec(causal=True, window=Window(left=2), global_tokens=True), "local": WINDOW}

CASES: dict[str, tuple[str, dict[str, object], dict[str, AttentionSpec | tuple[HeadGroup, ...]]]] = {
    "learned": ("gpt-tiny", {}, {"full": FULL}),
    "learned, hybrid": ("gpt-tiny", {}, HYBRID),
    "learned, documents": ("gpt-tiny", {}, DOCUMENT),
    "rope": ("llama-tiny", {}, {"full": FULL}),
    "rope, window": ("llama-tiny", {}, {"local": WINDOW}),
    "rope, hybrid": ("llama-tiny", {}, HYBRID),
    "rope, head groups": ("llama-tiny", {}, GROUPS),
    "rope, documents": ("llama-tiny", {}, DOCUMENT),
    "rope, global tokens": ("llama-tiny", {}, GLOBAL),
    "alibi, hybrid": ("llama-tiny", {"positions": "alibi"}, HYBRID),
    "no positions, hybrid": ("llama-tiny", {"positions": "none"}, HYBRID),
}
each_case = pytest.mark.parametrize("name", CASES)
each_kind = pytest.mark.parametrize("kind", ["auto", "contiguous", "paged"])


@functools.cache
def model_of(name: str) -> Decoder:
    base, overrides, patterns = CASES[name]
    plan = AttentionPlan(patterns=patterns, layers=tuple(patterns))
    sizes = {"n_layers": len(patterns) + 1, "init_std": 0.2, "attention": plan}
    model = build(base, {**sizes, **overrides}, seed=3).eval()
    model.set_backends(train="reference")  # the full pass by definition; prefill and decode choose for themselves
    return model


def context_of(name: str, at_BT: Tensor, kv_lengths: Tensor | None = None) -> AttentionContext:
    return AttentionContext(
        q_documents=DOCUMENTS.gather(1, at_BT) if "documents" in name else None,
        is_global=FLAGS.gather(1, at_BT) if "global" in name else None,
        kv_lengths=kv_lengths,
    )


@functools.cache
@torch.no_grad()
def full(name: str) -> Tensor:
    expected = model_of(name)(TOKENS, context_of(name, torch.arange(T).expand(B, -1)))
    assert expected.std() > 0.1
    return expected


@torch.no_grad()
def through_cache(name: str, calls: list[tuple[int, ...]], **settings: object) -> Tensor:
    """Logits [B, T, V] of the tokens that each row got, NaN for the others. `calls`: how many each row gets."""
    model = model_of(name)
    rows = len(calls[0])
    cache = create_cache(model, rows, T, globals_possible="global" in name, **settings)  # type: ignore[arg-type]
    found = torch.full((rows, T, 256), torch.nan)
    for counts in calls:
        start = torch.tensor(cache.lengths)[:, None]
        columns = torch.arange(max(counts))
        real = columns < torch.tensor(counts)[:, None]
        at = (start + columns).clamp(max=T - 1)
        lengths = None if bool(real.all()) else torch.tensor(counts)
        tokens = TOKENS[:rows].gather(1, at).masked_fill(~real, 99)
        logits = model(tokens, context_of(name, at, lengths), cache=cache)
        assert logits.isfinite().all()
        found[torch.arange(rows)[:, None].expand_as(at)[real], at[real]] = logits[real]
    return found


def assert_equal(found: Tensor, name: str, lengths: tuple[int, ...]) -> None:
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, :length], full(name)[row, :length], atol=TOLERANCE, rtol=0)
        assert torch.equal(found[row, :length].argmax(-1), full(name)[row, :length].argmax(-1))
        assert found[row, length:].isnan().all()


@each_case
@each_kind
@pytest.mark.parametrize("pieces", [[1] * T, [20, 1, 1, 3, 12]], ids=["decode", "chunks"])
def test_any_split_equals_the_full_pass(name: str, kind: str, pieces: list[int]) -> None:
    assert_equal(through_cache(name, [(n,) * B for n in pieces], kind=kind), name, (T,) * B)


@each_case
@each_kind
def test_rows_of_different_lengths_equal_rows_alone(name: str, kind: str) -> None:
    calls = [(18, 5, 1), *[(1, 1, 1)] * 3, (2, 19, 0), (0, 1, 1), *[(1, 1, 1)] * 2, (11, 0, 20), (1, 0, 1)]
    lengths = tuple(sum(row) for row in zip(*calls, strict=True))
    assert lengths == (T, 30, 28)
    assert_equal(through_cache(name, calls, kind=kind), name, lengths)


@pytest.mark.parametrize("name", ["learned", "rope, hybrid", "rope, documents"])
@each_kind
def test_a_batch_is_its_rows(name: str, kind: str) -> None:
    """To the last bit of each row's own decoding, up to the order of additions."""
    calls = [(9,), *[(1,)] * 12]
    alone = through_cache(name, calls, kind=kind)
    batch = through_cache(name, [(n, max(0, n - 2), min(n, 4)) for (n,) in calls], kind=kind)
    torch.testing.assert_close(batch[0, :21], alone[0, :21], atol=1e-5, rtol=0)


@each_kind
@torch.no_grad()
def test_a_learned_table_is_read_to_its_last_row(kind: str) -> None:
    model = model_of("learned, hybrid")
    tokens = torch.randint(0, 256, (2, 128), generator=torch.Generator().manual_seed(1))
    expected = model(tokens)
    cache = create_cache(model, 2, 128, kind=kind)  # type: ignore[arg-type]
    # Row 1 has 20 tokens of padding behind its last, at positions that the table does not have.
    first = model(tokens[:, :120], AttentionContext(kv_lengths=torch.tensor([100, 120])), cache=cache)
    at = torch.tensor([[*range(100, 128)], [*range(120, 128), *[0] * 20]])
    second = model(tokens.gather(1, at), AttentionContext(kv_lengths=torch.tensor([28, 8])), cache=cache)
    torch.testing.assert_close(first[0, :100], expected[0, :100], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(first[1], expected[1, :120], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(second[0], expected[0, 100:], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(second[1, :8], expected[1, 120:], atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match="128 tokens"):
        model(tokens[:, :1], cache=cache)
    with pytest.raises(ValueError, match="the model has learned 128 positions"):
        create_cache(model, 2, 129, kind=kind)  # type: ignore[arg-type]


@torch.no_grad()
def test_positions_beyond_a_learned_table_are_refused_whoever_made_the_cache() -> None:
    model = model_of("learned, hybrid")
    cache = ContiguousCache(model.config, 1, 200)
    model(torch.zeros(1, 128, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="position 128 is beyond the 128 learned positions"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    assert cache.length == 128


@torch.no_grad()
def test_position_encoding_may_differ_from_where_tokens_stand() -> None:
    """Packed documents with positions that start again: attention goes by the cache, the encoding by positions_BT."""
    name = "learned, documents"
    model = model_of(name)
    restart = torch.cat([torch.arange(5), torch.arange(18), torch.arange(14)])[None]
    documents = DOCUMENTS[:1]
    expected = model(TOKENS[:1], AttentionContext(q_documents=documents), positions_BT=restart)
    cache = create_cache(model, 1, T)
    found = [
        model(
            TOKENS[:1, a:b],
            AttentionContext(q_documents=documents[:, a:b]),
            positions_BT=restart[:, a:b],
            cache=cache,
        )
        for a, b in ((0, 9), (9, 10), (10, 30), (30, 37))
    ]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=TOLERANCE, rtol=0)
    assert not torch.allclose(expected, full(name)[:1], atol=0.01)


@each_kind
@pytest.mark.parametrize(("storage", "tolerance"), [("int8", 0.03), ("float8_e4m3fn", 0.12)])
def test_eight_bits_cost_little_and_the_same_for_every_split(kind: str, storage: str, tolerance: float) -> None:
    name = "rope, hybrid"
    splits = [[T], [1] * T, [20, 1, 1, 15]]
    found = [through_cache(name, [(n,) * B for n in pieces], kind=kind, storage=storage) for pieces in splits]
    error = (found[0] - full(name)).std() / full(name).std()
    assert 1e-4 < float(error) < tolerance
    for other in found[1:]:
        # Keys are rounded from activations that differ in the last bit, so now and then one falls the other way.
        assert float((other - found[0]).std() / full(name).std()) < tolerance / 3


@torch.no_grad()
@pytest.mark.parametrize("storage", [None, "int8"])
@each_kind
def test_a_narrow_cache_serves_a_wide_model(kind: str, storage: str | None) -> None:
    model = model_of("rope, hybrid")
    cache = create_cache(model, B, T, kind=kind, storage=storage, dtype=torch.bfloat16)  # type: ignore[arg-type]
    found = torch.cat([model(TOKENS[:, a:b], cache=cache) for a, b in ((0, 20), (20, 21), (21, 37))], dim=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, full("rope, hybrid"), atol=0.2 * float(found.std()), rtol=0)
