"""The `hopper` backend: attention with TMA, asynchronous wgmma and specialised warps, for sm_90 (H100, H200).

This module imports no triton; the kernel is imported by the first call.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import AttentionCall, AttentionOutput, AttentionParams, Capabilities, Feature, Reason, check
from ..context import AttentionContext
from ..flash import interpreted, oldest_capability, plan_of
from ..plan import Plan
from ..spec import AttentionSpec
from .gathered import outside_of_windows, seen_from
from .tiles import LARGEST, BackwardTiles, Tiles, choose

_CAPABILITY = (9, 0)
_EVERYWHERE = 2**31 - 1


class Hopper:
    """Fused forward and backward pass in Triton Gluon.

    Memory is O(T + S), weights of a tile that nobody sees are never computed, and results are bit-identical from run
    to run: all but q's gradients where these are added up in any order (`tiles.adds_dq`), and those too under
    torch.use_deterministic_algorithms.
    """

    name = "hopper"
    capabilities = Capabilities(
        features=frozenset(
            {
                Feature.CAUSAL,
                Feature.WINDOW,
                Feature.GLOBAL_TOKENS,
                Feature.DOCUMENTS,
                Feature.ALIBI,
                Feature.SOFTCAP,
                Feature.SINK_TOKENS,
                Feature.LEARNED_SINK,
                Feature.GQA,
                Feature.CROSS_LENGTH,
                Feature.VALUE_DIM,
                Feature.LSE,
                Feature.BACKWARD,
            }
        ),
        dtypes={"cuda": (torch.bfloat16, torch.float16)},
        max_head_dim=LARGEST,
        head_dim_multiple=8,
    )

    def __init__(self) -> None:
        # Looked up here, because `unsupported` may be traced by torch.compile, which cannot look.
        self._problem = _missing()
        self._interpreted = interpreted()

    def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        reasons = check(self.capabilities, spec, call)
        if self._problem:
            reasons += (Reason("import", self._problem),)
        elif self._interpreted:
            reasons += (Reason("TRITON_INTERPRET=1", "Gluon is compiled only"),)
        elif call.device == "cuda":
            found = oldest_capability()
            if found is None:
                reasons += (Reason("device=cuda", "torch sees no GPU"),)
            elif found[0] != _CAPABILITY[0] or found[1] != _CAPABILITY[1]:  # dynamo cannot trace tuples' `!=` here
                reasons += (Reason(f"device=cuda of capability {found[0]}.{found[1]}", "9.0 only"),)
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
        from .operator import hopper_attention

        masks = NO_MASKS
        if _masked(spec):
            rows = tiles_of(spec, max(q_BTHD.shape[3], v_BSGE.shape[3])).rows
            masks = _masks(context, spec, q_BTHD.shape[1], k_BSGD.shape[1], q_BTHD.device, rows)
        out_BTHE, lse_BHT = hopper_attention(
            q_BTHD,
            k_BSGD,
            v_BSGE,
            params.alibi_slopes if spec.alibi else None,
            params.sink_logits if spec.learned_sink else None,
            *masks,
            spec=spec,
        )
        return AttentionOutput(out_BTHE, lse_BHT if return_lse else None)

    def prepare(
        self, context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
    ) -> None:
        if _masked(spec):
            plan_of(context, spec, n_queries, n_keys, device)


_Masks = tuple[*tuple[Tensor | None, ...], int, int]
NO_MASKS: _Masks = (*(None,) * 14, 0, 0)  # `masks_of` a plan that says nothing


def _masked(spec: AttentionSpec) -> bool:
    return spec.documents or spec.global_tokens or spec.sink_tokens > 0


def tiles_of(spec: AttentionSpec, head_dim: int) -> Tiles:
    curved = spec.alibi or spec.softcap is not None
    return choose(head_dim, edges=spec.documents or spec.window.left is not None or curved)


def _missing() -> str:
    """Why the kernel cannot be imported; empty: it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this triton has no Gluon; 3.6 or newer has"
    return ""


def _masks(
    context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device, rows: int
) -> _Masks:
    key = ("hopper", spec, n_queries, n_keys, rows)
    if key not in context.derived:
        plan = plan_of(context, spec, n_queries, n_keys, device)
        context.derived[key] = masks_of(plan, spec, n_queries, n_keys, rows)
    return context.derived[key]  # pyright: ignore[reportReturnType]  # `derived` is untyped: each backend knows its keys


def masks_of(plan: Plan, spec: AttentionSpec, n_queries: int, n_keys: int, rows: int) -> _Masks:
    """What `launch.forward` takes after q, k, v, slopes and sinks: ids of queries and of keys, and the spans of tiles,
    of `rows` queries and of the backward pass's queries and keys; then global tokens and sinks, and how many at most.
    """
    forward = queries = keys = always_doc = row_doc = None
    if plan.q_span is not None and plan.k_span is not None:
        tall = BackwardTiles.rows
        forward, keys = spans_of_tiles(plan.q_span, rows), spans_of_tiles(plan.k_span, tall)
        queries = forward if rows == tall else spans_of_tiles(plan.q_span, tall)
    if plan.always is not None and plan.k_doc is not None:
        always_doc = plan.k_doc.gather(1, plan.always.expand(plan.k_doc.shape[0], -1).long())
    if plan.rows is not None and plan.q_doc is not None:
        row_doc = plan.q_doc.gather(1, plan.rows.expand(plan.q_doc.shape[0], -1).long())
    documents = (plan.q_doc, plan.k_doc, forward, queries, keys)
    always = (plan.always, plan.n_always, outside_of_windows(plan, spec, n_queries, n_keys), always_doc)
    rows_of = (plan.is_global, plan.rows, plan.n_rows, seen_from(plan, spec, n_queries, n_keys), row_doc)
    return (*documents, *always, *rows_of, plan.most_always, plan.most_rows)


def spans_of_tiles(q_span_BT4: Tensor, rows: int) -> Tensor:
    """[B, tiles, 4] int32: of the rows' spans (see `Plan`) the first key of any, the range of keys that all of them see
    (empty where there is none), the end of the keys of any."""
    padding = -q_span_BT4.shape[1] % rows
    tiled = [
        F.pad(q_span_BT4[..., i], (0, padding), value=value).unflatten(1, (-1, rows))
        for i, value in enumerate((_EVERYWHERE, 0, _EVERYWHERE, 0))
    ]
    return torch.stack((tiled[0].amin(2), tiled[1].amax(2), tiled[2].amin(2), tiled[3].amax(2)), dim=-1)
