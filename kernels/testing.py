"""How a backend's numbers are judged: against fp64, within twice the error of a plain low-precision softmax.

The measure of FlashAttention's own tests. A fixed tolerance is either too loose to catch a wrong mask row or too tight
for bf16; the error of a plain implementation in the same dtype says what that dtype can do on these very inputs.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention.backend import AttentionParams
from .attention.context import AttentionContext
from .attention.spec import AttentionSpec


def plain_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    *,
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams,
) -> Tensor:
    """[B, T, H, E] attention as anybody writes it, every intermediate in the inputs' dtype: the low-precision twin.

    Knows no dropout and no pages.
    """
    T, H, D = q_BTHD.shape[1:]
    S, G = k_BSGD.shape[1:3]
    k_BSGD, v_BSGE = context.without_empty_slots(k_BSGD, v_BSGE)
    k_BSHD, v_BSHE = (rows.repeat_interleave(H // G, dim=2) for rows in (k_BSGD, v_BSGE))
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD) * spec.softmax_scale(D)
    if spec.softcap is not None:
        scores_BHTS = spec.softcap * torch.tanh(scores_BHTS / spec.softcap)
    if spec.alibi and params.alibi_slopes is not None:
        q_pos, kv_pos = context.query_positions(T, S, q_BTHD.device), context.key_positions(S, q_BTHD.device)
        distance_BTS = (q_pos[:, :, None] - kv_pos[:, None, :]).abs().to(q_BTHD.dtype)
        scores_BHTS = scores_BHTS - params.alibi_slopes.to(q_BTHD.dtype)[:, None, None] * distance_BTS[:, None]
    allowed_BTS = context.allowed(spec, slice(0, T), slice(0, S), lengths=(T, S), device=q_BTHD.device)
    hidden_B1TS = ~allowed_BTS[:, None]
    scores_BHTS = scores_BHTS.masked_fill(hidden_B1TS, torch.finfo(q_BTHD.dtype).min)
    if spec.learned_sink and params.sink_logits is not None:
        sink_BHT1 = params.sink_logits.to(q_BTHD.dtype)[:, None, None].expand(*scores_BHTS.shape[:3], 1)
        scores_BHTS = torch.cat([scores_BHTS, sink_BHT1], dim=-1)
    weights_BHTS = torch.softmax(scores_BHTS, dim=-1)[..., :S].masked_fill(hidden_B1TS, 0)
    return torch.einsum("bhts,bshe->bthe", weights_BHTS, v_BSHE)


def assert_within_budget(ours: Tensor, exact: Tensor, twin: Tensor) -> None:
    """`ours` is finite and its error at most twice the twin's plus two roundings of the largest exact value.

    `exact` is fp64; ours and twin have the dtype under test. Raises AssertionError with both errors and the place.
    """
    ours, exact, twin = ours.detach(), exact.detach(), twin.detach()
    finite = torch.isfinite(ours)
    if not bool(finite.all()):
        raise AssertionError(f"{int((~finite).sum())} values are not finite, the first at {_place(~finite)}")
    error, of_twin = ((x.double() - exact).abs() for x in (ours, twin))
    rounding = torch.finfo(ours.dtype).eps * max(float(exact.abs().max()), 1.0)
    budget = 2 * float(of_twin.max()) + 2 * rounding
    if float(error.max()) > budget:
        worst = error == error.max()
        raise AssertionError(
            f"error {float(error.max()):.3g} at {_place(worst)}: {float(ours[worst][0]):.6g} instead of "
            f"{float(exact[worst][0]):.6g}; a plain {ours.dtype} softmax errs by {float(of_twin.max()):.3g}, "
            f"so the budget is {budget:.3g}"
        )


def _place(where: Tensor) -> list[int]:
    return where.nonzero()[0].tolist()
