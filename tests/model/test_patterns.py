"""Every kind of attention a decoder can have: nothing leaks, and decoding with a cache equals the full forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionSpec, BlockLayout, Window
from longspan.model.cache import create_cache
from longspan.model.config import AttentionPlan, HeadGroup
from longspan.model.decoder import Decoder
from longspan.model.zoo import build

B, T = 2, 23  # odd, and past every window below
TOLERANCE = 1e-4


def causal(**fields: object) -> AttentionSpec:
    return AttentionSpec(causal=True, **fields)


def plan(*specs: AttentionSpec | tuple[HeadGroup, ...]) -> AttentionPlan:
    names = [f"kind{i}" for i in range(len(specs))]
    return AttentionPlan(patterns=dict(zip(names, specs, strict=True)), layers=tuple(names))


@dataclass(frozen=True)
class Case:
    overrides: Mapping[str, object] = field(default_factory=dict)
    base: str = "llama-tiny"
    context: Callable[[slice], AttentionContext] | None = None  # of some tokens


DOCUMENTS = torch.tensor([[7] * 5 + [3] * 9 + [9] * 9, [1] * 14 + [0] * 1 + [4] * 8])
GLOBAL = torch.zeros(B, T, dtype=torch.bool)
GLOBAL[0, [0, 11]] = True
GLOBAL[1, [4, 17]] = True


def with_documents(of: slice) -> AttentionContext:
    return AttentionContext(q_documents=DOCUMENTS[:, of])


def with_globals(of: slice) -> AttentionContext:
    return AttentionContext(is_global=GLOBAL[:, of])


def with_both(of: slice) -> AttentionContext:
    return AttentionContext(q_documents=DOCUMENTS[:, of], is_global=GLOBAL[:, of])


WINDOW = causal(window=Window(left=4))
DILATED = causal(window=Window(left=3, dilation=2))
LAYOUT = BlockLayout.from_rows(
    [[i == j or j == 0 or i == j + 2 for j in range(32)] for i in range(32)], q_block=4, kv_block=4
)

CASES = {
    "full": Case(),
    "gpt": Case(base="gpt-tiny"),
    "window": Case({"attention": plan(WINDOW)}),
    "window of the query alone": Case({"attention": plan(causal(window=Window(left=0)))}),
    "window and sinks": Case({"attention": plan(causal(window=Window(left=3), sink_tokens=2))}),
    "dilated window": Case({"attention": plan(DILATED)}),
    "mixed layers": Case({"attention": plan(WINDOW, causal()), "n_layers": 3}),
    "head groups": Case({"attention": plan((HeadGroup(heads=2, spec=DILATED), HeadGroup(heads=2, spec=WINDOW)))}),
    "multi-head": Case({"n_kv_heads": None}),
    "multi-query": Case({"n_kv_heads": 1}),
    "softcap": Case({"attention": plan(causal(softcap=0.5))}),
    "scale": Case({"attention": plan(causal(scale=0.7))}),
    "learned sink": Case({"attention": plan(causal(learned_sink=True), WINDOW)}),
    "learned sink on some heads": Case(
        {"attention": plan((HeadGroup(heads=2, spec=WINDOW), HeadGroup(heads=2, spec=causal(learned_sink=True))))}
    ),
    "alibi": Case({"positions": "alibi"}),
    "alibi on six heads, grouped": Case(
        {
            "positions": "alibi",
            "n_heads": 6,
            "d_model": 48,
            "attention": plan((HeadGroup(heads=3, spec=WINDOW), HeadGroup(heads=3, spec=causal()))),
        }
    ),
    "no positions": Case({"positions": "none"}),
    "block sparse": Case({"attention": plan(causal(block_sparse=LAYOUT))}),
    "qk norm": Case({"qk_norm": True}),
    "dropout, off in evaluation": Case({"dropout": 0.5, "attention": plan(causal(dropout=0.5))}),
    "documents": Case({"attention": plan(causal(documents=True))}, context=with_documents),
    "documents, learned positions": Case({"attention": plan(causal(documents=True))}, "gpt-tiny", with_documents),
    "documents, window, sinks": Case(
        {"attention": plan(causal(documents=True, window=Window(left=2), sink_tokens=1))}, context=with_documents
    ),
    "global tokens": Case({"attention": plan(causal(global_tokens=True, window=Window(left=2)))}, context=with_globals),
    "global tokens and documents": Case(
        {"attention": plan(causal(global_tokens=True, documents=True, window=Window(left=2)))}, context=with_both
    ),
}

each_case = pytest.mark.parametrize("name", CASES)
_models: dict[str, Decoder] = {}


def model_of(name: str) -> Decoder:
    if name not in _models:
        case = CASES[name]
        model = build(case.base, {**case.overrides, "init_std": 0.2}, seed=3).eval()  # large: attention matters
        for block in model.blocks:
            if block.attention.sink_logits is not None:
                torch.nn.init.normal_(block.attention.sink_logits, generator=torch.Generator().manual_seed(0))
        model.set_backends(train="reference")  # the full pass by definition; prefill and decode choose for themselves
        _models[name] = model
    return _models[name]


def context_of(name: str, of: slice) -> AttentionContext | None:
    make = CASES[name].context
    return None if make is None else make(of)


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full(name: str, tokens_BT: Tensor) -> Tensor:
    return model_of(name)(tokens_BT, context_of(name, slice(0, T)))


@torch.no_grad()
def incremental(name: str, tokens_BT: Tensor, pieces: list[int]) -> Tensor:
    model = model_of(name)
    cache = create_cache(model, B, T, globals_possible=True)
    logits, start = [], 0
    for piece in pieces:
        stop = start + piece
        context = context_of(name, slice(start, stop))
        logits.append(model(tokens_BT[:, start:stop], context, cache=cache))
        start = stop
    assert start == T == cache.length
    return torch.cat(logits, dim=1)


@each_case
def test_teacher_forced_decoding_equals_the_full_pass(name: str) -> None:
    tokens_BT = tokens()
    expected = full(name, tokens_BT)
    assert expected.std() > 0.1
    found = incremental(name, tokens_BT, [1] * T)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@each_case
@pytest.mark.parametrize("pieces", [[T], [7, 1, 1, 14], [22, 1], [1, 22]])
def test_any_split_of_the_prompt_equals_one_prefill(name: str, pieces: list[int]) -> None:
    tokens_BT = tokens(1)
    torch.testing.assert_close(incremental(name, tokens_BT, pieces), full(name, tokens_BT), atol=TOLERANCE, rtol=0)


@each_case
@settings(max_examples=6, deadline=None)
@given(position=st.integers(0, T - 1), seed=st.integers(0, 100))
def test_a_token_changes_nothing_before_it(name: str, position: int, seed: int) -> None:
    tokens_BT = tokens(seed)
    other_BT = tokens_BT.clone()
    other_BT[:, position] = (other_BT[:, position] + 101) % 256
    before, after = full(name, tokens_BT), full(name, other_BT)
    assert torch.equal(before[:, :position], after[:, :position])
    assert not torch.equal(before[:, position], after[:, position])


@pytest.mark.parametrize("name", [name for name in CASES if "documents" in name])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_documents_never_leak(name: str, backend: str) -> None:
    model = model_of(name)
    model.set_backends(train=backend)
    tokens_BT = tokens()
    other_BT = torch.where(torch.isin(DOCUMENTS, torch.tensor([7, 1])), (tokens_BT + 57) % 256, tokens_BT)
    before, after = full(name, tokens_BT), full(name, other_BT)
    changed = tokens_BT != other_BT
    model.set_backends(train="reference")
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.equal(before[changed], after[changed])


@pytest.mark.parametrize("name", ["documents", "global tokens"])
def test_without_ids_or_flags_a_row_is_one_document_without_globals(name: str) -> None:
    model, tokens_BT = model_of(name), tokens()
    with torch.no_grad():
        bare = model(tokens_BT)
        one = model(
            tokens_BT,
            AttentionContext(
                q_documents=torch.zeros(B, T, dtype=torch.int64), is_global=torch.zeros(B, T, dtype=torch.bool)
            ),
        )
    torch.testing.assert_close(bare, one, atol=1e-6, rtol=0)
    assert not torch.allclose(bare, full(name, tokens_BT), atol=1e-2)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.context is None])
def test_a_batch_of_two_is_two_batches_of_one(name: str) -> None:
    model, tokens_BT = model_of(name), tokens()
    with torch.no_grad():
        rows = torch.cat([model(tokens_BT[:1]), model(tokens_BT[1:])])
    torch.testing.assert_close(rows, full(name, tokens_BT), atol=1e-5, rtol=0)


def test_explicit_positions_restart_the_encoding() -> None:
    """Two documents packed with a document mask and position reset are two separate sequences."""
    for base in ("llama-tiny", "gpt-tiny"):
        model = build(base, {"attention": plan(causal(documents=True)), "init_std": 0.2}, seed=0).eval()
        tokens_BT = tokens()[:1]
        cut = 9
        packed = model(
            tokens_BT,
            AttentionContext(q_documents=torch.tensor([[0] * cut + [1] * (T - cut)])),
            positions_BT=torch.tensor([[*range(cut), *range(T - cut)]]),
        )
        apart = torch.cat([model(tokens_BT[:, :cut]), model(tokens_BT[:, cut:])], dim=1)
        torch.testing.assert_close(packed, apart, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kv_heads", [8, 4])
@pytest.mark.parametrize(
    "spec",
    [WINDOW, causal(learned_sink=True), causal(alibi=True), causal(alibi=True, learned_sink=True, sink_tokens=1)],
)
def test_groups_of_equal_heads_are_one_group(spec: AttentionSpec, kv_heads: int) -> None:
    """Each group reads its own heads, key/value heads, slopes and sinks, wherever it stands in the layer."""
    sizes = {"n_heads": 8, "n_kv_heads": kv_heads, "n_layers": 1, "init_std": 0.2}
    groups = tuple(HeadGroup(heads=n, spec=spec) for n in (2, 4, 2))
    whole = build("llama-tiny", {**sizes, "attention": plan(spec)}, seed=0)
    split = build("llama-tiny", {**sizes, "attention": plan(groups)}, seed=0)
    if spec.learned_sink:
        with torch.no_grad():
            for model in (whole, split):
                model.blocks[0].attention.sink_logits.copy_(torch.linspace(-3, 3, 8))
    with torch.no_grad():
        torch.testing.assert_close(split(tokens()), whole(tokens()), atol=1e-5, rtol=0)
        mixed = build(
            "llama-tiny", {**sizes, "attention": plan((*groups[:2], HeadGroup(heads=2, spec=causal())))}, seed=0
        )
        assert not torch.allclose(mixed(tokens()), whole(tokens()), atol=1e-2)


def test_sinks_belong_to_the_groups_that_ask_for_them() -> None:
    sink = causal(learned_sink=True)
    groups = (HeadGroup(heads=2, spec=sink), HeadGroup(heads=4, spec=causal()), HeadGroup(heads=2, spec=sink))
    sizes = {"n_heads": 8, "n_kv_heads": 4, "n_layers": 1, "init_std": 0.2}
    some = build("llama-tiny", {**sizes, "attention": plan(groups)}, seed=0)
    every = build("llama-tiny", {**sizes, "attention": plan(sink)}, seed=0)
    with torch.no_grad():
        some.blocks[0].attention.sink_logits.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        every.blocks[0].attention.sink_logits.copy_(torch.tensor([1.0, 2.0, *[-torch.inf] * 4, 3.0, 4.0]))
        torch.testing.assert_close(some(tokens()), every(tokens()), atol=1e-5, rtol=0)
