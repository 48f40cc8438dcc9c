"""On an H100: the `hopper` backend against fp64, at the edges of its tiles, again and again, and among poison.

Run with `pytest -m gpu tests/kernels/test_gpu_hopper.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import (
    AttentionCall,
    AttentionContext,
    AttentionParams,
    AttentionSpec,
    Window,
    attend,
    explain,
)
from longspan.kernels.attention.hopper import tiles
from longspan.kernels.attention.registry import get
from longspan.kernels.testing import conformance, judge, plain_attention

_ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _ON_HOPPER, reason="needs a GPU of capability 9.0")]

CUDA = torch.device("cuda")
SPECS = {
    "full": AttentionSpec(causal=False),
    "causal": AttentionSpec(causal=True),
    "window": AttentionSpec(causal=True, window=Window(left=100)),
    "two-sided window": AttentionSpec(causal=False, window=Window.symmetric(70)),
    "right window": AttentionSpec(causal=False, window=Window(right=5)),
    "documents": AttentionSpec(causal=True, documents=True),
    "documents in a window": AttentionSpec(causal=False, documents=True, window=Window.symmetric(40)),
    "alibi": AttentionSpec(causal=True, alibi=True),
    "softcap": AttentionSpec(causal=True, softcap=3.0),
    "learned sink": AttentionSpec(causal=True, window=Window(left=40), learned_sink=True),
    "sinks": AttentionSpec(causal=True, window=Window(left=40), sink_tokens=5),
    "sinks of documents": AttentionSpec(causal=True, documents=True, window=Window(left=20), sink_tokens=3),
    "globals": AttentionSpec(causal=False, window=Window.symmetric(50), global_tokens=True),
    "causal globals": AttentionSpec(causal=True, window=Window(left=60), global_tokens=True, sink_tokens=150),
    "everything and globals": AttentionSpec(
        causal=True,
        documents=True,
        window=Window(left=50),
        alibi=True,
        softcap=5.0,
        learned_sink=True,
        global_tokens=True,
        sink_tokens=3,
    ),
    "all at once": AttentionSpec(
        causal=True, documents=True, window=Window(left=200), alibi=True, softcap=5.0, learned_sink=True
    ),
}
# (B, T, S, H, G, D, E): less than a tile, tiles exactly, odd lengths, one query, rows that see nothing, padded head
# dims, groups, more items than processors, values that are wider than keys; wide heads, padded and unequal ones.
SHAPES = (
    (1, 64, 64, 1, 1, 128, 128),
    (2, 256, 256, 4, 2, 128, 128),
    (2, 257, 257, 4, 2, 64, 64),
    (1, 1, 300, 4, 1, 128, 128),
    (2, 300, 130, 4, 2, 128, 128),
    (1, 517, 900, 3, 3, 40, 40),
    (1, 500, 500, 8, 2, 96, 96),
    (2, 333, 333, 4, 2, 128, 64),
    (3, 640, 640, 40, 8, 64, 64),
    (1, 400, 401, 2, 1, 64, 128),
    (2, 257, 257, 4, 2, 256, 256),
    (1, 1, 300, 4, 1, 256, 256),
    (2, 300, 130, 4, 2, 192, 192),
    (1, 517, 900, 3, 3, 136, 136),
    (2, 640, 640, 40, 8, 256, 256),
    (2, 333, 333, 4, 2, 192, 128),
    (1, 400, 401, 2, 1, 64, 256),
)


def make(
    spec: AttentionSpec, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], AttentionContext, AttentionParams]:
    B, T, S, H, G, D, E = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, *rest, generator=generator).to(CUDA, dtype) for rest in ((T, H, D), (S, G, D), (S, G, E)))
    n = max(T, S)
    ids = torch.randint(0, 3, (B, n), generator=generator)
    ids = ids.sort(dim=1).values if seed % 2 == 0 else ids
    # In all but the last of several sequences.
    is_global = torch.rand(B, S, generator=generator) < 0.05 * torch.arange(B, 0, -1)[:, None] - 0.05 * (B > 1)
    context = AttentionContext(
        q_documents=ids[:, n - T :].to(CUDA) if spec.documents else None,
        kv_documents=ids[:, n - S :].to(CUDA) if spec.documents else None,
        is_global=is_global.to(CUDA) if spec.global_tokens else None,
    )
    params = AttentionParams(
        alibi_slopes=torch.rand(H, generator=generator).to(CUDA),
        sink_logits=torch.randn(H, generator=generator).to(CUDA),
    )
    return [q, k, v], context, params


@contextmanager
def determined(wanted: bool) -> Iterator[None]:
    """torch's switch, by which dq has a pass of its own, and what is allocated holds NaN; without it dq is added up on
    the way to dk and dv wherever the kernel can, however short the call."""
    torch.use_deterministic_algorithms(wanted)
    worth_it = tiles._WORTH_IT
    tiles._WORTH_IT = dict.fromkeys(worth_it, 0)
    try:
        yield
    finally:
        tiles._WORTH_IT = worth_it
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", SPECS)
def test_values_lse_and_gradients(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    for seed, shape in enumerate(SHAPES):
        tensors, context, params = make(spec, shape, dtype, seed)
        ours = [x.clone().requires_grad_() for x in tensors]
        exact = [x.double().requires_grad_() for x in tensors]
        plain = [x.clone().requires_grad_() for x in tensors]
        got = attend(*ours, spec=spec, context=context, params=params, backend="hopper", return_lse=True)
        true = attend(*exact, spec=spec, context=context, params=params, backend="reference", return_lse=True)
        twin = plain_attention(*plain, spec=spec, context=context, params=params)
        assert got.lse is not None
        assert true.lse is not None
        torch.testing.assert_close(got.lse.double(), true.lse, atol=2e-3, rtol=0)
        grad_out = torch.randn_like(got.out)
        pairs = zip(
            (got.out, *torch.autograd.grad(got.out, ours, grad_out)),
            (true.out, *torch.autograd.grad(true.out, exact, grad_out.double())),
            (twin, *torch.autograd.grad(twin, plain, grad_out)),
            strict=True,
        )
        for x, y, z in pairs:
            verdict = judge(x, y, z, score=8.0)
            assert not verdict.problem, (shape, verdict.problem)


@pytest.mark.parametrize("edge", [63, 64, 65, 127, 128, 129, 191, 192, 193])
def test_windows_end_on_either_side_of_every_boundary_of_tiles(edge: int) -> None:
    for D, spec in itertools.product(
        (64, 128, 256),
        (
            AttentionSpec(causal=True, window=Window(left=edge)),
            AttentionSpec(causal=False, window=Window(left=edge, right=3)),
            AttentionSpec(causal=False, window=Window(left=3, right=edge)),
        ),
    ):
        tensors, context, params = make(spec, (1, 450, 450, 2, 1, D, D), torch.bfloat16)
        got = attend(*tensors, spec=spec, context=context, params=params, backend="hopper", return_lse=True)
        exact = [x.double() for x in tensors]
        true = attend(*exact, spec=spec, context=context, params=params, backend="reference", return_lse=True)
        twin = plain_attention(*tensors, spec=spec, context=context, params=params)
        verdict = judge(got.out, true.out, twin, score=8.0)
        assert not verdict.problem, verdict.problem
        torch.testing.assert_close(got.lse.double(), true.lse, atol=2e-3, rtol=0)  # pyright: ignore[reportOptionalMemberAccess]: asked for


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("name", SPECS)
def test_gradients_through_the_lse_and_of_slopes_and_sinks(
    name: str, deterministic: bool, D: int, half: torch.dtype
) -> None:
    spec = SPECS[name]
    tensors, context, params = make(spec, (2, 300, 333, 4, 2, D, D), half)
    drawn = ((params.alibi_slopes, spec.alibi), (params.sink_logits, spec.learned_sink))
    extra = [x.requires_grad_() for x, used in drawn if used and x is not None]
    found = []
    for dtype, backend in ((half, "hopper"), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        result = attend(*leaves, spec=spec, context=context, params=params, backend=backend, return_lse=True)
        assert result.lse is not None
        generator = torch.Generator(CUDA).manual_seed(1)
        d_out, d_lse = (torch.randn(x.shape, device=CUDA, generator=generator) for x in (result.out, result.lse))
        given = d_out.to(half).to(dtype), d_lse.to(result.lse.dtype) * torch.isfinite(result.lse)
        with determined(deterministic and backend == "hopper"):
            found.append(torch.autograd.grad((result.out, result.lse), [*leaves, *extra], given))
    for ours, true in zip(*found, strict=True):
        assert torch.isfinite(ours).all()
        error = (ours.double() - true.double()).norm() / true.double().norm()
        most = 5e-2 if ours.dim() == 1 else 2.5e-2  # a head's sums cancel
        assert error < most, (name, D, tuple(ours.shape), float(error))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_backward_pass_is_ours(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    from longspan.kernels.attention.hopper import operator

    ours, seen = operator.backward, []

    def counted(*arguments: object) -> tuple[Tensor, ...]:
        seen.append(len(arguments))
        return ours(*arguments)  # pyright: ignore[reportArgumentType]: passed on as they came

    monkeypatch.setattr(operator, "backward", counted)
    spec = AttentionSpec(causal=True)
    tensors, _, _ = make(spec, (1, 200, 200, 2, 1, 64, 64), dtype)
    out = attend(*(x.requires_grad_() for x in tensors), spec=spec, backend="hopper").out
    torch.autograd.grad(out, tensors, torch.randn_like(out))
    assert len(seen) == 1


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("loudness", [2.0**-10, 2.0**9])
def test_gradients_in_fp16_of_quiet_and_loud_ones(loudness: float, D: int) -> None:
    """As small and as large as a loss scale makes them: relative to themselves they err no more."""
    for name in ("causal", "documents", "all at once"):
        spec = SPECS[name]
        tensors, context, params = make(spec, (2, 300, 333, 4, 2, D, D), torch.float16)
        ours = [x.clone().requires_grad_() for x in tensors]
        exact = [x.double().requires_grad_() for x in tensors]
        plain = [x.clone().requires_grad_() for x in tensors]
        got = attend(*ours, spec=spec, context=context, params=params, backend="hopper").out
        true = attend(*exact, spec=spec, context=context, params=params, backend="reference").out
        twin = plain_attention(*plain, spec=spec, context=context, params=params)
        grad_out = torch.randn_like(got) * loudness
        trios = zip(
            torch.autograd.grad(got, ours, grad_out),
            torch.autograd.grad(true, exact, grad_out.double()),
            torch.autograd.grad(twin, plain, grad_out),
            strict=True,
        )
        for trio in trios:
            x, y, z = (gradient / loudness for gradient in trio)
            verdict = judge(x, y, z, score=8.0)
            assert not verdict.problem, (name, verdict.problem)


@pytest.mark.parametrize(("G", "D"), [(16, 128), (4, 128), (16, 64), (4, 256)])
def test_over_long_texts_gradients_agree_with_tritons(G: int, D: int) -> None:
    """Many tiles a program, and several groups of heads, where a mask in fp64 would not fit."""
    spec = AttentionSpec(causal=True)
    tensors, _, _ = make(spec, (2, 8192, 8192, 16, G, D, D), torch.bfloat16)
    grad_out = torch.randn(2, 8192, 16, D, device=CUDA, dtype=torch.bfloat16)
    found = []
    for backend in ("hopper", "triton"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = attend(*leaves, spec=spec, backend=backend).out
        found.append(torch.autograd.grad(out, leaves, grad_out))
    for ours, theirs in zip(*found, strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 2e-2, float(error)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize(
    ("name", "D", "dtype"),
    [
        ("causal", 64, torch.bfloat16),
        ("causal", 128, torch.bfloat16),
        ("causal", 128, torch.float16),
        ("two-sided window", 64, torch.bfloat16),
        ("documents", 128, torch.bfloat16),
        ("all at once", 128, torch.bfloat16),
        ("globals", 128, torch.bfloat16),
        ("causal globals", 64, torch.bfloat16),
        ("causal", 256, torch.bfloat16),
        ("two-sided window", 256, torch.float16),
        ("documents", 256, torch.bfloat16),
        ("all at once", 256, torch.bfloat16),
    ],
)
def test_200_runs_agree_in_every_bit(name: str, D: int, dtype: torch.dtype, deterministic: bool) -> None:
    """But for dq that is added up on the way: that agrees to a rounding or two of fp32."""
    spec, shape = SPECS[name], (2, 1000, 1000, 16, 4, D, D)
    tensors, context, params = make(spec, shape, dtype)
    leaves = [x.requires_grad_() for x in tensors]
    grad_out = torch.randn(*shape[:2], shape[3], shape[6], device=CUDA, dtype=dtype)

    def step() -> list[Tensor]:
        result = attend(*leaves, spec=spec, context=context, params=params, backend="hopper", return_lse=True)
        assert result.lse is not None
        with determined(deterministic):
            dq, *others = torch.autograd.grad(result.out, leaves, grad_out)
        return [result.out, result.lse, *others, dq]

    first = step()
    with determined(deterministic):
        added = not deterministic and tiles.adds_dq(spec, *shape[1:3], D, D)
    for _ in range(199):
        *others, dq = step()
        for x, y in zip(others, first):
            assert torch.equal(x, y)
        if added:
            torch.testing.assert_close(dq.float(), first[-1].float(), atol=1e-6, rtol=2 * torch.finfo(dtype).eps)
        else:
            assert torch.equal(dq, first[-1])


@pytest.mark.parametrize("D", [80, 200])
def test_what_lies_around_the_tensors_does_not_reach_the_result(D: int) -> None:
    """Rows beyond the last query and key, columns beyond the head dim and heads between belong to somebody else."""
    spec = AttentionSpec(causal=True)
    (q, k, v), _, _ = make(spec, (2, 130, 170, 2, 2, D, D), torch.bfloat16)

    def in_poison(x: Tensor) -> Tensor:
        B, T, H, D = x.shape
        poison = torch.full((B, T + 70, H + 1, D + 40), torch.nan, device=CUDA, dtype=x.dtype)
        poison[:, :T, :H, :D] = x
        return poison[:, :T, :H, :D]

    alone = attend(q, k, v, spec=spec, backend="hopper", return_lse=True)
    among = attend(in_poison(q), in_poison(k), in_poison(v), spec=spec, backend="hopper", return_lse=True)
    assert torch.equal(alone.out, among.out)
    assert torch.equal(alone.lse, among.lse)  # pyright: ignore[reportArgumentType]: asked for
    assert torch.isfinite(alone.out).all()


@pytest.mark.parametrize("D", [128, 256])
def test_rows_that_see_nothing_give_zeros(D: int) -> None:
    spec = AttentionSpec(causal=True)
    tensors, _, _ = make(spec, (1, 400, 50, 2, 2, D, D), torch.bfloat16)
    leaves = [x.requires_grad_() for x in tensors]
    result = attend(*leaves, spec=spec, backend="hopper", return_lse=True)
    assert result.lse is not None
    assert not result.out[:, :350].any()
    assert (result.lse[:, :, :350] == -torch.inf).all()
    assert torch.isfinite(result.lse[:, :, 350:]).all()
    d_q, d_k, d_v = torch.autograd.grad(result.out, leaves, torch.ones_like(result.out))
    assert not d_q[:, :350].any()
    assert all(torch.isfinite(x).all() for x in (d_q, d_k, d_v))


def test_heads_first_and_packed_layouts_are_read_in_place_or_copied() -> None:
    spec = AttentionSpec(causal=True)
    (q, k, v), _, _ = make(spec, (2, 200, 200, 4, 4, 64, 64), torch.bfloat16)
    expected = attend(q, k, v, spec=spec, backend="hopper").out
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    packed = torch.stack((q, k, v), dim=2).unbind(2)
    shifted = [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in (q, k, v)]
    shared = [q, *(x[:, :, :1].expand(-1, -1, 4, -1) for x in (k, v))]
    for layout in (heads_first, packed, shifted):
        assert torch.equal(attend(*layout, spec=spec, backend="hopper").out, expected)
    repeated = [x.contiguous() for x in shared]
    assert torch.equal(
        attend(*shared, spec=spec, backend="hopper").out, attend(*repeated, spec=spec, backend="hopper").out
    )


def test_called_again_elsewhere_it_computes_the_same() -> None:
    """Later calls skip Triton's launch: with other tensors of the layout, on another stream, in another thread."""
    spec = SPECS["all at once"]
    made = [make(spec, (2, 256, 256, 4, 2, 64, 64), torch.bfloat16, seed=2 * i) for i in range(3)]

    def run() -> list[Tensor]:
        found = []
        for tensors, context, params in made:
            leaves = [x.clone().requires_grad_() for x in tensors]
            out = attend(*leaves, spec=spec, context=context, params=params, backend="hopper").out
            found += [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
        return found

    first, again = run(), run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = run()
    torch.cuda.current_stream().wait_stream(stream)
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(run).result()
    for later in (again, beside, elsewhere):
        for x, y in zip(first, later, strict=True):
            assert torch.equal(x, y)
    for one, other in itertools.combinations(range(3), 2):
        assert not torch.equal(first[4 * one], first[4 * other])


def test_compiled_and_recorded_it_computes_the_same() -> None:
    spec = AttentionSpec(causal=True)
    (q, k, v), _, _ = make(spec, (2, 256, 256, 4, 2, 64, 64), torch.bfloat16)
    expected = attend(q, k, v, spec=spec, backend="hopper").out

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, spec=spec, backend="hopper").out

    assert torch.equal(torch.compile(call, fullgraph=True)(q, k, v), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(q, k, v)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_compiled_gradients_are_the_eager_ones(dtype: torch.dtype) -> None:
    spec = AttentionSpec(causal=True)
    tensors, _, _ = make(spec, (2, 300, 300, 4, 2, 128, 128), dtype)
    grad_out = torch.randn(2, 300, 4, 128, device=CUDA, dtype=dtype)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, spec=spec, backend="hopper").out

    found = []
    for function in (call, torch.compile(call, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in tensors]
        found.append(torch.autograd.grad(function(*leaves), leaves, grad_out))
    (eager_dq, *eager), (compiled_dq, *compiled) = found
    torch.testing.assert_close(eager_dq, compiled_dq, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)  # added in any order
    for x, y in zip(eager, compiled, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["sinks", "globals", "everything and globals"])
def test_compiled_and_recorded_global_tokens_are_the_eager_ones(name: str) -> None:
    spec = SPECS[name]
    tensors, context, params = make(spec, (2, 300, 300, 4, 2, 64, 64), torch.bfloat16)
    fresh = AttentionContext(
        q_documents=context.q_documents, kv_documents=context.kv_documents, is_global=context.is_global
    )

    def call(context: AttentionContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, spec=spec, context=context, params=params, backend="hopper").out

    leaves = [x.clone().requires_grad_() for x in tensors]
    eager = call(context, *leaves)
    expected = [eager, *torch.autograd.grad(eager, leaves, torch.ones_like(eager))]
    # A context that was used tells how many tokens are global; one that was not leaves it to the device.
    for known in (context, fresh):
        torch.compiler.reset()
        out = torch.compile(call, fullgraph=True)(known, *leaves)
        found = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, atol=2e-2, rtol=2e-2)  # other slices of dense rows
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call(context, *tensors)
    out.zero_()
    graph.replay()
    assert torch.equal(out, eager)


def test_sequences_of_a_batch_do_not_know_of_each_others_global_tokens() -> None:
    spec = SPECS["globals"]
    (q, k, v), context, _ = make(spec, (3, 300, 300, 4, 2, 64, 64), torch.bfloat16)
    assert context.is_global is not None
    together = attend(q, k, v, spec=spec, context=context, backend="hopper").out
    for i in range(3):
        one = AttentionContext(is_global=context.is_global[i : i + 1])
        alone = attend(*(x[i : i + 1] for x in (q, k, v)), spec=spec, context=one, backend="hopper").out
        torch.testing.assert_close(alone, together[i : i + 1], atol=2e-2, rtol=2e-2)


def test_conformance() -> None:
    drawn = 10 if find_spec("hypothesis") else 0
    report = conformance("hopper", device="cuda", examples=drawn, max_length=300, thorough=False)
    assert report.ok, report.text()


def test_it_says_where_it_can_and_where_it_cannot() -> None:
    call = AttentionCall(device="cuda", dtype=torch.bfloat16, head_dim=256, n_queries=8192, n_keys=8192, n_heads=8)
    assert not get("hopper").unsupported(AttentionSpec(causal=True), call)
    assert "hopper     can" in explain(AttentionSpec(causal=True), call)
    assert "hopper     cannot: dropout" in explain(AttentionSpec(causal=True, dropout=0.1), call)
