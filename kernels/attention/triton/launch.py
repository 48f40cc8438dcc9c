"""Which kernels run for a call, over which grids, with which tiles: `forward` and `backward` over plain tensors.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..ranges import tile_lists
from ..spec import AttentionSpec, BlockLayout, Window
from ..tiles import INTERPRETED as INTERPRETED_TILES
from ..tiles import Pass, Tiles, choose
from .backward import dkdv_kernel, dq_kernel
from .dense_launch import Dense
from .forward import forward_kernel
from .mask import INTERPRETED

# -- the spec, which an operator takes as text -------------------------------------------------------------------------


def spec_text(spec: AttentionSpec) -> str:
    """The spec in one line that `parse_spec` reads; plain string operations, which torch.compile can evaluate."""
    window, layout = spec.window, spec.block_sparse
    fields = [
        spec.causal, window.left, window.right, window.dilation, spec.global_tokens, spec.documents, spec.alibi,
        spec.softcap, spec.sink_tokens, spec.learned_sink, spec.scale, spec.dropout,
    ]  # fmt: skip
    if layout is not None:
        rows = ["".join(["1" if cell else "0" for cell in row]) for row in layout.pattern]
        fields += [layout.q_block, layout.kv_block, *rows]
    return " ".join([str(field) for field in fields])


cached_spec_text = lru_cache(maxsize=1024)(spec_text)


@lru_cache(maxsize=1024)
def parse_spec(text: str) -> AttentionSpec:
    fields = text.split(" ")
    plain, layout = [ast.literal_eval(field) for field in fields[:12]], None
    if len(fields) > 12:
        rows = [[cell == "1" for cell in row] for row in fields[14:]]
        layout = BlockLayout.from_rows(rows, q_block=int(fields[12]), kv_block=int(fields[13]))
    causal, left, right, dilation, globals_, documents, alibi, softcap, sinks, learned, scale, dropout = plain
    return AttentionSpec(
        causal=causal,
        window=Window(left, right, dilation),
        global_tokens=globals_,
        documents=documents,
        alibi=alibi,
        softcap=softcap,
        sink_tokens=sinks,
        learned_sink=learned,
        scale=scale,
        dropout=dropout,
        block_sparse=layout,
    )


# -- what every launch needs -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shape:
    B: int
    T: int
    S: int
    H: int
    G: int
    D: int
    E: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> _Shape:
        return cls(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


@dataclass(frozen=True, slots=True)
class _Walk:
    """How the main kernels walk: window in keys, residue classes of a dilated window, lists of tiles of a layout."""

    spec: AttentionSpec
    explicit: bool
    maskable: bool  # documents or lengths may hide a pair that window, layout and causality show

    @property
    def strided(self) -> bool:
        return self.spec.window.dilation > 1 and not self.explicit and self.spec.block_sparse is None

    @property
    def listed(self) -> bool:
        return self.spec.block_sparse is not None and not self.explicit

    @property
    def has_right(self) -> bool:
        return self.spec.window.right is not None and not self.spec.causal

    def slots(self, n: int, tile: int) -> int:
        """Programs over n rows: of a dilated window, those of every residue class."""
        if not self.strided:
            return triton.cdiv(n, tile)
        classes = self.spec.window.dilation
        return classes * triton.cdiv(triton.cdiv(n, classes), tile)

    def tiles(self, which: Pass, shape: _Shape, element_size: int, device: torch.device) -> Tiles:
        if INTERPRETED:
            return INTERPRETED_TILES
        window = self.spec.window
        keys = (window.left or 0) + (0 if self.spec.causal else window.right or 0)
        windowed = window.left is not None and (self.spec.causal or window.right is not None)
        tiles = choose(
            which,
            max(shape.D, shape.E),
            bytes_per_element=element_size,
            short=self.spec.documents or (windowed and keys <= _SHORT_WINDOW),
            listed=self.listed,
            compact=_shared_memory(device) < _ROOMY,
        )
        layout = self.spec.block_sparse
        if layout is None:
            return tiles
        rows, columns = (layout.kv_block, layout.q_block) if which == Pass.DKDV else (layout.q_block, layout.kv_block)
        return replace(tiles, rows=_within(tiles.rows, rows), columns=_within(tiles.columns, columns))


_SHORT_WINDOW = 1024  # keys
_ROOMY = 160 * 1024  # bytes of shared memory a program, as on data-centre GPUs


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return _ROOMY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _within(tile: int, block: int) -> int:
    """A tile that does not straddle blocks, where blocks are powers of two that a kernel can use."""
    return block if 16 <= block < tile and block & (block - 1) == 0 else tile


@lru_cache(maxsize=64)
def _lists(
    spec: AttentionSpec,
    T: int,
    S: int,
    q_tile: int,
    kv_tile: int,
    by_key: bool,
    may_be_full: bool,
    device: torch.device,
) -> Tensor:
    found = tile_lists(spec, T, S, q_tile, kv_tile, by_key=by_key, may_be_full=may_be_full)
    return torch.from_numpy(found).to(device)


@lru_cache(maxsize=256)
def _pattern(layout: BlockLayout, device: torch.device) -> Tensor:
    return torch.tensor(layout.pattern, dtype=torch.int8, device=device)


def unit_stride(x: Tensor) -> Tensor:
    """With the elements of the last axis side by side, as kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _per_batch(x: Tensor | None, B: int) -> Tensor | None:
    return None if x is None else x.expand(B, *x.shape[1:]).contiguous()


def _static(spec: AttentionSpec, shape: _Shape) -> dict[str, object]:
    return {
        "R": shape.H // shape.G,
        "D": shape.D,
        "E": shape.E,
        # At least 32: ptxas 12.8 crashes on some kernels for sm_90 whose accumulator is 16 wide.
        "BLOCK_D": max(32, triton.next_power_of_2(shape.D)),
        "BLOCK_E": max(32, triton.next_power_of_2(shape.E)),
        "CAUSAL": spec.causal,
        "SOFTCAP": spec.softcap is not None,
        "ALIBI": spec.alibi,
        "DROPOUT": spec.dropout > 0,
    }


def _walking(walk: _Walk) -> dict[str, object]:
    window = walk.spec.window
    return {
        "HAS_LEFT": window.left is not None,
        "HAS_RIGHT": walk.has_right,
        "STRIDED": walk.strided,
        "MODULO": window.dilation > 1 and not walk.strided,
    }


def _scalars(spec: AttentionSpec, shape: _Shape) -> tuple[float, float, float]:
    return spec.softmax_scale(shape.D), spec.softcap or 1.0, spec.dropout


def _window(walk: _Walk, lists: Tensor | None) -> tuple[int, int, int, int, int, int, int, int]:
    window, layout = walk.spec.window, walk.spec.block_sparse
    blocks = (1, 1, 1, 1)
    if layout is not None:
        blocks = layout.q_block, layout.kv_block, len(layout.pattern), len(layout.pattern[0])
    width = 0 if lists is None else lists.shape[1]
    # Clamped, so that no sum of positions leaves 32 bits: a window as wide as that hides nothing.
    widest = 2**30 // window.dilation
    left, right = min(window.left or 0, widest), min(window.right or 0, widest)
    return left, right, window.dilation, *blocks, width


def dense_of(
    spec: AttentionSpec, which: Pass, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, q_doc: Tensor | None,
    k_doc: Tensor | None,
) -> tuple[Dense, Tiles]:  # fmt: skip
    """What of a call without dropout, explicit positions and lengths is dense in one direction, for another backend's
    kernels; and the tiles that one pass over it takes here."""
    shape = _Shape.of(q, k, v)
    walk = _Walk(spec, explicit=False, maskable=q_doc is not None)
    given = (slopes, None, None, None, q_doc, k_doc, None)
    dense = Dense(q, k, v, *given, _scalars(spec, shape), _static(spec, shape))
    return dense, walk.tiles(which, shape, q.element_size(), q.device)


# -- forward -----------------------------------------------------------------------------------------------------------


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    q_doc: Tensor | None,
    k_doc: Tensor | None,
    q_span: Tensor | None,
    k_span: Tensor | None,
    lengths: Tensor | None,
    always: Tensor | None,
    n_always: Tensor | None,
    is_global: Tensor | None,
    rows: Tensor | None,
    n_rows: Tensor | None,
    most_always: int,
    most_rows: int,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, E] in q's dtype, lse [B, H, T] fp32), as `spec` (from `spec_text`) and a `plan.Plan` say."""
    parsed = parse_spec(spec)
    shape = _Shape.of(q, k, v)
    B, T, S, H, E = shape.B, shape.T, shape.S, shape.H, shape.E
    walk = _Walk(parsed, explicit=q_pos is not None, maskable=q_doc is not None or lengths is not None)
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    slopes, sinks = _contiguous(slopes), _contiguous(sinks)
    q_pos, k_pos, q_doc, k_doc = (_per_batch(x, B) for x in (q_pos, k_pos, q_doc, k_doc))
    q_span, is_global, always, n_always, rows, n_rows = (
        _per_batch(x, B) for x in (q_span, is_global, always, n_always, rows, n_rows)
    )
    out = q.new_empty(B, T, H, E)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tiles = walk.tiles(Pass.FORWARD, shape, q.element_size(), q.device)
    lists = None
    if walk.listed:
        lists = _lists(parsed, T, S, tiles.rows, tiles.columns, False, not walk.maskable, q.device)
    layout = None if parsed.block_sparse is None else _pattern(parsed.block_sparse, q.device)
    scalars, static = _scalars(parsed, shape), _static(parsed, shape)
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    forward_kernel[walk.slots(T, tiles.rows), H, B](
        q, k, v, out, lse, slopes, sinks, seed, q_pos, k_pos, q_doc, k_doc, q_span, lengths, layout, lists, always,
        n_always, is_global, *strides, *out.stride()[:3], T, S, H, *scalars, *_window(walk, lists),
        M=tiles.rows, N=tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages, **static, **_walking(walk),
    )  # fmt: skip
    if rows is not None and n_rows is not None:
        dense = Dense(q, k, v, slopes, seed, q_pos, k_pos, q_doc, k_doc, lengths, scalars, static)
        dense.global_rows(out, lse, sinks, rows, n_rows, most_rows, tiles)
    return out, lse


# -- backward ----------------------------------------------------------------------------------------------------------


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
    seed: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    q_doc: Tensor | None,
    k_doc: Tensor | None,
    q_span: Tensor | None,
    k_span: Tensor | None,
    lengths: Tensor | None,
    always: Tensor | None,
    n_always: Tensor | None,
    is_global: Tensor | None,
    rows: Tensor | None,
    n_rows: Tensor | None,
    most_always: int,
    most_rows: int,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, slopes [H] and sinks [H] (fp32; empty where there are none)."""
    parsed = parse_spec(spec)
    shape = _Shape.of(q, k, v)
    B, T, S, H, G, D, E = shape.B, shape.T, shape.S, shape.H, shape.G, shape.D, shape.E
    walk = _Walk(parsed, explicit=q_pos is not None, maskable=q_doc is not None or lengths is not None)
    q, k, v, d_out = unit_stride(q), unit_stride(k), unit_stride(v), unit_stride(d_out)
    d_lse, slopes, sinks = d_lse.contiguous(), _contiguous(slopes), _contiguous(sinks)
    q_pos, k_pos, q_doc, k_doc = (_per_batch(x, B) for x in (q_pos, k_pos, q_doc, k_doc))
    q_span, k_span, is_global = (_per_batch(x, B) for x in (q_span, k_span, is_global))
    always, n_always, rows, n_rows = (_per_batch(x, B) for x in (always, n_always, rows, n_rows))
    dq, dk, dv = q.new_empty(B, T, H, D), k.new_empty(B, S, G, D), v.new_empty(B, S, G, E)
    delta = q.new_empty(B, H, T, dtype=torch.float32)
    # One number for each row; the rows of global queries are counted apart.
    row_slopes = q.new_zeros(B, H, T, dtype=torch.float32) if parsed.alibi else q.new_empty(0, dtype=torch.float32)
    layout = None if parsed.block_sparse is None else _pattern(parsed.block_sparse, q.device)
    scalars, static = _scalars(parsed, shape), _static(parsed, shape)
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    may_be_full = not walk.maskable
    dense = Dense(q, k, v, slopes, seed, q_pos, k_pos, q_doc, k_doc, lengths, scalars, static)
    global_slopes = None

    if q.numel():
        tiles = walk.tiles(Pass.DQ, shape, q.element_size(), q.device)
        lists = None
        if walk.listed:
            lists = _lists(parsed, T, S, tiles.rows, tiles.columns, False, may_be_full, q.device)
        dq_kernel[walk.slots(T, tiles.rows), H, B](
            q, k, v, out, d_out, lse, d_lse, delta, dq, row_slopes, slopes, seed, q_pos, k_pos, q_doc, k_doc, q_span,
            lengths, layout, lists, always, n_always, is_global, *strides, *out.stride()[:3], *d_out.stride()[:3],
            *dq.stride()[:3], T, S, H, *scalars, *_window(walk, lists),
            M=tiles.rows, N=tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages, **static, **_walking(walk),
        )  # fmt: skip
    if rows is not None and n_rows is not None:
        tiles = walk.tiles(Pass.DQ, shape, q.element_size(), q.device)
        global_slopes = dense.global_rows_dq(d_out, lse, delta, dq, rows, n_rows, most_rows, tiles)

    tiles = walk.tiles(Pass.DKDV, shape, q.element_size(), q.device)
    if k.numel() or v.numel():
        lists = None
        if walk.listed:
            lists = _lists(parsed, T, S, tiles.columns, tiles.rows, True, may_be_full, q.device)
        ordinary = lse if is_global is None else lse.masked_fill(is_global[:, None] != 0, torch.inf)
        dkdv_kernel[walk.slots(S, tiles.rows), G, B](
            q, k, v, d_out, ordinary, delta, dk, dv, slopes, seed, q_pos, k_pos, q_doc, k_doc, k_span, lengths, layout,
            lists, rows, n_rows, lse, *strides, *d_out.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], T, S, H,
            *scalars, *_window(walk, lists),
            M=tiles.columns, N=tiles.rows, num_warps=tiles.warps, num_stages=tiles.stages, **static, **_walking(walk),
        )  # fmt: skip
    if always is not None and n_always is not None and q.numel():
        dense.always_keys_dkdv(d_out, lse, delta, dk, dv, always, n_always, most_always, tiles)

    d_slopes, d_sinks = q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)
    if slopes is not None:
        d_slopes = row_slopes.sum(dim=(0, 2)) + (0 if global_slopes is None else global_slopes)
    if sinks is not None:
        weight = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks.float()[:, None] - lse))
        d_sinks = -(weight * delta).sum(dim=(0, 2))
    return dq, dk, dv, d_slopes, d_sinks
