"""The `triton` backend: our fused FlashAttention kernels, for everything but pages and keys in eight bits.

This module imports no triton; the kernels (`triton/`) are imported by the first call.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

from .backend import AttentionCall, AttentionOutput, AttentionParams, Capabilities, Feature, Reason, check
from .context import AttentionContext
from .plan import Plan, make_plan
from .spec import AttentionSpec

OLDEST = (8, 0)  # compute capability: bf16 tensor cores and asynchronous copies


class Triton:
    """Fused kernels on CUDA (compute capability 8.0 and newer) and, under TRITON_INTERPRET=1, on CPU.

    Memory is O(T + S). Weights of a whole tile that nobody sees are never computed: outside the window, in other
    documents (as far as documents lie together), outside the block layout; but with explicit positions all are, and
    finding their global queries takes T × S. Deterministic, gradients included.
    """

    name = "triton"
    capabilities = Capabilities(
        features=frozenset(Feature) - {Feature.PAGED, Feature.QUANTIZED_KV},
        dtypes={
            "cpu": (torch.float32, torch.float16),
            "cuda": (torch.bfloat16, torch.float16, torch.float32),
        },
        max_head_dim=256,
        notes={Feature.PAGED: "needs contiguous keys", Feature.QUANTIZED_KV: "needs the inputs' dtype"},
    )

    def __init__(self) -> None:
        # Looked up here, because `unsupported` may be traced by torch.compile, which cannot look.
        self._installed = importlib.util.find_spec("triton") is not None
        self._interpreted = interpreted()

    def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        reasons = check(self.capabilities, spec, call)
        if not self._installed:
            reasons += (Reason("import", "triton is not installed"),)
        elif call.device == "cpu" and not self._interpreted:
            reasons += (Reason("device=cpu", "only interpreted: set TRITON_INTERPRET=1 before starting Python"),)
        elif self._interpreted and call.dtype == torch.bfloat16:
            reasons += (Reason("dtype=bfloat16", "Triton's interpreter multiplies it wrongly"),)
        elif call.device == "cuda" and (found := oldest_capability()) is not None and found < OLDEST:
            reasons += (Reason(f"device=cuda of capability {found[0]}.{found[1]}", "8.0 or newer"),)
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
        from .triton.launch import cached_spec_text, spec_text
        from .triton.operator import flash_attention

        plan = plan_of(context, spec, q_BTHD.shape[1], k_BSGD.shape[1], q_BTHD.device)
        seed = params.dropout_seed
        if spec.dropout > 0 and seed is None:
            seed = torch.randint(2**62, (), device=q_BTHD.device)
        out_BTHE, lse_BHT = flash_attention(
            q_BTHD,
            k_BSGD,
            v_BSGE,
            params.alibi_slopes if spec.alibi else None,
            params.sink_logits if spec.learned_sink else None,
            None if spec.dropout == 0 or seed is None else seed.to(q_BTHD.device),
            plan.q_pos,
            plan.k_pos,
            plan.q_doc,
            plan.k_doc,
            plan.q_span,
            plan.k_span,
            plan.lengths,
            plan.always,
            plan.n_always,
            plan.is_global,
            plan.rows,
            plan.n_rows,
            plan.most_always,
            plan.most_rows,
            spec_text(spec) if torch.compiler.is_compiling() else cached_spec_text(spec),
        )
        return AttentionOutput(out_BTHE, lse_BHT if return_lse else None)

    def prepare(
        self, context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
    ) -> None:
        plan_of(context, spec, n_queries, n_keys, device)


def interpreted() -> bool:
    """Triton decides when a kernel's module is imported; the environment is what it looks at."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def oldest_capability() -> tuple[int, int] | None:
    """Of the oldest GPU that this process sees."""
    return _oldest_gpu()


# As in registry: what torch.compiler.assume_constant_result does, without importing dynamo. It has to stand on a plain
# function: dynamo looks through the wrapper of lru_cache and traces what it wraps.
oldest_capability._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # functions take attributes


@lru_cache(maxsize=1)
def _oldest_gpu() -> tuple[int, int] | None:
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))


def plan_of(context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device) -> Plan:
    """`make_plan`, once for a context."""
    key = ("flash", spec, n_queries, n_keys)
    if key not in context.derived:
        context.derived[key] = make_plan(context, spec, n_queries, n_keys, device)
    return context.derived[key]  # pyright: ignore[reportReturnType]  # `derived` is untyped: each backend knows its keys
