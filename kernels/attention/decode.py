"""The `decode` backend: few queries over many keys, read as a cache keeps them: contiguous, in pages, in eight bits.

On CUDA a split-KV kernel (`triton/decode.py`, imported by the first call); on CPU the same in plain PyTorch. Neither
repeats keys and values for the query heads that share them, nor copies a cache to make it contiguous.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, R = H // G, D head dim, E value dim.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .backend import AttentionCall, AttentionOutput, AttentionParams, Capabilities, Feature, Phase, Reason, check, short
from .caching import AS_STORED
from .context import AttentionContext
from .flash import OLDEST, interpreted, oldest_capability
from .quantize import dequantize
from .reference import gather_pages, key_distance
from .spec import AttentionSpec

FLOAT8 = (8, 9)  # the compute capability that converts it
INTERPRETED_DTYPES = (torch.float32, torch.float16)  # bfloat16 it multiplies wrongly


class Decode:
    """Attention of few queries a row, as many as a cache hands its storage over for. Forward only; deterministic.

    CUDA (compute capability 8.0 and newer), and CPU under TRITON_INTERPRET=1: the Triton kernel. It reads a key and its
    value once for all query heads that share them, skips what causality, windows and lengths hide, and never waits for
    the device, so that it can be captured in a CUDA graph: lengths, positions and pages may change between replays.
    Documents, global tokens, dilation and block layouts come as a mask of one byte a key, derived once per context.
    On CUDA a page table is not looked at: an entry outside the pool reads what lies there.
    """

    name = "decode"
    capabilities = Capabilities(
        features=frozenset(Feature) - {Feature.DROPOUT, Feature.BACKWARD},
        phases=frozenset({Phase.PREFILL, Phase.DECODE}),
        dtypes={
            "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
            "cuda": (torch.bfloat16, torch.float16, torch.float32),
        },
        max_head_dim=256,
        max_queries=AS_STORED,
        notes={Feature.DROPOUT: "for generation only", Feature.BACKWARD: "for generation only"},
    )

    def __init__(self) -> None:
        # Looked up here, because `unsupported` may be traced by torch.compile, which cannot look.
        self._installed = importlib.util.find_spec("triton") is not None
        self._interpreted = self._installed and interpreted()

    def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        reasons = check(self.capabilities, spec, call)
        if self._interpreted and call.dtype not in INTERPRETED_DTYPES:
            reasons += (Reason(f"dtype={short(call.dtype)}", "Triton's interpreter has float32, float16"),)
        if call.device != "cuda":
            return reasons
        found = oldest_capability()
        if not self._installed:
            reasons += (Reason("import", "triton is not installed"),)
        elif found is not None and found < OLDEST:
            reasons += (Reason(f"device=cuda of capability {found[0]}.{found[1]}", "8.0 or newer"),)
        elif found is not None and found < FLOAT8 and call.kv_dtype == torch.float8_e4m3fn:
            need = f"quantized_kv=float8_e4m3fn on capability {found[0]}.{found[1]}"
            reasons += (Reason(need, "8.9 or newer; int8 on any"),)
        return reasons

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
        if not (q_BTHD.is_cuda or self._interpreted):
            out_BTHE, lse_BHT = plain(q_BTHD, k_BSGD, v_BSGE, spec, context, params)
            return AttentionOutput(out_BTHE, lse_BHT if return_lse else None)
        from .triton.decode_launch import decode_attention

        n_queries, n_keys = q_BTHD.shape[1], _n_keys(k_BSGD, context)
        q_pos = context.q_positions
        if q_pos is None and context.kv_positions is not None:
            q_pos = context.query_positions(n_queries, n_keys)
        mask = dense_mask(context, spec, n_queries, n_keys, q_BTHD.device) if needs_mask(spec, context) else None
        out_BTHE, lse_BHT = decode_attention(
            q_BTHD,
            k_BSGD,
            v_BSGE,
            params.k_scale_BSG,
            params.v_scale_BSG,
            params.alibi_slopes if spec.alibi else None,
            params.sink_logits if spec.learned_sink else None,
            q_pos,
            context.kv_positions,
            context.kv_lengths,
            context.page_table,
            mask,
            spec,
        )
        return AttentionOutput(out_BTHE, lse_BHT if return_lse else None)

    def prepare(
        self, context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
    ) -> None:
        if needs_mask(spec, context):
            dense_mask(context, spec, n_queries, n_keys, device)


def _n_keys(k_BSGD: Tensor, context: AttentionContext) -> int:
    return k_BSGD.shape[1] * (1 if context.page_table is None else context.page_table.shape[1])


# -- the mask ----------------------------------------------------------------------------------------------------------


def needs_mask(spec: AttentionSpec, context: AttentionContext) -> bool:
    """Is there more to see to than causality, an adjacent window, sink tokens, lengths and positions?"""
    has_globals = spec.global_tokens and context.is_global is not None
    return spec.documents or has_globals or spec.window.dilation > 1 or spec.block_sparse is not None


def dense_mask(
    context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
) -> Tensor:
    """[B or 1, T, S] bool: `AttentionContext.allowed`, derived once per context and shared by the layers."""
    key = ("decode", spec, n_queries, n_keys)
    found = context.derived.get(key)
    if found is None:
        found = context.derived[key] = context.allowed(
            spec, slice(0, n_queries), slice(0, n_keys), lengths=(n_queries, n_keys), device=device
        )
    return found  # pyright: ignore[reportReturnType]  # `derived` is untyped: each backend knows its own keys


# -- without a kernel --------------------------------------------------------------------------------------------------


def plain(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, E], lse [B, H, T]), computed in fp32 (fp64 for fp64); the heads of a group are one matrix."""
    B, T, H, D = q_BTHD.shape
    G, E, S = k_BSGD.shape[2], v_BSGE.shape[3], _n_keys(k_BSGD, context)
    wide = torch.float64 if q_BTHD.dtype == torch.float64 else torch.float32
    rows = (G, H // G, T)  # M = R·T rows of a group, in this order
    k_BSGD = _values(k_BSGD, params.k_scale_BSG, context, wide)
    v_BSGE = _values(v_BSGE, params.v_scale_BSG, context, wide)
    exists_BS = context.existing_keys(S)
    if exists_BS is not None:  # what lies in an empty slot may be NaN, which a weight of 0 does not keep out
        v_BSGE = v_BSGE.masked_fill(~exists_BS[:, :, None, None], 0)
    allowed_BTS = dense_mask(context, spec, T, S, q_BTHD.device)

    q_BGMD = q_BTHD.to(wide).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4).reshape(B, G, -1, D)
    # Autocast would take the products back to half precision.
    with torch.autocast(q_BTHD.device.type, enabled=False):
        scores = (q_BGMD @ k_BSGD.permute(0, 2, 3, 1)).view(B, *rows, S) * spec.softmax_scale(D)
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if spec.alibi and params.alibi_slopes is not None:
            distance_BTS = key_distance(context, T, S, q_BTHD.device).to(wide)
            scores = scores - params.alibi_slopes.to(wide).view(*rows[:2], 1, 1) * distance_BTS[:, None, None]
        scores = scores.masked_fill(~allowed_BTS[:, None, None], -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        if spec.learned_sink and params.sink_logits is not None:
            sinks = params.sink_logits.to(wide).view(*rows[:2], 1)
            lse = torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, sinks))
        weights = torch.exp(scores - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
        out_BGME = weights.view(B, G, -1, S) @ v_BSGE.transpose(1, 2)
    out_BTHE = out_BGME.view(B, *rows, E).permute(0, 3, 1, 2, 4).reshape(B, T, H, E)
    return out_BTHE.to(q_BTHD.dtype), lse.reshape(B, H, T)


def _values(stored: Tensor, scale: Tensor | None, context: AttentionContext, dtype: torch.dtype) -> Tensor:
    """[B, S, G, D] in `dtype`, out of pages where there are any."""
    if context.page_table is not None:
        stored = gather_pages(stored, context)
        scale = None if scale is None else gather_pages(scale, context)
    return stored.to(dtype) if scale is None else dequantize(stored, scale, dtype)
