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
from ..flash import interpreted, oldest_capability
from ..plan import make_plan
from ..spec import AttentionSpec
from .tiles import LARGEST, BackwardTiles, Tiles, choose

_CAPABILITY = (9, 0)
_EVERYWHERE = 2**31 - 1


class Hopper:
    """Fused forward and backward pass in Triton Gluon.

    Memory is O(T + S), weights of a tile that nobody sees are never computed, and results are bit-identical from run
    to run, gradients included.
    """

    name = "hopper"
    capabilities = Capabilities(
        features=frozenset(
            {
                Feature.CAUSAL,
                Feature.WINDOW,
                Feature.DOCUMENTS,
                Feature.ALIBI,
                Feature.SOFTCAP,
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

        documents = _NONE
        if spec.documents:
            rows = tiles_of(spec, max(q_BTHD.shape[3], v_BSGE.shape[3])).rows
            documents = _documents(context, spec, q_BTHD.shape[1], k_BSGD.shape[1], q_BTHD.device, rows)
        out_BTHE, lse_BHT = hopper_attention(
            q_BTHD,
            k_BSGD,
            v_BSGE,
            params.alibi_slopes if spec.alibi else None,
            params.sink_logits if spec.learned_sink else None,
            *documents,
            spec=spec,
        )
        return AttentionOutput(out_BTHE, lse_BHT if return_lse else None)


_NONE = (None, None, None, None, None)


def tiles_of(spec: AttentionSpec, head_dim: int) -> Tiles:
    return choose(head_dim, edges=spec.documents or spec.window.left is not None)


def _missing() -> str:
    """Why the kernel cannot be imported; empty: it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("triton.experimental.gluon") is None:
        return "this triton has no Gluon; 3.6 or newer has"
    return ""


def _documents(
    context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device, rows: int
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
    """Ids of queries and of keys, and the spans of tiles: of `rows` queries, and of the backward pass's queries and
    keys."""
    key = ("hopper", spec, n_queries, n_keys, rows)
    if key not in context.derived:
        plan = make_plan(context, spec, n_queries, n_keys, device)
        if plan.q_span is None or plan.k_span is None:
            raise ValueError("hopper: a plan of documents has no spans")
        forward = spans_of_tiles(plan.q_span, rows)
        tall = BackwardTiles.rows
        queries = forward if rows == tall else spans_of_tiles(plan.q_span, tall)
        context.derived[key] = plan.q_doc, plan.k_doc, forward, queries, spans_of_tiles(plan.k_span, tall)
    return context.derived[key]  # pyright: ignore[reportReturnType]  # `derived` is untyped: each backend knows its keys


def spans_of_tiles(q_span_BT4: Tensor, rows: int) -> Tensor:
    """[B, tiles, 4] int32: of the rows' spans (see `Plan`) the first key of any, the range of keys that all of them see
    (empty where there is none), the end of the keys of any."""
    padding = -q_span_BT4.shape[1] % rows
    tiled = [
        F.pad(q_span_BT4[..., i], (0, padding), value=value).unflatten(1, (-1, rows))
        for i, value in enumerate((_EVERYWHERE, 0, _EVERYWHERE, 0))
    ]
    return torch.stack((tiled[0].amin(2), tiled[1].amax(2), tiled[2].amin(2), tiled[3].amax(2)), dim=-1)
