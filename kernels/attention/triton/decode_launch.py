"""Which decode kernels run for a call, with which tiles and how many splits; and the operator that torch.compile sees.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..spec import AttentionSpec
from ..tiles import INTERPRETED as INTERPRETED_TILES
from ..tiles import choose_decode, n_splits
from .decode import decode_kernel, join_splits_kernel
from .launch import parse_spec, spec_text, unit_stride
from .mask import INTERPRETED

CHUNK = 16  # splits that are joined at a time


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    lengths: Tensor | None,
    table: Tensor | None,
    mask: Tensor | None,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, E] in q's dtype, lse [B, H, T] fp32); as an operator while torch.compile traces.

    k, v, k_scale and v_scale are pools where there is a table; `mask` [B or 1, T, S] bool replaces window, sink tokens
    and causality; q_pos [B or 1, T] and k_pos [B or 1, S] are any integers.
    """
    if torch.compiler.is_compiling():
        return _operator(q, k, v, k_scale, v_scale, slopes, sinks, q_pos, k_pos, lengths, table, mask, spec_text(spec))
    B, T, H, D = q.shape
    G, E, page = k.shape[2], v.shape[3], k.shape[1]
    S = page if table is None else page * table.shape[1]
    out = q.new_empty(B, T, H, E)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    lengths, table, q_pos, k_pos, slopes, sinks = (
        None if x is None else unit_stride(x) for x in (lengths, table, q_pos, k_pos, slopes, sinks)
    )
    mask = None if mask is None else mask.contiguous().view(torch.uint8)

    skips = mask is None and k_pos is None
    plan = _plan(
        spec, B, T, S, H, G, D, E, 0 if table is None else page, q.element_size(), k.element_size(), skips, q.device
    )
    part = None
    if plan.splits > 1:
        part = q.new_empty(B * T * H * plan.splits * (E + 1), dtype=torch.float32)
    with _on_device_of(q):
        decode_kernel[plan.grid](
            q, k, v, out, lse, part, k_scale, v_scale, slopes, sinks, q_pos, k_pos, lengths, table, mask,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_strides(k_scale), *_strides(v_scale),
            _row(q_pos), _row(k_pos), 0 if table is None else table.stride(0), _row(mask),
            T, S, plan.splits, *plan.scalars, **plan.constants,
        )  # fmt: skip
        if part is not None:
            join_splits_kernel[T * H, B](part, out, lse, sinks, T, plan.splits, **plan.join_constants)
    return out, lse


def _on_device_of(q: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; to ask is cheaper than to switch."""
    if not q.is_cuda or q.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(q)


def _decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    lengths: Tensor | None,
    table: Tensor | None,
    mask: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """An operator's signature is its schema, so it is spelled out once more."""
    return decode_attention(
        q, k, v, k_scale, v_scale, slopes, sinks, q_pos, k_pos, lengths, table, mask, parse_spec(spec)
    )


_operator = torch.library.custom_op("longspan::decode_attention", _decode_attention, mutates_args=())


@_operator.register_fake
def _(q, k, v, *_others):
    B, T, H = q.shape[:3]
    return q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What follows from sizes and the spec alone, worked out once for all layers."""

    grid: tuple[int, int, int]
    splits: int
    scalars: tuple[int | float, ...]
    constants: dict[str, object]
    join_constants: dict[str, object]


@lru_cache(maxsize=4096)
def _plan(
    spec: AttentionSpec,
    B: int,
    T: int,
    S: int,
    H: int,
    G: int,
    D: int,
    E: int,
    page: int,
    q_bytes: int,
    kv_bytes: int,
    skips: bool,
    device: torch.device,
) -> _Plan:
    """`page`: 0 without pages; `skips`: keys outside the window are not visited."""
    window, R = spec.window, H // G
    has_right = window.right is not None and not spec.causal
    tiles = INTERPRETED_TILES if INTERPRETED else choose_decode(T * R, max(D, E), q_bytes, kv_bytes)
    M, N = tiles.rows, tiles.columns
    row_tiles = triton.cdiv(T * R, M)
    reach = S
    if skips and window.left is not None and (spec.causal or has_right):
        reach = min(S, window.left + (window.right or 0) * has_right + T + spec.sink_tokens + N)
    if INTERPRETED:
        splits = min(3, max(1, triton.cdiv(reach, N)))
    else:
        splits = n_splits(B * G * row_tiles, triton.cdiv(reach, N), _processors(device), kv_bytes=kv_bytes)
    BLOCK_E = max(32, triton.next_power_of_2(E))
    return _Plan(
        grid=(splits * row_tiles, G, B),
        splits=splits,
        scalars=(
            window.left or 0,
            window.right or 0,
            spec.sink_tokens,
            spec.softmax_scale(D),
            spec.softcap or 1.0,
        ),
        constants={
            "H": H,
            "R": R,
            "D": D,
            "E": E,
            "BLOCK_D": max(32, triton.next_power_of_2(D)),
            "BLOCK_E": BLOCK_E,
            "M": M,
            "N": N,
            "PAGE": page,
            "CAUSAL": spec.causal,
            "HAS_LEFT": window.left is not None,
            "HAS_RIGHT": has_right,
            "HAS_SINKS": spec.sink_tokens > 0,
            "SOFTCAP": spec.softcap is not None,
            "ALIBI": spec.alibi,
            "ONE_QUERY": T == 1,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        },
        join_constants={
            "H": H,
            "E": E,
            "BLOCK_E": BLOCK_E,
            "SPLITS": max(2, triton.next_power_of_2(splits)),
            "CHUNK": CHUNK,
            "num_warps": 4,
        },
    )


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _row(x: Tensor | None) -> int:
    """The stride of rows, 0 where one serves the whole batch."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
