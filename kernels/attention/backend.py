"""What an attention backend is: capabilities as data, refusals with reasons, one call signature.

Legend: B batch, T queries, S keys, H query heads, G key/value heads (H % G == 0), D head dim of q and k, E of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .context import AttentionContext
from .spec import AttentionSpec


class Phase(StrEnum):
    TRAIN = "train"
    PREFILL = "prefill"
    DECODE = "decode"


class Feature(StrEnum):
    """Everything a call may need beyond plain dense attention. The values are the words that errors use."""

    CAUSAL = "causal"
    WINDOW = "window"
    DILATION = "dilation"
    GLOBAL_TOKENS = "global_tokens"
    DOCUMENTS = "documents"
    ALIBI = "alibi"
    SOFTCAP = "softcap"
    SINK_TOKENS = "sink_tokens"
    LEARNED_SINK = "learned_sink"
    DROPOUT = "dropout"
    BLOCK_SPARSE = "block_sparse"
    GQA = "gqa"
    CROSS_LENGTH = "cross_length"  # T != S
    VALUE_DIM = "value_dim"  # E != D
    POSITIONS = "positions"  # explicit q_positions or kv_positions
    KV_LENGTHS = "kv_lengths"
    PAGED = "paged"
    QUANTIZED_KV = "quantized_kv"  # k and v stored in eight bits, with scales
    LSE = "lse"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What a call takes beside q, k and v.

    alibi_slopes [H], sink_logits [H]
    dropout_seed   int64 scalar that makes dropout replayable; None draws one from torch's generator
    k_scale_BSG, v_scale_BSG [B, S, G] fp32 or fp16, of k and v stored in eight bits: stored value × scale = value. With
                   a page table pools [n_pages, page, G]
    """

    alibi_slopes: Tensor | None = None
    sink_logits: Tensor | None = None
    dropout_seed: Tensor | None = None
    k_scale_BSG: Tensor | None = None
    v_scale_BSG: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionOutput:
    """out [B, T, H, E]; lse [B, H, T] fp32 natural log, -inf on rows that see no key."""

    out: Tensor
    lse: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """The facts of a call that decide whether a backend can serve it; the tensors' half of a capability question."""

    phase: Phase = Phase.TRAIN
    device: str = "cpu"  # device type
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None  # None: dtype
    head_dim: int = 64
    value_dim: int | None = None  # None: head_dim
    n_heads: int = 1
    n_kv_heads: int | None = None  # None: n_heads
    n_queries: int | None = None  # None: unknown when asked (a model is being built)
    n_keys: int | None = None
    needs_grad: bool = False
    needs_lse: bool = False
    positions: bool = False  # the context carries explicit positions
    kv_lengths: bool = False
    paged: bool = False


def needed(spec: AttentionSpec, call: AttentionCall) -> dict[Feature, str]:
    """Features that this spec and call need, each with the value that asks for it."""
    wants: dict[Feature, str] = {}

    def want(feature: Feature, condition: bool, value: object = "") -> None:
        if condition:
            wants[feature] = f"{feature}={value}" if value != "" else str(feature)

    window = spec.window
    # Under `causal` the right side is closed anyway, so only the left side can narrow anything.
    narrows = window.left is not None or (window.right is not None and not spec.causal)
    want(Feature.CAUSAL, spec.causal)
    want(Feature.WINDOW, narrows, f"({window.left}, {window.right})")
    want(Feature.DILATION, window.dilation > 1, window.dilation)
    want(Feature.GLOBAL_TOKENS, spec.global_tokens)
    want(Feature.DOCUMENTS, spec.documents)
    want(Feature.ALIBI, spec.alibi)
    want(Feature.SOFTCAP, spec.softcap is not None, spec.softcap)
    want(Feature.SINK_TOKENS, spec.sink_tokens > 0, spec.sink_tokens)
    want(Feature.LEARNED_SINK, spec.learned_sink)
    want(Feature.DROPOUT, spec.dropout > 0, spec.dropout)
    want(Feature.BLOCK_SPARSE, spec.block_sparse is not None)
    kv_heads = call.n_heads if call.n_kv_heads is None else call.n_kv_heads
    want(Feature.GQA, kv_heads != call.n_heads, f"{call.n_heads}:{kv_heads}")
    both = call.n_queries is not None and call.n_keys is not None
    want(Feature.CROSS_LENGTH, both and call.n_queries != call.n_keys, f"{call.n_queries}:{call.n_keys}")
    want(Feature.VALUE_DIM, call.value_dim is not None and call.value_dim != call.head_dim, call.value_dim)
    want(Feature.POSITIONS, call.positions)
    want(Feature.KV_LENGTHS, call.kv_lengths)
    want(Feature.PAGED, call.paged)
    stored = call.dtype if call.kv_dtype is None else call.kv_dtype
    want(Feature.QUANTIZED_KV, stored != call.dtype, short(stored))
    want(Feature.LSE, call.needs_lse)
    want(Feature.BACKWARD, call.needs_grad)
    return wants


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do, as data: the docs table, the error messages and the conformance suite read it."""

    features: frozenset[Feature]
    phases: frozenset[Phase] = frozenset(Phase)
    dtypes: dict[str, tuple[torch.dtype, ...]]  # device type -> dtypes
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    max_queries: int | None = None
    notes: dict[Feature, str] | None = None  # why a missing feature is missing: "lse": "returns none"


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing a backend cannot do: what was needed, and what it has instead."""

    need: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.need} ({self.detail})" if self.detail else self.need


@dataclass(frozen=True, slots=True)
class Rejection:
    backend: str
    reasons: tuple[Reason, ...]

    def __str__(self) -> str:
        return f"{self.backend} cannot run this attention: " + "; ".join(map(str, self.reasons)) + "."


class UnsupportedAttention(NotImplementedError):  # noqa: N818  # says what happened, as its users read it
    """No backend that was asked can run this attention; carries every backend tried with every reason."""

    def __init__(self, tried: Sequence[Rejection], *, able: Sequence[str] = (), asked_by: str = "") -> None:
        self.tried = tuple(tried)
        self.able = tuple(able)
        self.asked_by = asked_by
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [str(rejection) for rejection in self.tried]
        if self.asked_by:
            parts.append(f"Asked by {self.asked_by}.")
        parts.append(f"Backends that can: {', '.join(self.able)}." if self.able else "No registered backend can.")
        return " ".join(parts)


@runtime_checkable
class AttentionBackend(Protocol):
    """An implementation of attention. Stateless; `unsupported` answers before any tensor exists."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def unsupported(self, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
        """Why this backend cannot run it here (empty: it can). Never raises; usually `check` plus joint limits."""
        ...

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
    ) -> AttentionOutput: ...


@runtime_checkable
class PreparesContext(Protocol):
    """A backend that derives something (a mask) from a context and can do so before the call: `registry.prepare`."""

    def prepare(
        self, context: AttentionContext, spec: AttentionSpec, n_queries: int, n_keys: int, device: torch.device
    ) -> None: ...


def check(capabilities: Capabilities, spec: AttentionSpec, call: AttentionCall) -> tuple[Reason, ...]:
    """Reasons that follow from the capabilities alone: missing features, dtype on the device, head dims, queries,
    phase."""
    reasons: list[Reason] = []
    notes = capabilities.notes or {}
    for feature, asked in needed(spec, call).items():
        if feature not in capabilities.features:
            reasons.append(Reason(asked, notes.get(feature, "not implemented")))
    if call.phase not in capabilities.phases:
        reasons.append(Reason(f"phase={call.phase}", "has " + ", ".join(sorted(capabilities.phases))))
    dtypes = capabilities.dtypes.get(call.device)
    if dtypes is None:
        reasons.append(Reason(f"device={call.device}", "runs on " + ", ".join(sorted(capabilities.dtypes))))
    elif call.dtype not in dtypes:
        has = ", ".join(short(dtype) for dtype in dtypes)
        reasons.append(Reason(f"dtype={short(call.dtype)} on {call.device}", f"has {has}"))
    for dim in {call.head_dim, call.head_dim if call.value_dim is None else call.value_dim}:
        if capabilities.max_head_dim is not None and dim > capabilities.max_head_dim:
            reasons.append(Reason(f"head_dim={dim}", f"at most {capabilities.max_head_dim}"))
        if dim % capabilities.head_dim_multiple:
            reasons.append(Reason(f"head_dim={dim}", f"a multiple of {capabilities.head_dim_multiple}"))
    if capabilities.max_queries is not None and (call.n_queries or 0) > capabilities.max_queries:
        reasons.append(Reason(f"n_queries={call.n_queries}", f"at most {capabilities.max_queries}"))
    return tuple(reasons)


def short(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")
