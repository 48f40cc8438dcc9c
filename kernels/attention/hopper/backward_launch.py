"""The launches of the backward pass, over plain tensors.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..spec import AttentionSpec
from ..tiles import Pass
from ..triton.launch import dense_of, parse_spec
from .backward import STATS_ROWS, stats_kernel
from .backward_dkdv import dkdv_kernel
from .backward_dq import dq_kernel
from .backward_squares import LINES, round_kernel
from .gathered import NOTHING, Gathered, gathered, statistics_of_rows
from .launch import FURTHEST, descriptor, loadable, per_batch
from .plan import Launch, Plans, alike, first
from .tiles import BACKWARD_L2_BYTES, ROWS, BackwardTiles, adds_dq, choose_backward, heads_at_a_time, padded


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    q_doc: Tensor | None,
    k_doc: Tensor | None,
    q_spans: Tensor | None,
    k_spans: Tensor | None,
    always: Tensor | None,
    n_always: Tensor | None,
    outside: Tensor | None,
    always_doc: Tensor | None,
    is_global: Tensor | None,
    rows: Tensor | None,
    n_rows: Tensor | None,
    seen_from: Tensor | None,
    row_doc: Tensor | None,
    most_always: int,
    most_rows: int,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, slopes [H] and sinks [H] (fp32; empty where there are none). The spans are those of tiles
    of `BackwardTiles.rows` queries and keys (`spans_of_tiles`); d_lse None: the lse was not used."""
    (B, T, H, D), (S, G), E = q.shape, k.shape[1:3], v.shape[3]
    dq, dk, dv = q.new_empty(B, T, H, D), k.new_empty(B, S, G, D), v.new_empty(B, S, G, E)
    d_slopes = q.new_empty(0 if slopes is None else H, dtype=torch.float32)
    d_sinks = q.new_empty(0 if sinks is None else H, dtype=torch.float32)
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), d_slopes.zero_(), d_sinks.zero_()
    q, k, v, d_out = loadable(q), loadable(k), loadable(v), loadable(d_out)
    out = out if out.stride(3) == 1 else out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    if q_doc is not None:
        q_doc, k_doc, q_spans, k_spans = (per_batch(x, B) for x in (q_doc, k_doc, q_spans, k_spans))
    stats = q.new_empty(B, H, 2, -(-T // BackwardTiles.rows) * BackwardTiles.rows, dtype=torch.float32)
    row_slopes = None
    if slopes is not None:
        slopes, row_slopes = slopes.contiguous(), q.new_empty(B, H, T, dtype=torch.float32)

    # The kernels leave global rows out, whose lse they do not learn, and dense ones add them afterwards; but the keys'
    # gradients take them from where they lie gathered.
    ordinary = lse if is_global is None else lse.masked_fill(is_global[:, None] != 0, -torch.inf)
    far_keys = gathered(k, v, always, n_always, most_always, outside, always_doc)
    far_rows = gathered(q, d_out, rows, n_rows, most_rows, seen_from, row_doc)
    beside_keys = NOTHING if far_keys is None else far_keys.tensors
    beside_rows = NOTHING if far_rows is None else far_rows.tensors

    parsed = parse_spec(spec)
    factor = lse_factor(parsed, D)
    fused = adds_dq(parsed, T, S, D, E) and not torch.are_deterministic_algorithms_enabled()
    curved = parsed.alibi or parsed.softcap is not None
    tiles = choose_backward(max(D, E), curved=curved, documents=parsed.documents or far_keys is not None)
    sums = squares_for(q, tiles) if fused else None
    masks = (q_doc, k_doc, q_spans, k_spans, *beside_keys, *beside_rows)
    key = spec, alike(q, k, v, d_out, out, lse, d_lse, sums, slopes, *masks)
    plan = _plans.get(key)
    if plan is not None:
        plan.statistics(out, d_out, ordinary, d_lse, stats)
        far_q, far_do, *far_index = beside_rows
        far = (far_q, far_do, _row_stats(stats, lse, far_rows, factor), *far_index)
        plan.dkdv(q, k, v, d_out, stats, dk, dv, sums, k_spans, q_doc, k_doc, slopes, *far)
        if sums is not None:
            plan.dq(sums, dq)
        else:
            plan.dq(q, k, v, d_out, dq, stats, row_slopes, q_spans, q_doc, k_doc, slopes, *beside_keys)
    else:
        task = Task(parsed, tiles, q, k, v, d_out, stats, slopes, q_doc, k_doc, q_spans, k_spans, far_keys, far_rows)
        statistics = task.statistics(out, ordinary, d_lse)
        dkdv = task.dkdv(dk, dv, sums, _row_stats(stats, lse, far_rows, factor))
        dq_launch = task.dq(dq, row_slopes) if sums is None else task.round(sums, dq)
        if statistics is not None and dkdv is not None and dq_launch is not None:
            _plans.put(key, _Plan(statistics, dkdv, dq_launch))
    if row_slopes is not None:
        d_slopes = row_slopes.sum(dim=(0, 2))
    if far_keys is not None or far_rows is not None:
        delta = stats[:, :, 1, :T].neg().contiguous()
        if far_rows is not None:
            dense, tiles = dense_of(parsed, Pass.DQ, q, k, v, slopes, q_doc, k_doc)
            more = dense.global_rows_dq(d_out, lse, delta, dq, far_rows.index, far_rows.count, most_rows, tiles)
            d_slopes = d_slopes if more is None else d_slopes + more
        if far_keys is not None:
            dense, tiles = dense_of(parsed, Pass.DKDV, q, k, v, slopes, q_doc, k_doc)
            index, count = far_keys.index, far_keys.count
            dense.always_keys_dkdv(d_out, lse, delta, dk, dv, index, count, most_always, tiles)
    if sinks is not None:
        weight = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks.float()[:, None] - lse))
        d_sinks = (weight * stats[:, :, 1, :T]).sum(dim=(0, 2))
    return dq, dk, dv, d_slopes, d_sinks


def lse_factor(spec: AttentionSpec, head_dim: int) -> float:
    """From the lse to what the kernels add to scores instead of subtracting it from them: in the unit of the products
    or, where softcap or ALiBi change them, of log 2."""
    if spec.alibi or spec.softcap is not None:
        return -1.0 / math.log(2)
    return -1.0 / spec.softmax_scale(head_dim)


def _row_stats(stats: Tensor, lse: Tensor, rows: Gathered | None, factor: float) -> Tensor | None:
    return None if rows is None else statistics_of_rows(stats, lse, rows, factor, BackwardTiles.rows)


@dataclass(frozen=True, slots=True)
class _Plan:
    """dq: of `dq_kernel` or, where the kernel of dk and dv has added it up, of `round_kernel`."""

    statistics: Launch
    dkdv: Launch
    dq: Launch


_plans: Plans[_Plan] = Plans()


@dataclass(frozen=True, slots=True)
class Task:
    """The first launches of the kernels, over tensors that TMA can read. `stats` [B, H, 2, T rounded up to tiles] fp32
    is written by `statistics` (see `stats_kernel`) and read by the others; spans are those of tiles. `far_keys`: keys
    and values that may be seen from everywhere; `far_rows`: queries that may see everything, and their d_out."""

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
    far_keys: Gathered | None = None
    far_rows: Gathered | None = None

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

    def statistics(self, out: Tensor, lse: Tensor, d_lse: Tensor | None) -> Launch | None:
        (B, T, H, E), rounded = out.shape, self.stats.shape[3]
        factor = lse_factor(self.spec, self.q.shape[3])
        given = (
            out, self.d_out, lse, d_lse, self.stats, factor, *out.stride()[:3], *self.d_out.stride()[:3], T, H, E,
            rounded, padded(E),
        )  # fmt: skip
        return first(stats_kernel, B * H * (rounded // STATS_ROWS.value), given, {"num_warps": 4})

    def dkdv(self, dk: Tensor, dv: Tensor, sums: Tensor | None, row_stats: Tensor | None = None) -> Launch | None:
        """`sums`: `squares_for` q, where unscaled gradients of q are to be added up. `row_stats`: `statistics_of_rows`
        where there are `far_rows`."""
        tiles, (B, T, H, D), (S, G), E = self.tiles, self.q.shape, self.k.shape[1:3], self.v.shape[3]
        n_tiles = -(-S // (tiles.owners * ROWS))
        group = heads_at_a_time(B * G, 1, T * (H // G), D + E, BACKWARD_L2_BYTES)
        far, rows = (*NOTHING, None), self.far_rows
        if rows is not None and row_stats is not None:
            tensors = (*(descriptor(x, tiles.queries) for x in (rows.x, rows.y)), _numbers(row_stats, tiles.queries))
            far = (*tensors, rows.index, rows.count, *rows.more)
        given = (
            descriptor(self.q, tiles.queries), descriptor(self.k, ROWS), descriptor(self.v, ROWS),
            descriptor(self.d_out, tiles.queries), _numbers(self.stats, tiles.queries), descriptor(dk, ROWS),
            descriptor(dv, ROWS), None if sums is None else _lines(sums), self.k_spans, self.q_doc, self.k_doc,
            self.slopes, *far, T, S, H, G, H // G, *self.scalars, n_tiles, B * G, group, self.stats.shape[3],
            0 if row_stats is None else row_stats.shape[3],
            tiles.queries, padded(D), padded(E), tiles.query_stages, tiles.owners, tiles.registers, *self.masks,
            sums is not None,
        )  # fmt: skip
        return first(dkdv_kernel, n_tiles * B * G, given, self.options)

    def round(self, sums: Tensor, dq: Tensor) -> Launch | None:
        """dq of the sums that `dkdv` has added up."""
        (T, H, D), rows = dq.shape[1:], self.tiles.queries
        given = sums, dq, self.spec.softmax_scale(D), *dq.stride()[:3], T, H, D, -(-T // rows), rows == ROWS
        return first(round_kernel, sums.shape[0] // LINES.value, given, {"num_warps": 4})

    def dq(self, dq: Tensor, row_slopes: Tensor | None) -> Launch | None:
        """With ALiBi also each row's share of the slope's gradient [B, H, T]."""
        tiles, (B, T, H, D), (S, G), E = self.tiles, self.q.shape, self.k.shape[1:3], self.v.shape[3]
        n_tiles = -(-T // tiles.rows)
        group = heads_at_a_time(B * H, H // G, S, D + E, BACKWARD_L2_BYTES)
        far, keys = NOTHING, self.far_keys
        if keys is not None:
            far = (*(descriptor(x, tiles.keys) for x in (keys.x, keys.y)), keys.index, keys.count, *keys.more)
        given = (
            descriptor(self.q, ROWS), descriptor(self.k, tiles.keys), descriptor(self.v, tiles.keys),
            descriptor(self.d_out, ROWS), descriptor(dq, ROWS), self.stats, row_slopes, self.q_spans, self.q_doc,
            self.k_doc, self.slopes, *far, T, S, H, H // G, *self.scalars, n_tiles, B * H, group, self.stats.shape[3],
            tiles.keys, padded(D), padded(E), tiles.key_stages, tiles.registers, *self.masks,
        )  # fmt: skip
        return first(dq_kernel, n_tiles * B * H, given, self.options)


def squares_for(q: Tensor, tiles: BackwardTiles) -> Tensor:
    """Zeros for the sums of q's gradients: `backward_squares.py` says how they lie."""
    B, T, H, D = q.shape
    squares = B * H * -(-T // tiles.queries) * (tiles.queries * padded(D) // ROWS**2)
    return q.new_zeros(squares * LINES.value, ROWS**2 // LINES.value, dtype=torch.float32)


def _lines(x: Tensor) -> TensorDescriptor:
    """The lines of a square at a time."""
    block = [LINES.value, x.shape[1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float32)
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], block, layout)


def _numbers(x: Tensor, length: int) -> TensorDescriptor:
    """x as one row of numbers, read in pieces of `length`."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return TensorDescriptor(x, [x.numel()], [1], [length], layout)
