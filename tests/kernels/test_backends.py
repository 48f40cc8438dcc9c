"""sdpa and flex on CPU against the fp64 reference: values, lse, gradients, poison, shared masks, torch.compile."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from longspan.kernels.attention import (
    AttentionCall,
    AttentionContext,
    AttentionParams,
    AttentionSpec,
    BlockLayout,
    UnsupportedAttention,
    Window,
    attend,
)
from longspan.kernels.attention.registry import prepare
from longspan.kernels.testing import assert_within_budget, plain_attention

B, H, G, D, E = 2, 4, 2, 16, 24
LAYOUT = BlockLayout.from_rows([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0]], q_block=40, kv_block=51)

SPECS = {
    "full": AttentionSpec(causal=False),
    "causal": AttentionSpec(causal=True),
    "scale": AttentionSpec(causal=True, scale=0.7),
    "window": AttentionSpec(causal=True, window=Window(left=9)),
    "window wider than the keys": AttentionSpec(causal=True, window=Window(left=500)),
    "two-sided dilated window": AttentionSpec(causal=False, window=Window(3, 5, 3)),
    "documents": AttentionSpec(causal=True, documents=True),
    "sinks per document": AttentionSpec(causal=True, documents=True, window=Window(left=4), sink_tokens=2),
    "globals": AttentionSpec(causal=False, global_tokens=True, window=Window.symmetric(5)),
    "causal globals": AttentionSpec(causal=True, global_tokens=True, window=Window(left=3)),
    "alibi": AttentionSpec(causal=True, alibi=True),
    "layout": AttentionSpec(causal=True, block_sparse=LAYOUT),
    "softcap": AttentionSpec(causal=True, softcap=1.5),
    "learned sink": AttentionSpec(causal=True, window=Window(left=6), learned_sink=True),
    "all at once": AttentionSpec(
        causal=False,
        window=Window(7, 4, 2),
        global_tokens=True,
        documents=True,
        alibi=True,
        softcap=2.0,
        sink_tokens=1,
        learned_sink=True,
        block_sparse=LAYOUT,
    ),
}
LENGTHS = [(129, 129), (1, 37), (30, 131), (40, 17)]  # training, decoding, a chunk, more queries than keys
SDPA_CANNOT = {"softcap", "learned sink", "all at once"}


def make(
    spec: AttentionSpec, T: int, S: int, *, ragged: bool = False, poison: float | None = None
) -> tuple[tuple[Tensor, Tensor, Tensor], AttentionContext, AttentionParams]:
    generator = torch.Generator().manual_seed(T * 1000 + S)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n = max(T, S)
    ids = torch.randint(0, 3, (B, n), generator=generator)
    positions = torch.arange(S).repeat(B, 1)
    positions[1, :3] -= S  # three empty slots
    context = AttentionContext(
        q_documents=ids[:, n - T :] if spec.documents else None,
        kv_documents=ids[:, n - S :] if spec.documents else None,
        is_global=torch.rand(B, S, generator=generator) > 0.9 if spec.global_tokens else None,
        kv_lengths=torch.tensor([S, S - S // 3]) if ragged else None,
        q_positions=(torch.arange(T) + max(0, S - T)).repeat(B, 1) if ragged and T <= S else None,
        kv_positions=positions if ragged and T <= S else None,
    )
    q, k, v = draw(B, T, H, D), draw(B, S, G, D), draw(B, S, G, E)
    exists = context.existing_keys(S)
    if poison is not None and exists is not None:
        k[~exists] = poison
        v[~exists] = poison
    params = AttentionParams(
        alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64),
        sink_logits=torch.tensor([0.0, 1.0, -1.0, 3.0], dtype=torch.float64),
    )
    return (q, k, v), context, params


def cast(params: AttentionParams, dtype: torch.dtype) -> AttentionParams:
    assert params.alibi_slopes is not None
    assert params.sink_logits is not None
    return AttentionParams(params.alibi_slopes.to(dtype), params.sink_logits.to(dtype))


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_forward(backend: str, name: str, lengths: tuple[int, int], ragged: bool) -> None:
    spec, (T, S) = SPECS[name], lengths
    (q, k, v), context, params = make(spec, T, S, ragged=ragged, poison=torch.nan)
    has_lse = backend == "flex"
    if backend == "sdpa" and name in SDPA_CANNOT:
        with pytest.raises(UnsupportedAttention):
            attend(q, k, v, spec=spec, context=context, params=params, backend=backend)
        return
    exact = attend(q, k, v, spec=spec, context=context, params=params, backend="reference", return_lse=True)
    ours = attend(q, k, v, spec=spec, context=context, params=params, backend=backend, return_lse=has_lse)
    torch.testing.assert_close(ours.out, exact.out, rtol=0, atol=1e-13)
    if has_lse:
        assert ours.lse is not None
        torch.testing.assert_close(ours.lse, exact.lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex"])
def test_nothing_leaks_out_of_empty_slots(backend: str, poison: float) -> None:
    for spec in (AttentionSpec(causal=True), AttentionSpec(causal=False), AttentionSpec(causal=True, window=Window(2))):
        (q, k, v), context, _ = make(spec, 9, 20, ragged=True, poison=poison)
        (_, k0, v0), _, _ = make(spec, 9, 20, ragged=True, poison=0.0)
        dirty, clean = (attend(q, *kv, spec=spec, context=context, backend=backend).out for kv in ((k, v), (k0, v0)))
        assert bool(torch.isfinite(dirty).all())
        assert torch.equal(dirty, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["causal", "two-sided dilated window", "sinks per document", "globals", "alibi", "layout"]
)
def test_sdpa_gradients(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    if spec.alibi and dtype != torch.float32:
        with pytest.raises(UnsupportedAttention, match="rounded to half precision"):
            attend(*(x.to(dtype) for x in make(spec, 5, 5)[0]), spec=spec, params=make(spec, 5, 5)[2], backend="sdpa")
        return
    for T, S in ((67, 67), (30, 67), (50, 33)):
        tensors, context, params = make(spec, T, S, ragged=spec.sink_tokens == 0, poison=torch.nan)
        grad_out = torch.randn(B, T, H, E, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        tensors = [x.to(dtype) for x in tensors]
        results = []
        for backend, kind in (("reference", torch.float64), ("sdpa", dtype), ("twin", dtype)):
            leaves = [x.detach().to(kind).requires_grad_() for x in tensors]
            given = cast(params, kind)
            if backend == "twin":
                out = plain_attention(*leaves, spec=spec, context=context, params=given)
            else:
                out = attend(*leaves, spec=spec, context=context, params=given, backend=backend).out
            results.append([out, *torch.autograd.grad(out, leaves, grad_out.to(kind))])
        for exact, ours, twin in zip(*results, strict=True):
            assert_within_budget(ours, exact, twin)


def test_learned_slopes_get_their_gradient_through_sdpa() -> None:
    spec = SPECS["alibi"]
    (q, k, v), context, params = make(spec, 21, 21)
    assert params.alibi_slopes is not None
    gradients = []
    for backend in ("reference", "sdpa"):
        slopes = params.alibi_slopes.clone().requires_grad_()
        out = attend(q, k, v, spec=spec, context=context, params=AttentionParams(slopes), backend=backend).out
        gradients.append(*torch.autograd.grad(out.square().sum(), slopes))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=0)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_mask_is_derived_once_and_shared(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["sinks per document"]
    (q, k, v), context, params = make(spec, 40, 40)
    expected = attend(q, k, v, spec=spec, context=context, params=params, backend="reference").out
    prepare(context, spec, AttentionCall(dtype=q.dtype, n_queries=40, n_keys=40, head_dim=D), backend=backend)
    monkeypatch.setattr(AttentionContext, "allowed", None)  # nobody may ask again
    for _ in range(2):
        out = attend(q, k, v, spec=spec, context=context, params=params, backend=backend).out
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_masks_of_different_lengths_do_not_mix() -> None:
    spec, context = AttentionSpec(causal=True, window=Window(left=2)), AttentionContext()
    for T, S in ((6, 6), (2, 6), (6, 6), (1, 7)):
        (q, k, v), _, _ = make(spec, T, S)
        expected = attend(q, k, v, spec=spec, backend="reference").out
        for backend in ("sdpa", "flex"):
            out = attend(q, k, v, spec=spec, context=context, backend=backend).out
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        ("auto", "causal"),
        ("reference", "globals"),
        ("sdpa", "sinks per document"),
        ("sdpa", "alibi"),
        ("flex", "sinks per document"),
        ("flex", "layout"),
    ],
)
def test_traces_as_one_graph(backend: str, name: str) -> None:
    spec = SPECS[name]
    (q, k, v), context, params = make(spec, 20, 33)
    torch._dynamo.reset()

    def two_layers(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        first = attend(q, k, v, spec=spec, context=context, params=params, backend=backend).out
        return attend(first[..., :D], k, v, spec=spec, context=context, params=params, backend=backend).out

    expected = two_layers(q, k, v, dataclasses.replace(context, derived={}))
    kind = "eager" if backend == "flex" else "aot_eager"
    compiled = torch.compile(two_layers, fullgraph=True, backend=kind)
    cold, warm = dataclasses.replace(context, derived={}), dataclasses.replace(context, derived={})
    prepare(warm, spec, AttentionCall(dtype=q.dtype, n_queries=20, n_keys=33, head_dim=D), backend=backend)
    for given in (cold, warm):
        torch.testing.assert_close(compiled(q, k, v, given), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_a_new_batch_does_not_recompile(backend: str) -> None:
    spec = SPECS["sinks per document"]
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def layer(q: Tensor, context: AttentionContext) -> Tensor:
        return attend(q, q, q, spec=spec, context=context, backend=backend).out

    q = torch.randn(2, 20, 2, 16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            ids = torch.randint(0, 3, (2, 20), generator=torch.Generator().manual_seed(step))
            context = AttentionContext(q_documents=ids)
            prepare(context, spec, AttentionCall(n_queries=20, n_keys=20, head_dim=16, n_heads=2), backend=backend)
            first = layer(q, context)
            expected = attend(first, first, first, spec=spec, context=context, backend="reference").out
            torch.testing.assert_close(layer(first, context), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_traced_gradients(backend: str) -> None:
    spec = SPECS["sinks per document"]
    (q, k, v), context, _ = make(spec, 20, 20)
    q.requires_grad_()
    torch._dynamo.reset()

    def loss(q: Tensor) -> Tensor:
        return attend(q, k, v, spec=spec, context=context, backend=backend).out.square().sum()

    expected = torch.autograd.grad(loss(q), q)[0]
    traced = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(q), q)[0]
    torch.testing.assert_close(traced, expected, rtol=0, atol=1e-12)


def test_flex_skips_what_nobody_sees() -> None:
    window = block_mask(AttentionSpec(causal=True, window=Window(left=100)), 1000)
    expected = torch.zeros(8, 8, dtype=torch.int32)
    for i in range(8):
        expected[i, max(0, i - 1) : i + 1] = 1
    assert torch.equal(window.to_dense()[0, 0], expected)
    causal = block_mask(AttentionSpec(causal=True), 1024)
    assert causal.full_kv_num_blocks is not None
    assert causal.full_kv_num_blocks[0, 0].tolist() == list(range(8))
    assert causal.kv_num_blocks[0, 0].tolist() == [1] * 8


def block_mask(spec: AttentionSpec, n: int) -> BlockMask:
    context = AttentionContext()
    prepare(context, spec, AttentionCall(n_queries=n, n_keys=n), backend="flex")
    (derived,) = context.derived.values()
    assert isinstance(derived, BlockMask)
    return derived
