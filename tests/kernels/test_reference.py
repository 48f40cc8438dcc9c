"""The reference against an oracle written in loops, its gradients, its dropout and its pages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import (
    AttentionContext,
    AttentionOutput,
    AttentionParams,
    AttentionSpec,
    BlockLayout,
    Window,
    attend,
)
from longspan.kernels.attention.reference import dropout_keep, philox_uniform

B, T, S, H, G, D, E = 2, 5, 7, 4, 2, 3, 6


def inputs(dtype: torch.dtype = torch.float64, *, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)

    return draw(B, T, H, D), draw(B, S, G, D), draw(B, S, G, E)


def params(*, grad: bool = False) -> AttentionParams:
    return AttentionParams(
        alibi_slopes=torch.tensor([0.5, 0.25, 0.7, 0.1], dtype=torch.float64, requires_grad=grad),
        sink_logits=torch.tensor([0.3, -2.0, 1.5, 0.0], dtype=torch.float64, requires_grad=grad),
    )


LAYOUT = BlockLayout.from_rows([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]], q_block=2, kv_block=2)
SPECS = {
    "full": AttentionSpec(causal=False),
    "causal": AttentionSpec(causal=True),
    "scale": AttentionSpec(causal=True, scale=1.7),
    "window": AttentionSpec(causal=True, window=Window(left=2)),
    "dilated": AttentionSpec(causal=False, window=Window(1, 2, 2)),
    "softcap": AttentionSpec(causal=True, softcap=0.8),
    "alibi": AttentionSpec(causal=False, alibi=True),
    "softcap before alibi": AttentionSpec(causal=True, alibi=True, softcap=0.8),
    "learned sink": AttentionSpec(causal=True, learned_sink=True),
    "documents": AttentionSpec(causal=True, documents=True, sink_tokens=1, window=Window(left=0)),
    "globals": AttentionSpec(causal=False, global_tokens=True, window=Window.symmetric(1)),
    "layout": AttentionSpec(causal=False, block_sparse=LAYOUT),
}


def context(spec: AttentionSpec) -> AttentionContext:
    ids = torch.tensor([[3, 3, 1, 1, 1, 9, 9], [0, 1, 0, 1, 0, 1, 0]])
    return AttentionContext(
        q_documents=ids[:, -T:] if spec.documents else None,
        kv_documents=ids if spec.documents else None,
        is_global=torch.arange(S).expand(B, S) == 3 if spec.global_tokens else None,
        kv_lengths=torch.tensor([7, 4]),
    )


def by_loops(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, params: AttentionParams) -> AttentionOutput:
    """Equation by equation in Python floats; only the mask is taken from `allowed` (it has an oracle of its own)."""
    allowed = context(spec).allowed(spec, slice(0, T), slice(0, S), lengths=(T, S)).expand(B, T, S)
    out, lse = torch.zeros(B, T, H, E, dtype=torch.float64), torch.full((B, H, T), -torch.inf, dtype=torch.float64)
    scale = 1 / math.sqrt(D) if spec.scale is None else spec.scale
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h // (H // G)
                terms: list[tuple[float, int | None]] = []
                for s in range(S):
                    if allowed[b, t, s]:
                        score = scale * float(q[b, t, h] @ k[b, s, g])
                        if spec.softcap is not None:
                            score = spec.softcap * math.tanh(score / spec.softcap)
                        if spec.alibi and params.alibi_slopes is not None:
                            score -= float(params.alibi_slopes[h]) * abs(S - T + t - s)
                        terms.append((score, s))
                if not terms:
                    continue
                if spec.learned_sink and params.sink_logits is not None:
                    terms.append((float(params.sink_logits[h]), None))
                total = sum(math.exp(score) for score, _ in terms)
                lse[b, h, t] = math.log(total)
                for score, s in terms:
                    if s is not None:
                        out[b, t, h] += math.exp(score) / total * v[b, s, g]
    return AttentionOutput(out, lse)


@pytest.mark.parametrize("name", SPECS)
def test_equals_the_loops(name: str) -> None:
    spec, (q, k, v) = SPECS[name], inputs()
    ours = attend(q, k, v, spec=spec, context=context(spec), params=params(), backend="reference", return_lse=True)
    theirs = by_loops(q, k, v, spec, params())
    assert ours.lse is not None
    assert theirs.lse is not None
    torch.testing.assert_close(ours.out, theirs.out, rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.lse, theirs.lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SPECS)
def test_gradients(name: str) -> None:
    spec, (q, k, v), learned = SPECS[name], inputs(grad=True), params(grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        params = AttentionParams(alibi_slopes=slopes, sink_logits=sinks)
        result = attend(q, k, v, spec=spec, context=context(spec), params=params, backend="reference", return_lse=True)
        assert result.lse is not None
        return result.out, torch.where(result.lse == -torch.inf, 0.0, result.lse)

    assert torch.autograd.gradcheck(
        run, (q, k, v, learned.alibi_slopes, learned.sink_logits), atol=1e-7, fast_mode=True
    )


@pytest.mark.parametrize("learned_sink", [False, True])
def test_rows_without_keys_are_zero_with_finite_gradients(learned_sink: bool) -> None:
    spec = AttentionSpec(causal=True, learned_sink=learned_sink)
    q, k, v = (x.requires_grad_() for x in inputs(torch.float32))
    sinks = torch.zeros(H, requires_grad=True)
    nothing = AttentionContext(kv_lengths=torch.tensor([S, 0]))
    result = attend(q, k, v, spec=spec, context=nothing, params=AttentionParams(sink_logits=sinks), return_lse=True)
    assert result.lse is not None
    assert bool((result.out[1] == 0).all())
    assert bool((result.lse[1] == -torch.inf).all())
    assert bool(torch.isfinite(result.lse[0]).all())
    result.out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert bool(torch.isfinite(x.grad).all())
        assert bool((x.grad[1] == 0).all())


def test_half_inputs_are_computed_in_fp32_also_under_autocast() -> None:
    q, k, v = inputs(torch.bfloat16)
    spec = AttentionSpec(causal=True)
    exact = attend(q.double(), k.double(), v.double(), spec=spec, backend="reference", return_lse=True)
    plain = attend(q, k, v, spec=spec, backend="reference", return_lse=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attend(q.float(), k, v.float(), spec=spec, backend="reference", return_lse=True)
    for ours in (plain, cast):
        assert ours.out.dtype == torch.bfloat16
        assert ours.lse is not None
        assert ours.lse.dtype == torch.float32
        assert exact.lse is not None
        torch.testing.assert_close(ours.lse.double(), exact.lse, rtol=0, atol=2e-6)
        assert torch.equal(ours.out, exact.out.float().bfloat16())


def test_huge_scores_stay_finite() -> None:
    q, k, v = inputs(torch.float32)
    result = attend(q * 1e4, k * 1e3, v, spec=AttentionSpec(causal=True), backend="reference", return_lse=True)
    assert bool(torch.isfinite(result.out).all())
    assert result.lse is not None
    assert bool(torch.isfinite(result.lse).all())


# -- dropout -----------------------------------------------------------------------------------------------------------


def philox_in_python(seed: int, offset: int) -> float:
    """Philox-4x32-10 and Triton's conversion to [0, 1), from their definitions in whole numbers."""
    counter = [offset & 0xFFFFFFFF, offset >> 32, 0, 0]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        low, high = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (high >> 32) ^ counter[1] ^ key[0],
            high & 0xFFFFFFFF,
            (low >> 32) ^ counter[3] ^ key[1],
            low & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    signed = counter[0] - 2**32 if counter[0] >= 2**31 else counter[0]
    return (-signed - 1 if signed < 0 else signed) * 4.6566127342e-10


def test_philox_known_answer() -> None:
    # Random123's kat_vectors: philox4x32 10, zero counter and key -> 6627e8d5 …
    assert philox_in_python(0, 0) == pytest.approx(0x6627E8D5 * 4.6566127342e-10, abs=1e-15)


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 7, 2**40 + 12345, 2**62 - 1])
def test_philox_equals_its_definition(seed: int) -> None:
    offsets = [0, 1, 2, 77, 2**31 - 1, 2**32 - 1, 2**32, 2**40 + 3]
    ours = philox_uniform(torch.tensor(seed), torch.tensor(offsets))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), torch.tensor([philox_in_python(seed, n) for n in offsets]).double())


def test_dropout_offset_is_the_flat_index() -> None:
    seed, shape = torch.tensor(99), (2, 3, 4, 5)
    keep = dropout_keep(seed, 0.4, shape, torch.device("cpu"))
    for b, h, i, j in [(0, 0, 0, 0), (1, 2, 3, 4), (1, 0, 2, 1), (0, 2, 0, 3)]:
        assert bool(keep[b, h, i, j]) == (philox_in_python(99, ((b * 3 + h) * 4 + i) * 5 + j) >= 0.4)


def test_dropout_statistics() -> None:
    keep = dropout_keep(torch.tensor(5), 0.3, (4, 8, 64, 64), torch.device("cpu")).double()
    n = keep.numel()
    assert abs(keep.mean().item() - 0.7) < 4 * math.sqrt(0.21 / n)
    # rows, columns and neighbours are as independent as coins
    assert abs((keep[..., :-1] * keep[..., 1:]).mean().item() - 0.49) < 0.005
    assert abs((keep[:, :-1] * keep[:, 1:]).mean().item() - 0.49) < 0.005


def test_dropout_without_a_seed_is_drawn_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting costs a CPU ten times as much as drawing, and of a seed that nobody gave there is nothing to replay."""
    monkeypatch.setattr("longspan.kernels.attention.reference.philox_uniform", lambda *_: pytest.fail("counted"))
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(dropout_keep(None, 0.3, (4, 8, 64, 64), torch.device("cpu")))
    assert draws[0].dtype == torch.bool
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert abs(draws[0].double().mean() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / draws[0].numel())


def test_dropout_is_as_rare_as_it_says_whatever_the_default_type() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        keep = dropout_keep(None, 1e-3, (4, 8, 128, 128), torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    assert abs(keep.double().mean() - 0.999) < 5 * math.sqrt(1e-3 / keep.numel())


def test_dropout_is_replayed_by_its_seed_scaled_and_leaves_lse_alone() -> None:
    q, k, v = inputs()
    eye = torch.eye(S, dtype=torch.float64)[None, :, None].expand(B, S, G, S)  # v = identity: out is the weights
    spec, plain = AttentionSpec(causal=False, dropout=0.5), AttentionSpec(causal=False)
    seeded = AttentionParams(dropout_seed=torch.tensor(3))
    first = attend(q, k, eye, spec=spec, params=seeded, backend="reference", return_lse=True)
    again = attend(q, k, eye, spec=spec, params=seeded, backend="reference", return_lse=True)
    weights = attend(q, k, eye, spec=plain, backend="reference", return_lse=True)
    assert torch.equal(first.out, again.out)
    assert first.lse is not None
    assert weights.lse is not None
    assert torch.equal(first.lse, weights.lse)
    keep_BTHS = dropout_keep(torch.tensor(3), 0.5, (B, H, T, S), q.device).transpose(1, 2)
    assert torch.equal(first.out, torch.where(keep_BTHS, weights.out * 2, 0.0))
    torch.manual_seed(0)
    drawn = [attend(q, k, v, spec=spec, backend="reference").out for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(0)
    assert torch.equal(attend(q, k, v, spec=spec, backend="reference").out, drawn[0])


# -- pages -------------------------------------------------------------------------------------------------------------


def test_pages_in_any_order_equal_contiguous_keys() -> None:
    q, k, v = inputs()
    page, lengths = 2, torch.tensor([7, 4])
    table = torch.tensor([[5, 0, 3, 6], [1, 4, -1, 99]])  # the second sequence needs two pages; the rest is anything
    pools = []
    for rows in (k, v):
        pool = torch.full((7, page, G, rows.shape[3]), torch.nan, dtype=torch.float64)
        for b in range(B):
            for s in range(int(lengths[b])):
                pool[table[b, s // page], s % page] = rows[b, s]
        pools.append(pool)
    spec = AttentionSpec(causal=True, window=Window(left=3))
    positions = torch.arange(2, 7).expand(B, T)
    contiguous = AttentionContext(q_positions=positions, kv_lengths=lengths)
    paged = AttentionContext(q_positions=positions, kv_lengths=lengths, page_table=table)
    expected = attend(q, k, v, spec=spec, context=contiguous, backend="reference", return_lse=True)
    ours = attend(q, pools[0], pools[1], spec=spec, context=paged, backend="reference", return_lse=True)
    torch.testing.assert_close(ours.out, expected.out, rtol=0, atol=1e-14)
    assert ours.lse is not None
    torch.testing.assert_close(ours.lse, expected.lse, rtol=0, atol=1e-14)


def test_a_page_outside_the_pool_is_an_error() -> None:
    q, k, v = inputs()
    context = AttentionContext(page_table=torch.tensor([[0, 1], [1, 2]]))
    with pytest.raises(ValueError, match=r"page_table\[1, 1\]=2: the pool has pages 0 … 1"):
        attend(q, k, v, spec=AttentionSpec(causal=False), context=context, backend="reference")
