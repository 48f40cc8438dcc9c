"""The decode kernel in Triton's interpreter: what the conformance suite does not draw, and mistakes that it catches.

`test_decode.py` runs this file in a process of its own, because Triton looks at TRITON_INTERPRET when it is imported.
Tiles are 16 keys here and there are up to three splits, so that short tests cross every edge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import (
    AttentionCall,
    AttentionContext,
    AttentionParams,
    AttentionSpec,
    Feature,
    Phase,
    Window,
    attend,
)
from longspan.kernels.attention.decode import Decode
from longspan.kernels.attention.quantize import quantize
from longspan.kernels.attention.tiles import n_splits
from longspan.kernels.attention.triton import decode_launch
from longspan.kernels.testing import conformance

F = Feature
DECODE = Decode()
B, T, S, H, G, D = 3, 4, 96, 4, 2, 16
PAGE = 8

# A key in an empty slot may be NaN; its score is then thrown away.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def problem(dtype: torch.dtype = torch.float32, n_queries: int = T) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, n_queries, H, D), (B, G, S, D), (B, G, S, D))
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return [q, k.transpose(1, 2), v.transpose(1, 2)]


def assert_same(
    tensors: list[Tensor],
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams | None = None,
    *,
    atol: float = 1e-5,
) -> None:
    """The kernel gives what the reference gives."""
    params = params or AttentionParams()
    ours = DECODE(*tensors, spec=spec, context=context, params=params, return_lse=True)
    fresh = dataclasses.replace(context, derived={})
    exact = attend(*tensors, spec=spec, context=fresh, params=params, backend="reference", return_lse=True)
    torch.testing.assert_close(ours.out, exact.out, rtol=0, atol=atol)
    assert ours.lse is not None
    assert exact.lse is not None
    torch.testing.assert_close(ours.lse, exact.lse, rtol=0, atol=1e-5)


def ragged(n_queries: int = T) -> AttentionContext:
    """All keys, a partial last tile, and a row shorter than its queries: as a cache with lengths stands."""
    lengths = torch.tensor([S, 37, 2])
    return AttentionContext(kv_lengths=lengths, q_positions=lengths[:, None] - n_queries + torch.arange(n_queries))


def paged(tensors: list[Tensor], context: AttentionContext) -> list[Tensor]:
    """k and v in pages in random order, and `context` with the table: garbage for pages that hold no key."""
    q, *stored = tensors
    n_pages = B * S // PAGE + 2
    table = torch.randperm(n_pages, generator=torch.Generator().manual_seed(1))[: B * S // PAGE].view(B, -1)
    pools = []
    for x in stored:
        pool = torch.full((n_pages, PAGE, *x.shape[2:]), torch.nan)
        pool[table.flatten()] = x.reshape(-1, PAGE, *x.shape[2:]).float()
        pools.append(pool.to(x.dtype))
    assert context.kv_lengths is not None
    unused = torch.arange(S // PAGE)[None] * PAGE >= context.kv_lengths[:, None]
    context.page_table = torch.where(unused, -(10**6), table)
    return [q, *pools]


def test_some_features_conform() -> None:
    """All of them, thoroughly, in the slow test of `test_decode.py`: about a second for each run."""
    some = [F.CAUSAL, F.DOCUMENTS, F.GLOBAL_TOKENS, F.GQA, F.KV_LENGTHS, F.POSITIONS, F.PAGED, F.QUANTIZED_KV]
    report = conformance("decode", dtypes=[torch.float32], features=some, examples=0, max_length=20, thorough=False)
    report.raise_if_failed()


@pytest.mark.parametrize(
    ("left", "sinks"), [(0, 0), (1, 3), (15, 0), (16, 3), (17, 20), (31, 0), (32, 3), (33, 0), (60, 20), (200, 3)]
)
def test_windows_at_every_edge_of_tiles_and_splits(left: int, sinks: int) -> None:
    assert_same(problem(), AttentionSpec(causal=True, window=Window(left=left), sink_tokens=sinks), ragged())


def test_queries_stand_at_the_end_unless_told_otherwise() -> None:
    for spec in (AttentionSpec(causal=True), AttentionSpec(causal=True, window=Window(left=18), sink_tokens=2)):
        assert_same(problem(), spec, AttentionContext())
        assert_same(problem(), spec, AttentionContext(kv_lengths=torch.tensor([S, 80, 0])))


@pytest.mark.parametrize("window", [Window(5, 3), Window(None, 7), Window(40, 0), Window(2**40, 2**40)])
def test_windows_that_look_ahead(window: Window) -> None:
    q_positions = torch.tensor([0, 5, 47, 94])[None]
    spec = AttentionSpec(causal=False, window=window, sink_tokens=2)
    assert_same(problem(), spec, AttentionContext(q_positions=q_positions))


@pytest.mark.parametrize("far", [-5, 10**6, 2**40])
def test_queries_that_stand_far_from_every_key(far: int) -> None:
    q_positions = far + torch.arange(T)[None]
    for spec in (AttentionSpec(causal=True), AttentionSpec(causal=True, window=Window(9), sink_tokens=2)):
        assert_same(problem(), spec, AttentionContext(q_positions=q_positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pages_in_any_order(dtype: torch.dtype) -> None:
    for spec in (AttentionSpec(causal=True), AttentionSpec(causal=True, window=Window(20), sink_tokens=5)):
        context = ragged()
        tensors = paged(problem(dtype), context)
        assert_same(tensors, spec, context, atol=1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
def test_eight_bits_of_any_size(stored: torch.dtype, dtype: torch.dtype, size: float) -> None:
    """fp16 holds neither the weights times small scales nor queries of any size: both have powers of two beside."""
    q, k, v = problem()
    (k, k_scale), (v, v_scale) = quantize(k / size, stored), quantize(v / max(size, 1.0), stored)
    q = (q * min(size, 1e3)).to(dtype)
    params = AttentionParams(k_scale_BSG=k_scale * (size / min(size, 1e3)), v_scale_BSG=v_scale)
    tensors = [q, k, v]
    ours = DECODE(*tensors, spec=AttentionSpec(causal=True), context=ragged(), params=params).out.float()
    exact = attend(
        q.double(), k, v, spec=AttentionSpec(causal=True), context=ragged(), params=params, backend="reference"
    ).out
    scale = float(exact.abs().max())
    atol = (1e-5 if dtype == torch.float32 else 3e-3) * scale + (6e-8 if dtype == torch.float16 else 0.0)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=atol)


def test_a_learned_sink_counts_once_however_many_splits() -> None:
    spec = AttentionSpec(causal=True, learned_sink=True, alibi=True, softcap=2.0)
    params = AttentionParams(
        sink_logits=torch.tensor([3.0, -2.0, 0.0, 50.0]), alibi_slopes=torch.tensor([0.5, 0.1, 0.0, 1.0])
    )
    assert_same(problem(), spec, ragged(), params)


def test_strides_of_all_kinds() -> None:
    q, k, v = problem()
    wide = torch.full((B, S, G, 2, D), torch.nan)
    wide[:, :, :, 1] = k
    lengths = torch.stack([torch.tensor([S, 37, 2]), torch.zeros(3)], dim=1).long()[:, 0]
    positions = torch.arange(2 * T).view(T, 2)[:, 0][None] + 40
    context = AttentionContext(kv_lengths=lengths, q_positions=positions)
    assert_same(
        [q.transpose(0, 1).contiguous().transpose(0, 1), wide[:, :, :, 1], v], AttentionSpec(causal=True), context
    )
    assert_same([q, k, v.flip(-1)[..., ::2].repeat_interleave(2, -1)[..., ::2]], AttentionSpec(causal=True), context)


@pytest.mark.parametrize("n_queries", [1, 16])
def test_more_rows_than_a_tile(n_queries: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(1, n_queries, 24, D, generator=generator)
    k, v = torch.randn(2, 1, 50, 1, D, generator=generator)
    assert_same([q, k, v], AttentionSpec(causal=True), AttentionContext())


@pytest.mark.parametrize("shape", ["no batch", "no keys"])
def test_nothing_to_do(shape: str) -> None:
    q, k, v = problem()
    q, k, v = (q[:0], k[:0], v[:0]) if shape == "no batch" else (q, k[:, :0], v[:, :0])
    found = DECODE(q, k, v, spec=AttentionSpec(causal=True), context=AttentionContext(), params=AttentionParams())
    assert found.out.shape == q.shape
    assert bool((found.out == 0).all())


def test_one_node_for_torch_compile() -> None:
    q, k, v = problem()
    spec = AttentionSpec(causal=True, window=Window(20), documents=True)
    ids = (torch.arange(S) // 11)[None]

    def step(q: Tensor, context: AttentionContext) -> Tensor:
        return DECODE(q, k, v, spec=spec, context=context, params=AttentionParams()).out

    contexts = [AttentionContext(q_documents=ids[:, S - T :], kv_documents=ids) for _ in range(2)]
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(q, contexts[0])
    assert torch.equal(compiled, step(q, contexts[1]))


def test_the_operator_passes_torchs_own_checks() -> None:
    tensors = problem()
    arguments = (*tensors, *([None] * 9), decode_launch.spec_text(AttentionSpec(causal=True)))
    torch.library.opcheck(torch.ops.longspan.decode_attention.default, arguments)


def test_what_the_interpreter_cannot_multiply_is_refused() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        call = AttentionCall(phase=Phase.DECODE, dtype=dtype)
        assert any("interpreter" in str(reason) for reason in DECODE.unsupported(AttentionSpec(causal=True), call))


@pytest.mark.parametrize(
    ("programs", "tiles", "splits"),
    [(4, 2048, 33), (256, 64, 1), (32, 512, 5), (4, 16, 4), (4, 3, 1), (1, 10**6, 128), (0, 0, 1)],
)
def test_splits_follow_from_sizes(programs: int, tiles: int, splits: int) -> None:
    assert n_splits(programs, tiles, 132) == splits


# -- mistakes ----------------------------------------------------------------------------------------------------------


class Wrong(Decode):
    """The backend with one mistake in how it calls the kernel."""

    name = "wrong"

    def __init__(self, change: Callable[..., tuple[AttentionSpec, AttentionContext, AttentionParams]]) -> None:
        super().__init__()
        self.change = change

    def __call__(self, q, k, v, /, *, spec, context, params, return_lse=False):
        spec, context, params = self.change(spec, dataclasses.replace(context, derived={}), params)
        return super().__call__(q, k, v, spec=spec, context=context, params=params, return_lse=return_lse)


def window_off_by_one(spec, context, params):
    if spec.window.left is not None:
        spec = dataclasses.replace(spec, window=dataclasses.replace(spec.window, left=spec.window.left + 1))
    return spec, context, params


def wrong_end_of_the_cache(spec, context, params):
    """The first keys that the window holds instead of the last."""
    if spec.window.left is not None and context.q_positions is None:
        context.q_positions = torch.tensor([[spec.window.left]])
    return spec, context, params


def lost_last_partial_page(spec, context, params):
    if context.page_table is not None and context.kv_lengths is not None:
        context.kv_lengths = context.kv_lengths // 4 * 4
    return spec, context, params


def no_scale_of_values(spec, context, params):
    if params.v_scale_BSG is not None:
        params = dataclasses.replace(params, v_scale_BSG=torch.ones_like(params.v_scale_BSG))
    return spec, context, params


def lengths_forgotten(spec, context, params):
    context.kv_lengths = None
    return spec, context, params


def pages_in_order(spec, context, params):
    if context.page_table is not None:
        context.page_table = context.page_table.sort(dim=1).values
    return spec, context, params


MISTAKES = [
    (window_off_by_one, {F.CAUSAL, F.WINDOW}),
    (wrong_end_of_the_cache, {F.CAUSAL, F.WINDOW}),
    (lost_last_partial_page, {F.PAGED, F.KV_LENGTHS}),
    (no_scale_of_values, {F.QUANTIZED_KV}),
    (lengths_forgotten, {F.KV_LENGTHS}),
    (pages_in_order, {F.CAUSAL, F.WINDOW, F.PAGED}),
]


@pytest.mark.parametrize(("mistake", "features"), MISTAKES, ids=lambda x: getattr(x, "__name__", ""))
def test_the_suite_catches(mistake: Callable[..., tuple], features: set[Feature]) -> None:
    backend = Wrong(mistake)
    cases = {"dtypes": [torch.float32], "max_length": 20, "examples": 0, "thorough": False}
    report = conformance(backend, features=features, **cases)
    assert not report.ok
    assert "forward" in report.failures
    assert not report.claims
