"""torch's FlexAttention: the definition compiled into one fused kernel that skips blocks nobody may see.

`AttentionContext.allowed` decides which blocks of 128 × 128 pairs are visited at all; inside a block that is only
partly visible the kernel evaluates `mask_mod`, composed here of the same integer predicates.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim; t, s blocks of T and S.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    and_masks,
    flex_attention,
    or_masks,
)

from .backend import AttentionCall, AttentionOutput, AttentionParams, Capabilities, Feature, Reason, check
from .context import AttentionContext, in_layout_pattern, in_window
from .spec import AttentionSpec

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (b, h, q_idx, kv_idx) -> bool
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # (score, b, h, q_idx, kv_idx) -> score
Row = Callable[[Tensor, Tensor], Tensor]  # (b, index) -> what stands there

BLOCK = 128  # FlexAttention's default sparsity block
_STRIP = 2**24  # pairs that are materialised at a time while blocks are classified


class Flex:
    """Everything but dropout, pages and keys in eight bits, in torch's compiled kernel (CUDA).

    On CPU it runs uncompiled and forward only: there to check masks, not for speed.
    """

    name = "flex"
    capabilities = Capabilities(
        features=frozenset(Feature) - {Feature.DROPOUT, Feature.PAGED, Feature.QUANTIZED_KV},
        dtypes={"cpu": (torch.float32, torch.float64), "cuda": (torch.bfloat16, torch.float16, torch.float32)},
        max_head_dim=256,
        notes={
            Feature.DROPOUT: "no hook after the softmax",
            Feature.PAGED: "needs contiguous keys",
            Feature.QUANTIZED_KV: "needs the inputs' dtype",
            Feature.BACKWARD: "on CUDA only",
        },
    )

    def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        reasons = check(self.capabilities, spec, call)
        if call.device == "cpu" and call.needs_grad:
            reasons += (Reason("backward on cpu", "torch's FlexAttention has one on CUDA only"),)
        smallest = min(call.head_dim, call.head_dim if call.value_dim is None else call.value_dim)
        if call.device == "cuda" and smallest < 16:
            reasons += (Reason(f"head_dim={smallest}", "at least 16 on cuda"),)
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
        S, G, E = k_BSGD.shape[1], k_BSGD.shape[2], v_BSGE.shape[3]
        k_BSGD, v_BSGE = context.without_empty_slots(k_BSGD, v_BSGE)
        if q_BTHD.device.type == "cpu":  # no backward is asked for there, and torch refuses leaves even under no_grad
            q_BTHD, k_BSGD, v_BSGE = q_BTHD.detach(), k_BSGD.detach(), v_BSGE.detach()
        with_lse = return_lse or spec.learned_sink
        needs_grad = torch.is_grad_enabled() and (q_BTHD.requires_grad or k_BSGD.requires_grad or v_BSGE.requires_grad)
        given = frozenset((name, tensor.shape) for name, tensor in context.tensors().items())
        kind = (spec, q_BTHD.shape, k_BSGD.shape, E, q_BTHD.dtype, with_lse, needs_grad, given)
        kernel = _kernel(kind, q_BTHD.device)
        result = kernel(
            q_BTHD.transpose(1, 2),
            k_BSGD.transpose(1, 2),
            v_BSGE.transpose(1, 2),
            score_mod=score_mod(spec, context, params, T, S, q_BTHD.device),
            block_mask=_block_mask(context, spec, T, S, q_BTHD.device),
            scale=spec.softmax_scale(D),
            enable_gqa=H != G,
            return_aux=AuxRequest(lse=True) if with_lse else None,
            kernel_options=_KERNEL,
        )
        if not with_lse:
            return AttentionOutput(result.transpose(1, 2))
        out_BHTE, lse_BHT = result[0], result[1].lse
        if spec.learned_sink and params.sink_logits is not None:
            # The kernel's softmax runs over keys; the sink enlarges the denominator exp(lse) by exp(sink).
            sink_H1 = params.sink_logits.to(lse_BHT.dtype)[:, None]
            out_BHTE = (out_BHTE * torch.sigmoid(lse_BHT - sink_H1)[..., None]).to(q_BTHD.dtype)
            lse_BHT = torch.where(lse_BHT == -torch.inf, -torch.inf, torch.logaddexp(lse_BHT, sink_H1))
        return AttentionOutput(out_BHTE.transpose(1, 2), lse_BHT if return_lse else None)

    def prepare(
        self, context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
    ) -> None:
        _block_mask(context, spec, n_queries, n_keys, device)


# -- the kernel --------------------------------------------------------------------------------------------------------

# Below 128 queries torch picks its split-KV kernel by itself, for which torch 2.11 then finds no configuration on an
# H100 ("NoValidChoicesError", 4:2 heads of 64). The main kernel serves all lengths.
_KERNEL: FlexKernelOptions = {"BACKEND": "TRITON"}

_kernels: dict[Hashable, Callable[..., Any]] = {}  # compiled flex_attention, one for each kind of call


def _kernel(kind: Hashable, device: torch.device) -> Callable[..., Any]:
    """flex_attention as it must be called from here: as it is while tracing (the caller's graph takes it in), compiled
    on CUDA, uncompiled on CPU (where compiling takes longer than anybody's check of a mask).

    One compilation for each kind of call, lengths included. torch.compile counts recompilations by code object and
    gives up after eight, so each kind gets a copy of the code; `fullgraph` makes giving up an error, not a fallback.
    """
    if torch.compiler.is_compiling():
        return flex_attention
    if device.type == "cpu":
        return _uncompiled
    if kind not in _kernels:
        copy = FunctionType(_fused.__code__.replace(), _fused.__globals__, "flex_attention_of_one_kind")
        copy.__kwdefaults__ = _fused.__kwdefaults__
        _kernels[kind] = torch.compile(copy, fullgraph=True, dynamic=False)
    return _kernels[kind]


def _fused(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    *,
    score_mod: ScoreMod | None,
    block_mask: BlockMask | None,
    scale: float,
    enable_gqa: bool,
    return_aux: AuxRequest | None,
    kernel_options: FlexKernelOptions,
) -> Any:
    return flex_attention(
        q_BHTD,
        k_BGSD,
        v_BGSE,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        return_aux=return_aux,
        kernel_options=kernel_options,
    )


@contextmanager
def _plainly() -> Iterator[None]:
    """Run flex_attention as it stands, by torch's own switch for that (a module attribute; there is no argument)."""
    before = torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        torch_flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before


_uncompiled = _plainly()(_fused)


# -- the definition, in the kernel's terms -----------------------------------------------------------------------------


def score_mod(
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams,
    n_queries: int,
    n_keys: int,
    device: torch.device,
) -> ScoreMod | None:
    """Softcap, then ALiBi, on scaled scores; None when the spec has neither."""
    softcap, slopes_H = spec.softcap, params.alibi_slopes
    if spec.alibi and slopes_H is not None:
        query_at, key_at = _positions(context, n_queries, n_keys, device)

        def linear_bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            return score - slopes_H[h] * (query_at(b, q_idx) - key_at(b, kv_idx)).abs()

        return linear_bias
    if softcap is not None:

        def capped(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)

        return capped
    return None


def mask_mod(
    spec: AttentionSpec, context: AttentionContext, n_queries: int, n_keys: int, device: torch.device
) -> MaskMod | None:
    """`AttentionContext.allowed` for one pair, as FlexAttention compiles it; None when every pair is visible."""
    query_at, key_at = _positions(context, n_queries, n_keys, device)
    window, layout = spec.window, spec.block_sparse

    def neighbour(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return in_window(window, query_at(b, q_idx), key_at(b, kv_idx))

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return key_at(b, kv_idx) <= query_at(b, q_idx)

    all_of: list[MaskMod] = []
    thinning: list[MaskMod] = []
    if window.dilation > 1 or window.left is not None or (window.right is not None and not spec.causal):
        thinning.append(neighbour)
    if layout is not None:
        pattern = torch.tensor(layout.pattern, dtype=torch.bool, device=device)

        def block_layout(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return in_layout_pattern(layout, pattern, query_at(b, q_idx), key_at(b, kv_idx))

        thinning.append(block_layout)
    if thinning:
        any_of = [and_masks(*thinning)]
        if spec.sink_tokens:
            any_of.append(_of_key(context.sink_keys(spec, n_queries, n_keys, device)))
        if spec.global_tokens and context.is_global is not None:
            any_of.append(_of_key(context.is_global))
            any_of.append(_of_query(context.global_queries(spec, n_queries, n_keys)))
        all_of.append(or_masks(*any_of))
    exists = context.existing_keys(n_keys)
    if exists is not None:
        all_of.append(_of_key(exists))
    if spec.causal:
        all_of.append(causal)
    if spec.documents:
        q_documents, kv_documents = (_lookup(ids) for ids in context.documents(n_queries, n_keys))

        def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return q_documents(b, q_idx) == kv_documents(b, kv_idx)

        all_of.append(same_document)
    return and_masks(*all_of) if all_of else None


def _of_key(flags: Tensor) -> MaskMod:
    flag = _lookup(flags)

    def flagged_key(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return flag(b, kv_idx)

    return flagged_key


def _of_query(flags: Tensor) -> MaskMod:
    flag = _lookup(flags)

    def flagged_query(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return flag(b, q_idx)

    return flagged_query


def _positions(context: AttentionContext, n_queries: int, n_keys: int, device: torch.device) -> tuple[Row, Row]:
    """Positions of queries and keys: arithmetic where the context gives none, look-ups where it does."""
    # A tensor, because a number in a closure is compiled in, and a decoder would compile at every token.
    offset = torch.full((), n_keys - n_queries, dtype=torch.int32, device=device)

    def bottom_right(b: Tensor, q_idx: Tensor) -> Tensor:
        return q_idx + offset

    def index(b: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx

    explicit = context.q_positions is not None or context.kv_positions is not None
    if explicit:
        query_at = _lookup(context.query_positions(n_queries, n_keys))
    else:
        query_at = index if n_queries == n_keys else bottom_right
    return query_at, index if context.kv_positions is None else _lookup(context.kv_positions)


def _lookup(rows: Tensor) -> Row:
    """rows[b, i] of a tensor [B, N]; of a tensor [1, N], its only row for every b."""
    if rows.shape[0] == 1:
        row = rows[0]
        return lambda b, i: row[i]
    return lambda b, i: rows[b, i]


# -- which blocks are visited ------------------------------------------------------------------------------------------


def _block_mask(
    context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
) -> BlockMask | None:
    """Derived once per context, spec and lengths. None: every pair is visible."""
    key = ("flex", spec, n_queries, n_keys)
    if key not in context.derived:
        mod = mask_mod(spec, context, n_queries, n_keys, device)
        context.derived[key] = None if mod is None else _classify(context, spec, mod, n_queries, n_keys, device)
    return context.derived[key]  # pyright: ignore[reportReturnType]  # `derived` is untyped: each backend knows its keys


def _classify(
    context: AttentionContext, spec: AttentionSpec, mod: MaskMod, n_queries: int, n_keys: int, device: torch.device
) -> BlockMask:
    """A BlockMask from `allowed` itself, a strip of query rows at a time; torch's builder materialises all pairs."""
    width = -(-n_keys // BLOCK) * BLOCK
    height = max(1, _STRIP // (width * BLOCK)) * BLOCK
    partial, full = [], []
    for start in range(0, n_queries, height):
        rows = slice(start, min(start + height, n_queries))
        allowed_Btq = context.allowed(spec, rows, slice(0, n_keys), lengths=(n_queries, n_keys), device=device)
        # Padding is invisible, so a block that the end of the sequence cuts is never full: the kernel masks its tail.
        padding = (0, width - n_keys, 0, -(rows.stop - rows.start) % BLOCK)
        tiles = torch.nn.functional.pad(allowed_Btq, padding).unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
        visible_Bts = tiles.sum(dim=(2, 4), dtype=torch.int32)
        full.append(visible_Bts == BLOCK * BLOCK)
        partial.append((visible_Bts > 0) & (visible_Bts < BLOCK * BLOCK))
    return BlockMask.from_kv_blocks(
        *_ordered(torch.cat(partial, dim=1)),
        *_ordered(torch.cat(full, dim=1)),
        BLOCK_SIZE=BLOCK,
        mask_mod=mod,
        seq_lengths=(n_queries, n_keys),
    )


def _ordered(blocks_Bts: Tensor) -> tuple[Tensor, Tensor]:
    """(how many key blocks a query block visits [B, 1, t], which ones, those first [B, 1, t, s])."""
    blocks_B1ts = blocks_Bts[:, None].to(torch.int32)
    order_B1ts = blocks_B1ts.argsort(dim=-1, descending=True, stable=True)
    return blocks_B1ts.sum(dim=-1, dtype=torch.int32), order_B1ts.to(torch.int32).contiguous()
