"""How a backend's numbers are judged: against fp64, within twice the error of a plain low-precision softmax.

The measure of FlashAttention's own tests. A fixed tolerance is either too loose to catch a wrong mask row or too tight
for bf16; the error of a plain implementation in the same dtype says what that dtype can do on these very inputs.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H // G, D head dim, E value dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.backend import AttentionOutput, AttentionParams
from ..attention.context import AttentionContext
from ..attention.reference import dropout_keep, gather_pages, key_distance
from ..attention.spec import AttentionSpec

# -- the low-precision twin --------------------------------------------------------------------------------------------


def twin(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    *,
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams,
) -> AttentionOutput:
    """Attention as anybody writes it, every intermediate in the inputs' dtype; lse in fp32, of the rounded scores.

    Dropout is replayed from `params.dropout_seed`, which it needs; differentiable.
    """
    parts = _dense(q_BTHD, k_BSGD, v_BSGE, spec, context, params)
    out_BTHE = torch.einsum("bhts,bshe->bthe", parts.weights * parts.kept, parts.v)
    return AttentionOutput(out_BTHE, parts.lse)


@dataclass(slots=True, kw_only=True)
class _Parts:
    k: Tensor  # [B, S, H, D], one head for each query head
    v: Tensor  # [B, S, H, E]
    scores: Tensor  # [B, H, T, S], 0 where nothing is seen
    weights: Tensor  # [B, H, T, S], before dropout
    kept: Tensor  # broadcastable to [B, H, T, S]: 0 where dropout drops, 1 / (1 - p) elsewhere
    lse: Tensor  # [B, H, T]


def _dense(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams,
) -> _Parts:
    B, T, H, D = q_BTHD.shape
    dtype, device = q_BTHD.dtype, q_BTHD.device
    if context.page_table is not None:
        k_BSGD, v_BSGE = (gather_pages(pool, context) for pool in (k_BSGD, v_BSGE))
    S, G = k_BSGD.shape[1:3]
    k_BSGD, v_BSGE = context.without_empty_slots(k_BSGD, v_BSGE)
    k_BSHD, v_BSHE = (rows.repeat_interleave(H // G, dim=2) for rows in (k_BSGD, v_BSGE))
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD) * spec.softmax_scale(D)
    if spec.softcap is not None:
        scores_BHTS = spec.softcap * torch.tanh(scores_BHTS / spec.softcap)
    if spec.alibi and params.alibi_slopes is not None:
        distance_B1TS = key_distance(context, T, S, device).to(dtype)[:, None]
        scores_BHTS = scores_BHTS - params.alibi_slopes.to(dtype)[:, None, None] * distance_B1TS
    allowed_BTS = context.allowed(spec, slice(0, T), slice(0, S), lengths=(T, S), device=device)
    hidden_B1TS = ~allowed_BTS[:, None]
    scores_BHTS = scores_BHTS.masked_fill(hidden_B1TS, torch.finfo(dtype).min)
    with_sink_BHTZ = scores_BHTS
    if spec.learned_sink and params.sink_logits is not None:
        sink_BHT1 = params.sink_logits.to(dtype)[:, None, None].expand(B, H, T, 1)
        with_sink_BHTZ = torch.cat([scores_BHTS, sink_BHT1], dim=-1)
    weights_BHTS = torch.softmax(with_sink_BHTZ, dim=-1)[..., :S].masked_fill(hidden_B1TS, 0)
    empty_B1T = hidden_B1TS.all(dim=-1)
    wide = dtype if dtype == torch.float64 else torch.float32
    lse_BHT = torch.logsumexp(with_sink_BHTZ.to(wide), dim=-1).masked_fill(empty_B1T, -torch.inf)
    kept_BHTS = torch.ones((), dtype=dtype, device=device)
    if spec.dropout > 0:
        kept_BHTS = dropout_keep(params.dropout_seed, spec.dropout, (B, H, T, S), device).to(dtype) / (1 - spec.dropout)
    return _Parts(
        k=k_BSHD,
        v=v_BSHE,
        scores=scores_BHTS.masked_fill(hidden_B1TS, 0),
        weights=weights_BHTS,
        kept=kept_BHTS,
        lse=lse_BHT,
    )


def plain_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    *,
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams,
) -> Tensor:
    """[B, T, H, E] of `twin`, without its lse."""
    return twin(q_BTHD, k_BSGD, v_BSGE, spec=spec, context=context, params=params).out


# -- how large the terms are that add up -------------------------------------------------------------------------------


def magnitudes(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    grad_out_BTHE: Tensor,
    grad_lse_BHT: Tensor,
    *,
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams,
) -> dict[str, float]:
    """For each result, the largest sum of the absolute values of the terms it is made of; "score": of one score.

    What cancels (a gradient that should be 0) leaves the rounding of its terms behind, so this and not the result is
    what rounding is relative to. Takes fp64.
    """
    D, G = q_BTHD.shape[3], k_BSGD.shape[2]
    parts = _dense(q_BTHD, k_BSGD, v_BSGE, spec, context, params)
    k, v, p = parts.k.abs(), parts.v.abs(), parts.weights
    q, do = q_BTHD.abs(), grad_out_BTHE.abs()
    dp = torch.einsum("bthe,bshe->bhts", do, v) * parts.kept
    total = (p * dp).sum(dim=-1, keepdim=True) + grad_lse_BHT.abs()[..., None]
    ds = p * (dp + total)
    T, S = p.shape[2:]

    def over_group(x_BSHD: Tensor) -> Tensor:
        return x_BSHD.unflatten(2, (G, -1)).sum(dim=3)

    scale = spec.softmax_scale(D)
    terms = {
        "out": torch.einsum("bhts,bshe->bthe", p * parts.kept, v),
        "lse": parts.scores.abs(),
        "dq": scale * torch.einsum("bhts,bshd->bthd", ds, k),
        "dk": scale * over_group(torch.einsum("bhts,bthd->bshd", ds, q)),
        "dv": over_group(torch.einsum("bhts,bthe->bshe", p * parts.kept, do)),
        "score": scale * torch.einsum("bthd,bshd->bhts", q, k),
    }
    # Sums over every pair: each row's errors go one way, those of different rows do not.
    if spec.alibi:
        distance_B1TS = key_distance(context, T, S, q.device).to(ds.dtype)[:, None]
        terms["dslopes"] = (ds * distance_B1TS).sum(dim=-1).square().sum(dim=(0, 2)).sqrt()
    if spec.learned_sink:
        terms["dsinks"] = total[..., 0].square().sum(dim=(0, 2)).sqrt()
    return {name: float(x.max()) if x.numel() else 0.0 for name, x in terms.items()}


# -- the verdict -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """ratio: error over budget. problem: what is wrong, in words; empty when nothing is."""

    ratio: float
    problem: str = ""


def judge(
    ours: Tensor,
    exact: Tensor,
    twin: Tensor,
    *,
    magnitude: float = 1.0,
    score: float = 0.0,
    rounded: torch.dtype | None = None,
) -> Verdict:
    """Is `ours` finite, and its error within twice the twin's plus two roundings of `magnitude`?

    `exact` is fp64; `ours` and `twin` have the dtype under test. `magnitude` is the size of the terms that add up
    (at least that of the results, and 1); `score` that of a score's, whose rounding in the accumulator (fp32; fp64 for
    fp64) moves every weight by as much. `rounded` is the dtype that the terms were rounded to, where it is coarser than
    that of `ours`.
    """
    ours, exact, twin = ours.detach(), exact.detach(), twin.detach()
    if not ours.numel():
        return Verdict(0.0)
    finite = torch.isfinite(ours)
    if not bool(finite.all()):
        return Verdict(math.inf, f"{int((~finite).sum())} values are not finite, the first at {_place(~finite)}")
    error, of_twin = ((x.double() - exact).abs() for x in (ours, twin))
    eps = torch.finfo(rounded or ours.dtype).eps
    accumulator = torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32).eps
    size = max(float(exact.abs().max()), magnitude, 1.0)
    budget = 2 * float(of_twin.max()) + 2 * (eps + accumulator * score) * size
    worst = float(error.max())
    if not math.isfinite(budget):
        return Verdict(math.inf, f"no budget: a plain {ours.dtype} softmax is not finite here either")
    if worst <= budget:
        return Verdict(worst / budget)
    at = error == error.max()
    return Verdict(
        worst / budget,
        f"error {worst:.3g} at {_place(at)}: {float(ours[at][0]):.6g} instead of {float(exact[at][0]):.6g}; "
        f"a plain {ours.dtype} softmax errs by {float(of_twin.max()):.3g}, so the budget is {budget:.3g}",
    )


def assert_within_budget(ours: Tensor, exact: Tensor, twin: Tensor) -> None:
    """`ours` is finite and its error at most twice the twin's plus two roundings of the largest exact value.

    `exact` is fp64; ours and twin have the dtype under test. Raises AssertionError with both errors and the place.
    """
    verdict = judge(ours, exact, twin)
    if verdict.problem:
        raise AssertionError(verdict.problem)


def _place(where: Tensor) -> list[int]:
    return where.nonzero()[0].tolist()
