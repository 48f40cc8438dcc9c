"""torch's scaled_dot_product_attention: its fused kernels where they mean the same, a dense mask elsewhere.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

from contextlib import nullcontext
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .backend import AttentionCall, AttentionOutput, AttentionParams, Capabilities, Feature, Reason, check
from .context import AttentionContext
from .reference import key_distance
from .spec import AttentionSpec

MASK_LIMIT = 2**26  # pairs (query, key) of a dense mask: 8192 × 8192. Above it the mask alone is gigabytes

# Who may compute a masked call on CUDA. Not cuDNN: left to choose, torch 2.11 on an H100 erred by 3.8 where a plain
# bf16 softmax errs by 0.014 (grouped heads, window and global tokens, a batch row with a third of its keys missing).
_WITH_MASK = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Mask(Enum):
    NONE = "none"
    CAUSAL = "causal"  # torch's is_causal, which is top-left aligned: ours only when T == S
    DENSE = "dense"


class SDPA:
    """Causal and full attention without a mask; everything else by a dense one, up to MASK_LIMIT."""

    name = "sdpa"
    capabilities = Capabilities(
        features=frozenset(
            {
                Feature.CAUSAL,
                Feature.WINDOW,
                Feature.DILATION,
                Feature.GLOBAL_TOKENS,
                Feature.DOCUMENTS,
                Feature.ALIBI,
                Feature.SINK_TOKENS,
                Feature.BLOCK_SPARSE,
                Feature.GQA,
                Feature.CROSS_LENGTH,
                Feature.VALUE_DIM,
                Feature.POSITIONS,
                Feature.KV_LENGTHS,
                Feature.BACKWARD,
            }
        ),
        dtypes={
            "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
            "cuda": (torch.bfloat16, torch.float16, torch.float32),
        },
        notes={
            Feature.LSE: "returns none",
            Feature.DROPOUT: "its random numbers cannot be replayed",
            Feature.PAGED: "needs contiguous keys",
            Feature.QUANTIZED_KV: "needs the inputs' dtype",
            Feature.SOFTCAP: "no hook between scores and softmax",
            Feature.LEARNED_SINK: "needs the lse, which it does not return",
            Feature.ALIBI: "float32 and float64",
        },
    )

    def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        reasons = check(self.capabilities, spec, call)
        if spec.alibi and call.dtype in (torch.bfloat16, torch.float16):
            reasons += (Reason("alibi", "its bias would be rounded to half precision; float32 only"),)
        if call.n_queries is None or call.n_keys is None:
            return reasons
        indexed = call.positions or call.kv_lengths
        pairs = call.n_queries * call.n_keys * (call.n_heads if spec.alibi else 1)
        if pairs > MASK_LIMIT and mask_kind(spec, call.n_queries, call.n_keys, indexed=indexed) is Mask.DENSE:
            size = f"{call.n_queries}×{call.n_keys}" + (f"×{call.n_heads} heads" if spec.alibi else "")
            reasons += (Reason(f"a dense mask of {size}", f"at most {MASK_LIMIT} pairs"),)
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
        T, H, D = q_BTHD.shape[1:]
        S, G = k_BSGD.shape[1:3]
        kind = mask_kind(spec, T, S, indexed=_indexed(context))
        mask = empty_B1T1 = None
        if kind is Mask.DENSE:
            mask, empty_B1T1 = _dense_mask(context, spec, T, S, q_BTHD.device)
            if spec.alibi and params.alibi_slopes is not None:
                distance_B1TS = _distance(context, T, S, q_BTHD.device).to(q_BTHD.dtype)
                bias = -params.alibi_slopes.to(q_BTHD.dtype)[:, None, None] * distance_B1TS
                mask = bias.masked_fill(~mask, -torch.inf)
            k_BSGD, v_BSGE = context.without_empty_slots(k_BSGD, v_BSGE)
        with sdpa_kernel(_WITH_MASK) if mask is not None and mask.is_cuda else nullcontext():
            out_BHTE = F.scaled_dot_product_attention(
                q_BTHD.transpose(1, 2),
                k_BSGD.transpose(1, 2),
                v_BSGE.transpose(1, 2),
                attn_mask=mask,
                is_causal=kind is Mask.CAUSAL,
                scale=spec.softmax_scale(D),
                enable_gqa=H != G,
            )
        if empty_B1T1 is not None:
            out_BHTE = out_BHTE.masked_fill(empty_B1T1, 0)
        return AttentionOutput(out_BHTE.transpose(1, 2))

    def prepare(
        self, context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
    ) -> None:
        if mask_kind(spec, n_queries, n_keys, indexed=_indexed(context)) is Mask.DENSE:
            _dense_mask(context, spec, n_queries, n_keys, device)
            if spec.alibi:
                _distance(context, n_queries, n_keys, device)


def mask_kind(spec: AttentionSpec, n_queries: int, n_keys: int, *, indexed: bool) -> Mask:
    """Which mask torch needs to mean what `spec` means; `indexed`: the context has positions or kv_lengths.

    A window that reaches every key needs none, and sinks and global tokens add nothing to what is visible anyway.
    """
    left, right = spec.window.span
    narrows = (
        (left is not None and left < n_keys - 1)
        or (right is not None and not spec.causal and right < n_queries - 1)
        or spec.window.dilation > 1
        or spec.block_sparse is not None
    )
    if indexed or narrows or spec.documents or spec.alibi:
        return Mask.DENSE
    if not spec.causal or (n_queries == 1 and n_keys > 0):  # one query stands at the last key
        return Mask.NONE
    return Mask.CAUSAL if n_queries == n_keys else Mask.DENSE


def _indexed(context: AttentionContext) -> bool:
    return context.q_positions is not None or context.kv_positions is not None or context.kv_lengths is not None


def _dense_mask(
    context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """(mask [B or 1, 1, T, S], rows to blank [B or 1, 1, T, 1] or None), derived once per context, spec and lengths.

    torch's kernels disagree about a row without keys (zeros, NaN, the mean of v; NaN gradients), so such a row is let
    see every key and blanked afterwards, which also stops its gradient.
    """
    key = ("sdpa", spec, n_queries, n_keys)
    found = context.derived.get(key)
    if found is None:
        allowed_BTS = context.allowed(
            spec, slice(0, n_queries), slice(0, n_keys), lengths=(n_queries, n_keys), device=device
        )
        mask_B1TS = allowed_BTS[:, None]
        if _rows_see_themselves(context, spec, n_queries, n_keys):
            found = (mask_B1TS, None)
        else:
            empty_B1T1 = ~mask_B1TS.any(dim=-1, keepdim=True)
            found = (mask_B1TS | empty_B1T1, empty_B1T1)
        context.derived[key] = found
    return found  # pyright: ignore[reportReturnType]  # `derived` is untyped: each backend knows its own keys


def _rows_see_themselves(context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int) -> bool:
    """Every query has a key of its own that nothing can hide, so no row is empty."""
    one_set_of_ids = not spec.documents or context.q_documents is None or context.kv_documents is None
    return n_queries <= n_keys and not _indexed(context) and spec.block_sparse is None and one_set_of_ids


def _distance(context: AttentionContext, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """[B or 1, 1, T, S] distances for ALiBi."""
    key = ("sdpa distance", n_queries, n_keys)
    found = context.derived.get(key)
    if found is None:
        found = context.derived[key] = key_distance(context, n_queries, n_keys, device)[:, None]
    return found  # pyright: ignore[reportReturnType]  # as above
