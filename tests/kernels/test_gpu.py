"""On CUDA: sdpa, flex and the reference in low precision against fp64, with gradients, compilation and long sequences.

Run with `pytest -m gpu tests/kernels`.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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
from longspan.kernels.attention.registry import get, prepare
from longspan.kernels.cross_entropy import linear_cross_entropy
from longspan.kernels.testing import assert_within_budget, judge, plain_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Inductor's own warnings (TF32 advice, online softmax) say nothing about our code.
    pytest.mark.filterwarnings("default:::torch"),
]

B, H, G, D = 2, 4, 2, 64
CUDA = torch.device("cuda")
LAYOUT = BlockLayout.from_rows([[1, 0, 1], [1, 1, 0], [0, 1, 1]], q_block=128, kv_block=128)

SPECS = {
    "full": AttentionSpec(causal=False),
    "causal": AttentionSpec(causal=True),
    "window": AttentionSpec(causal=True, window=Window(left=33)),
    "two-sided dilated window": AttentionSpec(causal=False, window=Window(9, 5, 3)),
    "documents": AttentionSpec(causal=True, documents=True),
    "sinks per document": AttentionSpec(causal=True, documents=True, window=Window(left=20), sink_tokens=2),
    "globals": AttentionSpec(causal=False, global_tokens=True, window=Window.symmetric(16)),
    "alibi": AttentionSpec(causal=True, alibi=True),
    "softcap": AttentionSpec(causal=True, softcap=1.5),
    "learned sink": AttentionSpec(causal=True, window=Window(left=40), learned_sink=True),
    "layout": AttentionSpec(causal=True, block_sparse=LAYOUT),
    "all at once": AttentionSpec(
        causal=False,
        window=Window(30, 20, 2),
        global_tokens=True,
        documents=True,
        alibi=True,
        softcap=2.0,
        sink_tokens=1,
        learned_sink=True,
        block_sparse=LAYOUT,
    ),
}
LENGTHS = [(257, 257), (1, 300), (70, 261), (300, 130)]


def make(
    spec: AttentionSpec, T: int, S: int, *, ragged: bool = False, head_dim: int = D, value_dim: int = D
) -> tuple[list[Tensor], AttentionContext, AttentionParams]:
    generator = torch.Generator().manual_seed(T * 1000 + S)
    n = max(T, S)
    ids = torch.randint(0, 3, (B, n), generator=generator)
    flags = torch.rand(B, S, generator=generator) > 0.95
    context = AttentionContext(
        q_documents=ids[:, n - T :].to(CUDA) if spec.documents else None,
        kv_documents=ids[:, n - S :].to(CUDA) if spec.documents else None,
        is_global=flags.to(CUDA) if spec.global_tokens else None,
        kv_lengths=torch.tensor([S, S - S // 3], device=CUDA) if ragged else None,
    )
    q, k, v = (
        torch.randn(B, *shape, generator=generator, dtype=torch.float64).to(CUDA)
        for shape in ((T, H, head_dim), (S, G, head_dim), (S, G, value_dim))
    )
    exists = context.existing_keys(S)
    if exists is not None:
        k[~exists] = torch.nan
        v[~exists] = torch.nan
    params = AttentionParams(
        alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625], device=CUDA),
        sink_logits=torch.tensor([0.0, 1.0, -1.0, 3.0], device=CUDA),
    )
    return [q, k, v], context, params


def gradients(
    backend: str,
    tensors: list[Tensor],
    dtype: torch.dtype,
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams,
) -> list[Tensor]:
    """[out, dq, dk, dv, and the learned tensors' gradients] of one backend ("twin": the plain softmax)."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    exact = dtype == torch.float64
    learned = [
        x.detach().to(torch.float64 if exact else torch.float32).requires_grad_()
        for asked, x in ((spec.alibi, params.alibi_slopes), (spec.learned_sink, params.sink_logits))
        if asked and x is not None
    ]
    given = AttentionParams(
        alibi_slopes=learned[0] if spec.alibi else None, sink_logits=learned[-1] if spec.learned_sink else None
    )
    if backend == "twin":
        out = plain_attention(*leaves, spec=spec, context=context, params=given)
    else:
        out = attend(*leaves, spec=spec, context=context, params=given, backend=backend).out
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [out, *torch.autograd.grad(out, [*leaves, *learned], grad_out.to(CUDA, dtype))]


KINDS = [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False), (torch.float32, False)]


@pytest.mark.parametrize(("dtype", "ragged"), KINDS, ids=["bf16", "bf16 ragged", "fp16", "fp32"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", ["sdpa", "flex", "triton"])
def test_values_and_gradients(backend: str, name: str, dtype: torch.dtype, ragged: bool) -> None:
    spec = SPECS[name]
    call = AttentionCall(device="cuda", dtype=dtype, needs_grad=True, head_dim=D, n_heads=H, n_kv_heads=G)
    if get(backend).unsupported(spec, call):
        tensors, context, params = make(spec, 8, 8)
        with pytest.raises(UnsupportedAttention):
            attend(*(x.to(dtype) for x in tensors), spec=spec, context=context, params=params, backend=backend)
        return
    # Each length is a compilation for flex; half precision differs from bf16 in nothing but the dtype.
    for T, S in LENGTHS[:1] if dtype == torch.float16 else LENGTHS:
        tensors, context, params = make(spec, T, S, ragged=ragged)
        tensors = [x.to(dtype).double() for x in tensors]
        exact = gradients("reference", tensors, torch.float64, spec, context, params)
        twin = gradients("twin", tensors, dtype, spec, context, params)
        ours = gradients(backend, tensors, dtype, spec, context, params)
        for x, y, z in zip(ours[:4], exact[:4], twin[:4], strict=True):
            # A score of at most 8, rounded in the accumulator, moves its weight by as much.
            verdict = judge(x, y, z, score=8.0)
            assert not verdict.problem, verdict.problem
        # Gradients of slopes and sinks are sums over every pair: their error is that of the order of summation.
        for x, y, z in zip(ours[4:], exact[4:], twin[4:], strict=True):
            error, scale = float((x.double() - y).abs().max()), float(y.abs().max())
            # FlexAttention's are sums of weights rounded to half precision.
            relative = 1e-2 if backend == "flex" and dtype != torch.float32 else 1e-4
            assert error <= 8 * float((z.double() - y).abs().max()) + relative * scale


@pytest.mark.parametrize("name", ["causal", "documents", "learned sink", "all at once"])
@pytest.mark.parametrize("backend", ["flex", "triton"])
def test_lse(backend: str, name: str) -> None:
    spec = SPECS[name]
    for T, S in LENGTHS:
        tensors, context, params = make(spec, T, S, ragged=True)
        exact = attend(*tensors, spec=spec, context=context, params=params, backend="reference", return_lse=True).lse
        half = [x.float() for x in tensors]
        ours = attend(*half, spec=spec, context=context, params=params, backend=backend, return_lse=True).lse
        assert ours is not None
        assert exact is not None
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", ["flex", "triton"])
def test_head_dims(backend: str) -> None:
    spec = SPECS["window"]
    for head_dim, value_dim in ((16, 16), (32, 64), (48, 80), (128, 128), (256, 256)):
        tensors, context, params = make(spec, 130, 130, head_dim=head_dim, value_dim=value_dim)
        tensors = [x.bfloat16().double() for x in tensors]
        results = [
            gradients(name, tensors, dtype, spec, context, params)
            for name, dtype in ((backend, torch.bfloat16), ("reference", torch.float64), ("twin", torch.bfloat16))
        ]
        for x, y, z in zip(*results, strict=True):
            assert_within_budget(x, y, z)


def test_flex_survives_many_lengths() -> None:
    """torch gives up after eight recompilations of one piece of code."""
    spec = SPECS["window"]
    for S in range(200, 210):
        tensors, context, params = make(spec, 1, S)
        exact = attend(*tensors, spec=spec, context=context, params=params, backend="reference").out
        ours = attend(*(x.float() for x in tensors), spec=spec, context=context, params=params, backend="flex").out
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prepared", [False, True], ids=["cold", "prepared"])
@pytest.mark.parametrize("name", ["causal", "sinks per document", "globals", "alibi"])
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "flex", "triton"])
def test_compiles_whole_with_gradients(backend: str, name: str, prepared: bool) -> None:
    spec = SPECS[name]
    dtype = torch.float32 if spec.alibi else torch.bfloat16
    torch._dynamo.reset()
    tensors, context, params = make(spec, 256, 256)

    def two_layers(q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        first = attend(q, k, v, spec=spec, context=context, params=params, backend=backend).out
        return attend(first, k, v, spec=spec, context=context, params=params, backend=backend).out

    def run(function, dtype: torch.dtype, context: AttentionContext) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = function(*leaves, context)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    fresh = dataclasses.replace(context, derived={})
    if prepared:
        call = AttentionCall(
            device="cuda", dtype=dtype, needs_grad=True, head_dim=D, n_heads=H, n_kv_heads=G, n_queries=256, n_keys=256
        )
        prepare(fresh, spec, call, backend=backend)
    eager = run(two_layers, dtype, context)
    compiled = run(torch.compile(two_layers, fullgraph=True), dtype, fresh)
    for x, y in zip(compiled, eager, strict=True):
        scale = float(y.detach().abs().max())
        assert float((x - y).detach().abs().max()) <= 4 * torch.finfo(dtype).eps * max(1.0, scale)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex", "triton"])
def test_rows_without_keys(backend: str) -> None:
    spec = AttentionSpec(causal=True)
    tensors, _, params = make(spec, 40, 40)
    leaves = [x.bfloat16().requires_grad_() for x in tensors]
    nothing = AttentionContext(kv_lengths=torch.tensor([40, 0], device=CUDA))
    result = attend(*leaves, spec=spec, context=nothing, params=params, backend=backend, return_lse=backend != "sdpa")
    assert bool((result.out[1] == 0).all())
    if result.lse is not None:
        assert bool((result.lse[1] == -torch.inf).all())
    for gradient in torch.autograd.grad(result.out.sum(), leaves):
        assert bool(torch.isfinite(gradient).all())


def test_flex_builds_and_runs_a_long_window_in_linear_memory() -> None:
    spec = AttentionSpec(causal=True, window=Window.causal_keys(512), documents=True)
    peaks = []
    for n in (16_384, 32_768):
        context = AttentionContext(q_documents=(torch.arange(n, device=CUDA) // 5000)[None])
        q, k, v = (torch.randn(1, n, heads, D, device=CUDA, dtype=torch.bfloat16) for heads in (H, G, G))
        attend(q[:, :256], k[:, :256], v[:, :256], spec=AttentionSpec(causal=True), backend="flex")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = attend(q, k, v, spec=spec, context=context, backend="flex").out
        assert bool(torch.isfinite(out).all())
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 2.5 * peaks[0], peaks
    assert peaks[1] < 32_768**2, peaks  # one byte a pair would already be more


def test_cross_entropy_in_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        (torch.randn(n, 256, generator=generator) * 0.1).to(CUDA, torch.bfloat16).requires_grad_()
        for n in (3000, 50_000)
    )
    targets = torch.randint(0, 50_000, (3000,), generator=generator).to(CUDA)
    targets[::7] = -100
    results = []
    for kind in ("exact", "ours", "twin"):
        leaves = [
            x.detach().to(torch.float64 if kind == "exact" else x.dtype).requires_grad_() for x in (hidden, weight)
        ]
        if kind == "ours":
            loss = linear_cross_entropy(*leaves, targets)
        else:
            logits = F.linear(*leaves)
            loss = F.cross_entropy(logits if kind == "exact" else logits.float(), targets, reduction="sum")
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    exact, ours, twin = ([x.detach() for x in result] for result in results)
    assert abs(float(ours[0]) - float(exact[0])) <= 2 * abs(float(twin[0]) - float(exact[0])) + 1e-4 * float(exact[0])
    for x, y, z in zip(ours[1:], exact[1:], twin[1:]):
        assert_within_budget(x, y, z)


def test_cross_entropy_peak_memory() -> None:
    hidden = torch.randn(65_536, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50_000, 256, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 50_000, (65_536,), device=CUDA)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets).backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1e9, f"{peak / 1e9:.1f} GB; the logits alone would take {65_536 * 50_000 * 4 / 1e9:.1f} GB"


def test_triton_reaches_rows_beyond_32_bit_offsets() -> None:
    """Rows 65,536 elements apart: the last of 34,000 lie past 2**31, of inputs and of the gradient that comes in."""
    T, width = 34_000, 65_536
    spec = AttentionSpec(causal=True, window=Window(left=100))
    wide = torch.empty(4, T, width, device=CUDA, dtype=torch.bfloat16)[:, :, :64].unflatten(2, (1, 64))
    assert wide[0].stride(0) * T > 2**31
    wide.copy_(torch.randn(4, T, 1, 64, device=CUDA))
    results = []
    for copy in (False, True):
        q, k, v, grad = ((x.contiguous() if copy else x)[None] for x in wide)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, spec=spec, backend="triton").out
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_triton_reaches_heads_beyond_32_bit_offsets() -> None:
    """Heads 2**30 elements apart, as of a heads-first layout of a million tokens."""
    T = 256
    buffer = torch.zeros(2 * 2**30 + 4 * T * 64, device=CUDA, dtype=torch.bfloat16)
    far = [buffer.as_strided((1, T, 3, 64), (0, 64, 2**30, 1), at * T * 64) for at in range(4)]
    for x in far:
        x.copy_(torch.randn(x.shape, device=CUDA))
    results = []
    for tensors in (far, [x.contiguous() for x in far]):
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out = attend(*leaves, spec=AttentionSpec(causal=True), backend="triton").out
        results.append([out.detach(), *torch.autograd.grad(out, leaves, tensors[3])])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["causal", "globals", "all at once"])
def test_triton_is_deterministic(name: str) -> None:
    spec = SPECS[name]
    tensors, context, params = make(spec, 300, 300)
    first, *others = (gradients("triton", tensors, torch.bfloat16, spec, context, params) for _ in range(50))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ["causal", "globals", "two-sided dilated window"])
def test_triton_replays_dropout(name: str) -> None:
    spec = dataclasses.replace(SPECS[name], dropout=0.2)
    tensors, context, _ = make(spec, 300, 300)
    params = AttentionParams(dropout_seed=torch.tensor(1234567, device=CUDA))
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = attend(*leaves, spec=spec, context=context, params=params, backend=backend).out
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for x, y in zip(*results, strict=True):
        assert float((x - y.double()).abs().max()) <= 2e-5 * max(1.0, float(x.abs().max()))
