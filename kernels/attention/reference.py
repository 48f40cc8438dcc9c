"""The definition, computed plainly: every pair of query and key, in fp32 (fp64 for fp64 inputs), by autograd.

Slow and memory-hungry on purpose; what it returns is what every other backend is compared with.
Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H // G, D head dim, E value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import AttentionCall, AttentionOutput, AttentionParams, Capabilities, Feature, Reason, check
from .context import AttentionContext
from .quantize import dequantize
from .spec import AttentionSpec

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Reference:
    """Everything that a spec can say, on CPU and CUDA."""

    name = "reference"
    capabilities = Capabilities(features=frozenset(Feature), dtypes={"cpu": _DTYPES, "cuda": _DTYPES})

    def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        return check(self.capabilities, spec, call)

    def __call__(
        self,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGE: Tensor,
        /,
        *,
        spec: AttentionSpec,
        context: AttentionContext,
        params: AttentionParams,
        return_lse: bool = False,
    ) -> AttentionOutput:
        k_BSGD, v_BSGE = dequantized(q_BTHD, k_BSGD, v_BSGE, params)
        if context.page_table is not None:
            k_BSGD, v_BSGE = (gather_pages(pool, context) for pool in (k_BSGD, v_BSGE))
        k_BSGD, v_BSGE = context.without_empty_slots(k_BSGD, v_BSGE)
        # Autocast would take the matmuls below back to half precision.
        with torch.autocast(q_BTHD.device.type, enabled=False):
            out_BTHE, lse_BHT = _attention(q_BTHD, k_BSGD, v_BSGE, spec, context, params)
        return AttentionOutput(out_BTHE, lse_BHT if return_lse else None)


def _attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    B, T, H, D = q_BTHD.shape
    S, G, E = k_BSGD.shape[1], k_BSGD.shape[2], v_BSGE.shape[3]
    dtype = torch.float64 if q_BTHD.dtype == torch.float64 else torch.float32
    q_BTGRD = q_BTHD.to(dtype).reshape(B, T, G, H // G, D)

    scores_BGRTS = torch.einsum("btgrd,bsgd->bgrts", q_BTGRD, k_BSGD.to(dtype)) * spec.softmax_scale(D)
    if spec.softcap is not None:
        scores_BGRTS = spec.softcap * torch.tanh(scores_BGRTS / spec.softcap)
    if spec.alibi and params.alibi_slopes is not None:
        distance_BTS = key_distance(context, T, S, q_BTHD.device).to(dtype)
        slopes_GR11 = params.alibi_slopes.to(dtype).view(G, H // G, 1, 1)
        scores_BGRTS = scores_BGRTS - slopes_GR11 * distance_BTS[:, None, None]

    allowed_BTS = context.allowed(spec, slice(0, T), slice(0, S), lengths=(T, S), device=q_BTHD.device)
    scores_BGRTS = scores_BGRTS.masked_fill(~allowed_BTS[:, None, None], -torch.inf)
    sees_B11T1 = allowed_BTS.any(dim=-1)[:, None, None, :, None]

    # The maximum only guards the exponential, so no gradient flows through it; a row without keys takes 0 for it.
    top_BGRT1 = scores_BGRTS.detach().amax(dim=-1, keepdim=True)
    sink_GR11 = None
    if spec.learned_sink and params.sink_logits is not None:
        sink_GR11 = params.sink_logits.to(dtype).view(G, H // G, 1, 1)
        top_BGRT1 = torch.maximum(top_BGRT1, sink_GR11.detach())
    top_BGRT1 = torch.where(top_BGRT1 == -torch.inf, 0.0, top_BGRT1)
    weights_BGRTS = torch.exp(scores_BGRTS - top_BGRT1)
    total_BGRT1 = weights_BGRTS.sum(dim=-1, keepdim=True)
    if sink_GR11 is not None:
        total_BGRT1 = total_BGRT1 + torch.exp(sink_GR11 - top_BGRT1)
    total_BGRT1 = torch.where(sees_B11T1, total_BGRT1, 1.0)
    weights_BGRTS = weights_BGRTS / total_BGRT1

    if spec.dropout > 0:
        keep_BHTS = dropout_keep(params.dropout_seed, spec.dropout, (B, H, T, S), q_BTHD.device)
        weights_BGRTS = weights_BGRTS * keep_BHTS.view(B, G, H // G, T, S) / (1.0 - spec.dropout)
    out_BTGRE = torch.einsum("bgrts,bsge->btgre", weights_BGRTS, v_BSGE.to(dtype))
    lse_BGRT1 = torch.where(sees_B11T1, top_BGRT1 + torch.log(total_BGRT1), -torch.inf)
    return out_BTGRE.reshape(B, T, H, E).to(q_BTHD.dtype), lse_BGRT1.reshape(B, H, T)


def key_distance(context: AttentionContext, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """[B or 1, T, S] |query position - key position|, what ALiBi's slopes multiply."""
    q_pos = context.query_positions(n_queries, n_keys, device)
    return (q_pos[:, :, None] - context.key_positions(n_keys, device)[:, None, :]).abs()


# -- keys as they are stored -------------------------------------------------------------------------------------------


def dequantized(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, params: AttentionParams) -> tuple[Tensor, Tensor]:
    """k and v as numbers where they are stored in eight bits: in fp32 (fp64 for an fp64 q)."""
    if params.k_scale_BSG is None or params.v_scale_BSG is None:
        return k_BSGD, v_BSGE
    dtype = torch.float64 if q_BTHD.dtype == torch.float64 else torch.float32
    return dequantize(k_BSGD, params.k_scale_BSG, dtype), dequantize(v_BSGE, params.v_scale_BSG, dtype)


def gather_pages(pool: Tensor, context: AttentionContext) -> Tensor:
    """[n_pages, page, G, D] pool -> [B, pages * page, G, D], following `context.page_table`.

    Entries of pages that `kv_lengths` leaves empty may be anything. Raises ValueError for a page outside the pool.
    """
    table_BP = context.page_table
    if table_BP is None:
        raise ValueError("the context has no page_table")
    n_pages, page = pool.shape[:2]
    outside_BP = (table_BP < 0) | (table_BP >= n_pages)
    if context.kv_lengths is not None:
        first_key_P = torch.arange(table_BP.shape[1], device=table_BP.device) * page
        unused_BP = first_key_P[None, :] >= context.kv_lengths[:, None]
        table_BP = torch.where(unused_BP, 0, table_BP)
        outside_BP = outside_BP & ~unused_BP
    if not torch.compiler.is_compiling() and bool(outside_BP.any()):
        row, column = outside_BP.nonzero()[0].tolist()
        raise ValueError(
            f"page_table[{row}, {column}]={int(table_BP[row, column])}: the pool has pages 0 … {n_pages - 1}"
        )
    return pool[table_BP].flatten(1, 2)


# -- dropout that a kernel can replay ----------------------------------------------------------------------------------


def dropout_keep(seed: Tensor | None, p: float, shape_BHTS: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """[B, H, T, S] bool: which attention weights stay.

    The weight of (b, h, i, j) stays iff `tl.rand(seed, offset) >= p` with the 64-bit offset

        offset = ((b * H + h) * T + i) * S + j        (i, j: indices into this call, not positions)

    so that a Triton kernel can replay it from the seed alone. `seed` None: nobody can replay it, so torch's generator
    draws, which is much cheaper on a CPU.
    """
    B, H, T, S = shape_BHTS
    if seed is None:
        return torch.rand(shape_BHTS, dtype=torch.float32, device=device) >= p
    offset = torch.arange(B * H * T * S, device=device).view(B, H, T, S)
    return philox_uniform(seed.to(device), offset) >= p


def philox_uniform(seed: Tensor, offset: Tensor) -> Tensor:
    """float32 in [0, 1): the value of Triton's `tl.rand(seed, offset)` for int64 seed and offset.

    Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with counter
    (offset low, offset high, 0, 0) and key (seed low, seed high); int64 holds the uint32 words.
    """
    low = 0xFFFFFFFF
    c0, c1 = offset & low, (offset >> 32) & low
    c2 = c3 = torch.zeros_like(offset)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        # The 64-bit products wrap into the sign bit; shifting and masking reads the right words all the same.
        b, a = c2 * 0xCD9E8D57, c0 * 0xD2511F53
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    signed = c0 - ((c0 >> 31) << 32)
    return torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
