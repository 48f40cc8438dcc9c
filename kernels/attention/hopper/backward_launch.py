"""The launches of the backward pass, over plain tensors.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..spec import AttentionSpec
from ..triton.launch import parse_spec
from .backend import spans_of_tiles
from .backward import dkdv_kernel, dq_kernel, stats_kernel
from .launch import FURTHEST, descriptor, loadable, per_batch
from .tiles import BACKWARD_L2_BYTES, ROWS, BackwardTiles, choose_backward, heads_at_a_time, padded

STATS_ROWS = 32  # of a program


def backward(
    d_out: Tensor,
    d_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    q_doc: Tensor | None,
    k_doc: Tensor | None,
    q_span: Tensor | None,
    k_span: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, slopes [H] and sinks [H] (fp32; empty where there are none)."""
    parsed = parse_spec(spec)
    (B, T, H, D), (S, G), E = q.shape, k.shape[1:3], v.shape[3]
    dq, dk, dv = q.new_empty(B, T, H, D), k.new_empty(B, S, G, D), v.new_empty(B, S, G, E)
    d_slopes = q.new_zeros(0 if slopes is None else H, dtype=torch.float32)
    d_sinks = q.new_zeros(0 if sinks is None else H, dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), d_slopes, d_sinks
    curved = parsed.alibi or parsed.softcap is not None
    tiles = choose_backward(max(D, E), curved=curved, documents=parsed.documents)
    q, k, v, d_out = (loadable(x) for x in (q, k, v, d_out))
    q_spans, k_spans = (None if x is None else per_batch(spans_of_tiles(x, tiles.rows), B) for x in (q_span, k_span))
    stats = statistics(out, d_out, lse, d_lse.contiguous(), tiles.rows)
    task = Task(
        parsed, tiles, q, k, v, d_out, stats, None if slopes is None else slopes.contiguous(),
        per_batch(q_doc, B), per_batch(k_doc, B), q_spans, k_spans,
    )  # fmt: skip
    run_dkdv(task, dk, dv)
    row_slopes = run_dq(task, dq)
    if slopes is not None:
        d_slopes = row_slopes.sum(dim=(0, 2))
    if sinks is not None:
        weight = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks.float()[:, None] - lse))
        d_sinks = (weight * stats[:, :, 1, :T]).sum(dim=(0, 2))
    return dq, dk, dv, d_slopes, d_sinks


@dataclass(frozen=True, slots=True)
class Task:
    """What both kernels need: tensors that TMA can read, `stats` of `statistics`, the spans of tiles."""

    spec: AttentionSpec
    tiles: BackwardTiles
    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    stats: Tensor
    slopes: Tensor | None
    q_doc: Tensor | None
    k_doc: Tensor | None
    q_spans: Tensor | None
    k_spans: Tensor | None

    @property
    def scalars(self) -> tuple[float, ...]:
        """Scale, softcap, and a window's left and right side."""
        window = self.spec.window
        left, right = min(window.left or 0, FURTHEST), min(window.right or 0, FURTHEST)
        return self.spec.softmax_scale(self.q.shape[3]), self.spec.softcap or 1.0, left, right

    @property
    def masks(self) -> tuple[bool, ...]:
        spec, window = self.spec, self.spec.window
        has_right = window.right is not None and not spec.causal
        return spec.causal, window.left is not None, has_right, spec.documents, spec.softcap is not None, spec.alibi

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": 4, "maxnreg": self.tiles.compiled_registers}


def statistics(out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor, multiple: int) -> Tensor:
    """[B, H, 2, T rounded up to a multiple] fp32: lse in units of log 2 and -delta of each row (see `stats_kernel`)."""
    B, T, H, E = out.shape
    if out.stride(3) != 1:
        out = out.contiguous()
    rounded = -(-T // multiple) * multiple
    stats = out.new_empty(B, H, 2, rounded, dtype=torch.float32)
    stats_kernel[(B * H * (rounded // STATS_ROWS),)](
        out, d_out, lse, d_lse, stats, *out.stride()[:3], *d_out.stride()[:3], T, H, E, rounded, padded(E), num_warps=4
    )
    return stats


def run_dkdv(task: Task, dk: Tensor, dv: Tensor) -> None:
    tiles, (B, T, H, D), (S, G), E = task.tiles, task.q.shape, task.k.shape[1:3], task.v.shape[3]
    n_tiles = -(-S // tiles.rows)
    group = heads_at_a_time(B * G, 1, T * (H // G), D + E, BACKWARD_L2_BYTES)
    dkdv_kernel[(n_tiles * B * G,)](
        descriptor(task.q, tiles.queries), descriptor(task.k, ROWS), descriptor(task.v, ROWS),
        descriptor(task.d_out, tiles.queries), _numbers(task.stats, tiles.queries), descriptor(dk, ROWS),
        descriptor(dv, ROWS), task.k_spans, task.q_doc, task.k_doc, task.slopes, T, S, H, G, H // G, *task.scalars,
        n_tiles, B * G, group, task.stats.shape[3],
        tiles.queries, padded(D), padded(E), tiles.query_stages, tiles.registers, *task.masks, **task.options,
    )  # fmt: skip


def run_dq(task: Task, dq: Tensor) -> Tensor:
    """Returns each row's share of the slope's gradient [B, H, T]; empty without ALiBi."""
    tiles, (B, T, H, D), (S, G), E = task.tiles, task.q.shape, task.k.shape[1:3], task.v.shape[3]
    n_tiles = -(-T // tiles.rows)
    group = heads_at_a_time(B * H, H // G, S, D + E, BACKWARD_L2_BYTES)
    row_slopes = dq.new_empty((B, H, T) if task.spec.alibi else 0, dtype=torch.float32)
    dq_kernel[(n_tiles * B * H,)](
        descriptor(task.q, ROWS), descriptor(task.k, tiles.keys), descriptor(task.v, tiles.keys),
        descriptor(task.d_out, ROWS), descriptor(dq, ROWS), task.stats, row_slopes, task.q_spans, task.q_doc,
        task.k_doc, task.slopes, T, S, H, H // G, *task.scalars, n_tiles, B * H, group, task.stats.shape[3],
        tiles.keys, padded(D), padded(E), tiles.key_stages, tiles.registers, *task.masks, **task.options,
    )  # fmt: skip
    return row_slopes


def _numbers(x: Tensor, length: int) -> TensorDescriptor:
    """x as one row of numbers, read in pieces of `length`."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [length], layout)
