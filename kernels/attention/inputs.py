"""What `attend` was given: its facts as an `AttentionCall`, and what does not fit, told in one line.

Legend: B batch, T queries, S keys, H query heads, G key/value heads (H % G == 0), D head dim of q and k, E of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import AttentionCall, AttentionParams, Phase, short
from .context import AttentionContext
from .quantize import LARGEST
from .spec import AttentionSpec


def describe(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, context: AttentionContext, params: AttentionParams, return_lse: bool
) -> AttentionCall:
    """The facts of this call. Raises ValueError where the tensors have no shape to speak of."""
    for name, tensor in (("q", q_BTHD), ("k", k_BSGD), ("v", v_BSGE)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; attention takes [batch, time, heads, head_dim]")
    n_queries, n_keys = q_BTHD.shape[1], k_BSGD.shape[1]
    if context.page_table is not None:
        n_keys *= context.page_table.shape[1]
    learned = (params.alibi_slopes, params.sink_logits)
    needs_grad = torch.is_grad_enabled() and (
        q_BTHD.requires_grad
        or k_BSGD.requires_grad
        or v_BSGE.requires_grad
        or any(tensor is not None and tensor.requires_grad for tensor in learned)
    )
    if needs_grad:
        phase = Phase.TRAIN
    else:
        phase = Phase.DECODE if n_queries == 1 and n_keys > 1 else Phase.PREFILL
    return AttentionCall(
        phase=phase,
        device=q_BTHD.device.type,
        dtype=q_BTHD.dtype,
        kv_dtype=None if k_BSGD.dtype == q_BTHD.dtype else k_BSGD.dtype,
        head_dim=q_BTHD.shape[3],
        value_dim=v_BSGE.shape[3],
        n_heads=q_BTHD.shape[2],
        n_kv_heads=k_BSGD.shape[2],
        n_queries=n_queries,
        n_keys=n_keys,
        needs_grad=needs_grad,
        needs_lse=return_lse,
        positions=context.q_positions is not None or context.kv_positions is not None,
        kv_lengths=context.kv_lengths is not None,
        paged=context.page_table is not None,
    )


_STORED = " and ".join(map(short, LARGEST))
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_inputs(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGE: Tensor,
    spec: AttentionSpec,
    context: AttentionContext,
    params: AttentionParams,
    call: AttentionCall,
) -> None:
    B, T, H, D = q_BTHD.shape
    S, G = call.n_keys, k_BSGD.shape[2]
    if k_BSGD.shape[:3] != v_BSGE.shape[:3]:
        raise ValueError(f"k is {list(k_BSGD.shape)} and v is {list(v_BSGE.shape)}: all but the last size must agree")
    if k_BSGD.shape[3] != D:
        raise ValueError(f"q has head_dim {D} and k has {k_BSGD.shape[3]}: they must be equal")
    if G == 0 or H % G:
        raise ValueError(f"{H} query heads cannot share {G} key/value heads: {H} is not a multiple of {G}")
    if context.page_table is None and k_BSGD.shape[0] != B:
        raise ValueError(f"q has a batch of {B} and k, v one of {k_BSGD.shape[0]}")
    if k_BSGD.dtype in LARGEST or v_BSGE.dtype in LARGEST:
        _check_scales(k_BSGD, v_BSGE, params)
    elif not q_BTHD.dtype == k_BSGD.dtype == v_BSGE.dtype:
        dtypes = ", ".join(f"{n} {short(x.dtype)}" for n, x in (("q", q_BTHD), ("k", k_BSGD), ("v", v_BSGE)))
        raise ValueError(f"q, k and v have different dtypes: {dtypes}")
    elif params.k_scale_BSG is not None or params.v_scale_BSG is not None:
        raise ValueError(f"params has scales of k or v, which are {short(k_BSGD.dtype)}; scales belong to {_STORED}")
    if not q_BTHD.device == k_BSGD.device == v_BSGE.device:
        raise ValueError(f"q, k and v are on different devices: {q_BTHD.device}, {k_BSGD.device}, {v_BSGE.device}")

    tensors = context.tensors()
    expected = {"q_positions": T, "q_documents": T, "kv_positions": S, "kv_documents": S, "is_global": S}
    for name, tensor in tensors.items():
        if tensor.device != q_BTHD.device:
            raise ValueError(f"context.{name} is on {tensor.device}, but q, k and v are on {q_BTHD.device}")
        if name in expected and (
            tensor.dim() != 2 or tensor.shape[0] not in (1, B) or tensor.shape[1] != expected[name]
        ):
            raise ValueError(f"context.{name} has shape {list(tensor.shape)}; it must be [{B}, {expected[name]}]")
    if context.kv_lengths is not None and context.kv_lengths.shape != (B,):
        raise ValueError(f"context.kv_lengths has shape {list(context.kv_lengths.shape)}; it must be [{B}]")
    if context.page_table is not None and (context.page_table.dim() != 2 or context.page_table.shape[0] != B):
        raise ValueError(f"context.page_table has shape {list(context.page_table.shape)}; it must be [{B}, pages]")
    for name, tensor in tensors.items():
        if name == "is_global" and tensor.dtype != torch.bool:
            raise ValueError(f"context.is_global has dtype {short(tensor.dtype)}; it must be bool")
        if name != "is_global" and tensor.dtype not in _INTEGERS:
            raise ValueError(f"context.{name} has dtype {short(tensor.dtype)}; it must be int64 (or another integer)")
    if spec.documents:
        context.documents(T, call.n_keys or 0)

    seed = params.dropout_seed
    if spec.dropout > 0 and seed is not None and (seed.dim() or seed.dtype not in _INTEGERS):
        found = f"a {short(seed.dtype)} tensor of shape {list(seed.shape)}"
        raise ValueError(f"params.dropout_seed is {found}; it must be int64, without dimensions")
    for asks, name, tensor in (
        (spec.alibi, "alibi_slopes", params.alibi_slopes),
        (spec.learned_sink, "sink_logits", params.sink_logits),
    ):
        if not asks:
            continue
        feature = "alibi" if name == "alibi_slopes" else "learned_sink"
        if tensor is None:
            raise ValueError(f"spec.{feature}=True needs params.{name}, one number for each of the {H} query heads")
        if tensor.shape != (H,):
            raise ValueError(f"params.{name} has shape {list(tensor.shape)}; it must be [{H}], one for each query head")
        if tensor.device != q_BTHD.device:
            raise ValueError(f"params.{name} is on {tensor.device}, but q, k and v are on {q_BTHD.device}")


def _check_scales(k_BSGD: Tensor, v_BSGE: Tensor, params: AttentionParams) -> None:
    if k_BSGD.dtype != v_BSGE.dtype:
        raise ValueError(
            f"k is {short(k_BSGD.dtype)} and v is {short(v_BSGE.dtype)}: stored in eight bits, both have one dtype"
        )
    for name, stored, scale in (
        ("k_scale_BSG", k_BSGD, params.k_scale_BSG),
        ("v_scale_BSG", v_BSGE, params.v_scale_BSG),
    ):
        if scale is None:
            raise ValueError(
                f"k and v are {short(stored.dtype)}, which needs params.{name}: one scale a token and head"
            )
        if scale.shape != stored.shape[:3]:
            raise ValueError(f"params.{name} has shape {list(scale.shape)}; it must be {list(stored.shape[:3])}")
        if scale.dtype not in (torch.float32, torch.float16):
            raise ValueError(f"params.{name} has dtype {short(scale.dtype)}; it must be float32 or float16")
        if scale.device != stored.device:
            raise ValueError(f"params.{name} is on {scale.device}, but k and v are on {stored.device}")
