"""On CUDA: the decode kernel against fp64, captured in a CUDA graph, compiled, over many splits and far offsets.

Run with `pytest -m gpu tests/kernels/test_gpu_decode.py`.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import AttentionContext, AttentionParams, AttentionSpec, BlockLayout, Window, attend
from longspan.kernels.attention.quantize import dequantize, quantize
from longspan.kernels.testing import conformance, judge, plain_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Inductor's own warnings (TF32 advice, online softmax) say nothing about our code.
    pytest.mark.filterwarnings("default:::torch"),
]

CUDA = torch.device("cuda")
LAYOUT = BlockLayout.from_rows(
    [[(i - j) % 3 != 1 for j in range(8)] for i in range(8)], q_block=512, kv_block=512
)  # 4,096 positions
SPECS = {
    "causal": AttentionSpec(causal=True),
    "full": AttentionSpec(causal=False),
    "window": AttentionSpec(causal=True, window=Window(left=700)),
    "window and sinks": AttentionSpec(causal=True, window=Window(left=300), sink_tokens=4),
    "two-sided window": AttentionSpec(causal=False, window=Window(90, 40)),
    "dilated": AttentionSpec(causal=True, window=Window(100, dilation=3)),
    "documents": AttentionSpec(causal=True, documents=True, window=Window(left=400), sink_tokens=2),
    "globals": AttentionSpec(causal=True, global_tokens=True, window=Window(left=60)),
    "layout": AttentionSpec(causal=True, block_sparse=LAYOUT),
    "alibi softcap sink": AttentionSpec(causal=True, alibi=True, softcap=2.0, learned_sink=True),
}
KINDS = ["contiguous", "ragged", "paged", "ring"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(slots=True)
class Problem:
    """q [B, T, H, D]; k, v [B, S, G, …] in `dtype`, NaN in empty slots; as the kernel gets them: `k`, `v` in pages."""

    q: Tensor
    k_BSGD: Tensor
    v_BSGE: Tensor
    k: Tensor
    v: Tensor
    context: AttentionContext
    plain: AttentionContext  # without pages
    params: AttentionParams


def make(
    spec: AttentionSpec,
    kind: str,
    dtype: torch.dtype,
    *,
    T: int = 1,
    S: int = 2048,
    B: int = 3,
    H: int = 8,
    G: int = 2,
    D: int = 64,
    E: int | None = None,
    page: int = 16,
) -> Problem:
    generator = torch.Generator().manual_seed(S + T)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(CUDA, dtype)

    # Heads first in memory, as caches keep them.
    q, k, v = draw(B, T, H, D), draw(B, G, S, D).transpose(1, 2), draw(B, G, S, E or D).transpose(1, 2)
    context = AttentionContext()
    lengths = torch.tensor([S, S - S // 3, min(T, S)], device=CUDA)[:B]
    if kind in ("ragged", "paged"):
        context.kv_lengths = lengths
        context.q_positions = lengths[:, None] - T + torch.arange(T, device=CUDA)
    elif kind == "ring":
        position = torch.arange(S, device=CUDA).roll(S // 3)
        position[S // 2 :: 5] = -1
        context.kv_positions = position[None].clone()
        context.q_positions = torch.arange(S - T, S, device=CUDA)[None]
    if spec.documents:
        ids = (torch.arange(S, device=CUDA) // 517)[None].expand(B, S)
        at = context.query_positions(T, S, CUDA).clamp(0, S - 1).expand(B, T)
        context.kv_documents, context.q_documents = ids.contiguous(), ids.gather(1, at)
    if spec.global_tokens:
        context.is_global = (torch.rand(B, S, generator=generator) > 0.98).to(CUDA)
    exists = context.existing_keys(S)
    if exists is not None:
        gone = ~exists.expand(B, S)
        k[gone], v[gone] = torch.nan, torch.nan
    params = AttentionParams(
        alibi_slopes=torch.rand(H, generator=generator).to(CUDA) / 16 if spec.alibi else None,
        sink_logits=torch.randn(H, generator=generator).to(CUDA) if spec.learned_sink else None,
    )
    plain, stored_k, stored_v = context, k, v
    if kind == "paged":
        pages = S // page
        order = torch.randperm(B * pages + 3, generator=generator).to(CUDA)
        table = order[: B * pages].view(B, pages)
        stored_k, stored_v = (pool(x, table, len(order), page) for x in (k, v))
        unused = torch.arange(pages, device=CUDA)[None] * page >= lengths[:, None]
        context = dataclasses.replace(
            plain, page_table=torch.where(unused, -(10**6), table).int(), derived={}
        )  # nobody may follow entries of pages without keys
    return Problem(q, k, v, stored_k, stored_v, context, plain, params)


def pool(x_BSGD: Tensor, table_BP: Tensor, n_pages: int, page: int) -> Tensor:
    """[n_pages, page, G, …] with a head's keys side by side in each page."""
    G, tail = x_BSGD.shape[2], x_BSGD.shape[3:]
    found = x_BSGD.new_full((n_pages, G, page, *tail), torch.nan if x_BSGD.is_floating_point() else 99)
    found = found.transpose(1, 2)
    found[table_BP.flatten()] = x_BSGD.reshape(-1, page, G, *tail)
    return found


def run(problem: Problem, spec: AttentionSpec, context: AttentionContext | None = None) -> tuple[Tensor, Tensor]:
    found = attend(
        problem.q,
        problem.k,
        problem.v,
        spec=spec,
        context=context or problem.context,
        params=problem.params,
        backend="decode",
        return_lse=True,
    )
    assert found.lse is not None
    return found.out, found.lse


def check(problem: Problem, spec: AttentionSpec, out: Tensor, lse: Tensor) -> None:
    """Within the budget of the suite; `problem.k_BSGD` and `v_BSGE` are what is attended to."""
    slopes, sinks = problem.params.alibi_slopes, problem.params.sink_logits
    wide = AttentionParams(
        alibi_slopes=None if slopes is None else slopes.double(), sink_logits=None if sinks is None else sinks.double()
    )
    fresh = dataclasses.replace(problem.plain, derived={})
    tensors = (problem.q, problem.k_BSGD, problem.v_BSGE)
    exact = attend(
        *(x.double() for x in tensors), spec=spec, context=fresh, params=wide, backend="reference", return_lse=True
    )
    twin = plain_attention(
        *(x.to(problem.q.dtype) for x in tensors),
        spec=spec,
        context=fresh,
        params=AttentionParams(alibi_slopes=slopes, sink_logits=sinks),
    )
    verdict = judge(out, exact.out, twin, score=8.0)
    assert not verdict.problem, verdict.problem
    assert exact.lse is not None
    sees = exact.lse != -torch.inf
    assert torch.equal(lse != -torch.inf, sees)
    torch.testing.assert_close(lse[sees].double(), exact.lse[sees], rtol=0, atol=3e-5)
    assert bool((out.transpose(1, 2)[~sees] == 0).all())


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_it_conforms(dtype: torch.dtype) -> None:
    conformance("decode", device="cuda", dtypes=[dtype], examples=60, max_length=300).raise_if_failed()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_values(name: str, kind: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    for T in (1, 5) if dtype == torch.bfloat16 else (1,):
        problem = make(spec, kind, dtype, T=T)
        check(problem, spec, *run(problem, spec))


@pytest.mark.parametrize(
    ("H", "G", "D", "E", "T"),
    [
        (1, 1, 64, 64, 1),
        (8, 8, 128, 128, 1),
        (16, 1, 128, 128, 1),
        (48, 1, 64, 64, 2),
        (6, 2, 80, 48, 16),
        (8, 1, 256, 256, 3),
        (4, 4, 16, 16, 7),
        (64, 2, 128, 128, 16),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_heads_and_dims(H: int, G: int, D: int, E: int, T: int, dtype: torch.dtype) -> None:
    spec = SPECS["causal"]
    problem = make(spec, "ragged", dtype, T=T, S=1500, H=H, G=G, D=D, E=E)
    check(problem, spec, *run(problem, spec))


@pytest.mark.parametrize("page", [16, 32, 64, 128, 8, 20, 1])
@pytest.mark.parametrize("name", ["causal", "window and sinks", "documents"])
def test_page_sizes(name: str, page: int) -> None:
    spec = SPECS[name]
    problem = make(spec, "paged", torch.bfloat16, S=1280, page=page, T=2)
    check(problem, spec, *run(problem, spec))


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_eight_bits(kind: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    if stored == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8_e4m3fn needs capability 8.9")
    for name in ("causal", "window and sinks", "documents"):
        spec = SPECS[name]
        problem = make(spec, kind, dtype, T=2, D=128)
        # Values of about 0.001: their weights times their scales would vanish in fp16.
        (k, k_scale), (v, v_scale) = (quantize(x, stored) for x in (problem.k_BSGD, problem.v_BSGE * 1e-3))
        problem.k_BSGD, problem.v_BSGE = (
            dequantize(x, scale, torch.float64).nan_to_num(0.0) for x, scale in ((k, k_scale), (v, v_scale))
        )
        problem.v_BSGE *= 1000
        if problem.context.page_table is not None:
            table = problem.context.page_table.clamp(min=0)
            n_pages, page = problem.k.shape[:2]
            used = problem.context.page_table >= 0
            k, v, k_scale, v_scale = (paged_like(x, table, used, n_pages, page) for x in (k, v, k_scale, v_scale))
        problem.k, problem.v = k, v
        problem.params = dataclasses.replace(problem.params, k_scale_BSG=k_scale, v_scale_BSG=v_scale)
        out, lse = run(problem, spec)
        check(problem, spec, (out.float() * 1000).to(dtype), lse)


def paged_like(x_BSG: Tensor, table_BP: Tensor, used_BP: Tensor, n_pages: int, page: int) -> Tensor:
    """A pool that holds the used pages of x; the others are poison (bytes 0x7f: NaN in fp8, and NaN scales)."""
    tail = x_BSG.shape[2:]
    found = torch.full((n_pages, page, *tail), 0, dtype=x_BSG.dtype, device=x_BSG.device)
    found.view(torch.uint8).fill_(0x7F)
    rows = x_BSG.unflatten(1, (-1, page))
    found.view(torch.uint8)[table_BP[used_BP].long()] = rows.contiguous().view(torch.uint8)[used_BP]
    return found


def test_a_captured_call_follows_lengths_positions_and_pages() -> None:
    """Nothing waits for the device, and a replay reads what lies in the tensors then."""
    spec = SPECS["window and sinks"]
    problem = make(spec, "paged", torch.bfloat16, S=4096)
    context = problem.context
    assert context.kv_lengths is not None
    assert context.q_positions is not None
    run(problem, spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = run(problem, spec)
    full = make(spec, "contiguous", torch.bfloat16, S=4096)
    pages = 4096 // 16
    generator = torch.Generator().manual_seed(5)
    for lengths in ([4096, 100, 1], [1, 2000, 0], [3333, 64, 4096]):
        # Other keys in other pages, other lengths: copied into the tensors that the graph reads.
        now = torch.tensor(lengths, device=CUDA)
        table = torch.randperm(problem.k.shape[0], generator=generator)[: 3 * pages].view(3, pages).to(CUDA)
        for mine, theirs in ((problem.k, full.k_BSGD), (problem.v, full.v_BSGE)):
            mine.copy_(pool(theirs, table, len(mine), 16))
        context.kv_lengths.copy_(now)
        context.q_positions.copy_(now[:, None] - 1)
        assert context.page_table is not None
        context.page_table.copy_(table)
        graph.replay()
        problem.k_BSGD, problem.v_BSGE = full.k_BSGD, full.v_BSGE
        problem.plain = AttentionContext(kv_lengths=now, q_positions=now[:, None] - 1)
        check(problem, spec, out, lse)


@pytest.mark.parametrize("name", ["causal", "documents", "alibi softcap sink"])
@pytest.mark.parametrize("kind", KINDS)
def test_deterministic(kind: str, name: str) -> None:
    spec = SPECS[name]
    problem = make(spec, kind, torch.bfloat16)
    first = run(problem, spec)
    for _ in range(30):
        assert all(torch.equal(x, y) for x, y in zip(first, run(problem, spec), strict=True))


@pytest.mark.parametrize("name", ["causal", "documents", "window and sinks"])
def test_compiles_whole(name: str) -> None:
    spec = SPECS[name]
    problem = make(spec, "paged", torch.bfloat16)
    torch._dynamo.reset()

    def step(q: Tensor, context: AttentionContext) -> Tensor:
        first = attend(q, problem.k, problem.v, spec=spec, context=context, params=problem.params, backend="decode")
        return attend(
            first.out * 2, problem.k, problem.v, spec=spec, context=context, params=problem.params, backend="auto"
        ).out

    expected = step(problem.q, dataclasses.replace(problem.context, derived={}))
    compiled = torch.compile(step, fullgraph=True)(problem.q, dataclasses.replace(problem.context, derived={}))
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-2)


def test_many_splits_of_a_long_context() -> None:
    spec = SPECS["causal"]
    problem = make(spec, "contiguous", torch.bfloat16, S=100_003, B=1)
    check(problem, spec, *run(problem, spec))
    window = SPECS["window"]
    check(problem, window, *run(problem, window))


def test_keys_beyond_32_bit_offsets() -> None:
    """A cache of 4 × 8 heads × 600,000 keys × 128: the last rows and heads lie past 2**31 elements."""
    spec = SPECS["window"]
    B, G, S, D = 4, 8, 600_000, 128
    k = torch.zeros(B, G, S, D, device=CUDA, dtype=torch.bfloat16)
    assert k.numel() > 2**31
    v = torch.zeros_like(k)
    for x in (k, v):
        x[:, :, -1000:].normal_()
    q = torch.randn(B, 1, G, D, device=CUDA, dtype=torch.bfloat16)
    out = attend(q, k.transpose(1, 2), v.transpose(1, 2), spec=spec, backend="decode").out
    near = (x[:, :, -1000:].transpose(1, 2) for x in (k, v))
    expected = attend(q, *near, spec=spec, backend="reference").out
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-3)


def test_nothing_to_attend_to() -> None:
    spec = SPECS["causal"]
    problem = make(spec, "contiguous", torch.bfloat16, S=64)
    nothing = AttentionContext(kv_lengths=torch.zeros(3, dtype=torch.int64, device=CUDA))
    out, lse = run(problem, spec, nothing)
    assert bool((out == 0).all())
    assert bool((lse == -torch.inf).all())
