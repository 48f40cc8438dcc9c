"""The launch: descriptors of what lies in memory, grid, tiles; `forward` over plain tensors.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..spec import AttentionSpec
from ..triton.launch import parse_spec
from .backend import tiles_of
from .forward import forward_kernel
from .order import schedule
from .tiles import ROWS, Tiles, heads_at_a_time, padded

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_LAUNCHES_LIMIT = 4096
FURTHEST = 2**30  # no sum of positions leaves 32 bits; a window as wide as that hides nothing


@dataclass(frozen=True, slots=True)
class _Launch:
    """What calls with the same shapes, strides and spec have in common.

    run      launches the compiled kernel
    order    who does what; rest: what the kernel takes after its pointers
    layouts  (shape, strides) of q, k, v and the output
    """

    run: Callable[..., object]
    order: Tensor
    rest: tuple[object, ...]
    layouts: tuple[tuple[tuple[int, ...], list[int]], ...]


_launches: dict[tuple[object, ...], _Launch] = {}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    q_doc: Tensor | None,
    k_doc: Tensor | None,
    q_span: Tensor | None,
    k_span: Tensor | None,
    tile_span: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, E] in q's dtype, lse [B, H, T] fp32). The spans of rows and keys are the backward pass's;
    `tile_span` [B, tiles of queries, 4] is what this pass reads of the documents."""
    B, T, H, _ = q.shape
    out = q.new_empty(B, T, H, v.shape[3])
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if slopes is not None:
        slopes = slopes.contiguous()
    if sinks is not None:
        sinks = sinks.contiguous()
    if tile_span is not None:
        q_doc, k_doc, tile_span = (per_batch(x, B) for x in (q_doc, k_doc, tile_span))

    key = (
        spec, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, q.device.index,
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16,
        *(None if x is None else (x.dtype, x.data_ptr() % 16) for x in (tile_span, q_doc, k_doc, slopes, sinks)),
    )  # fmt: skip
    known = _launches.get(key)
    if known is not None:
        views = [Rows(x, *layout) for x, layout in zip((q, k, v, out), known.layouts)]
        known.run(*views, lse, known.order, tile_span, q_doc, k_doc, slopes, sinks, *known.rest)
        return out, lse

    read = [loadable(x) for x in (q, k, v)]
    if any(x is not y for x, y in zip(read, (q, k, v))):
        return forward(*read, slopes, sinks, q_doc, k_doc, q_span, k_span, tile_span, spec)
    parsed = parse_spec(spec)
    tiles = tiles_of(parsed, max(q.shape[3], v.shape[3]))
    programs, order, rest, options = arguments(parsed, tiles, q, k, v)
    rows = (ROWS, tiles.columns, tiles.columns, ROWS)
    descriptors = [descriptor(x, n) for x, n in zip((q, k, v, out), rows)]
    compiled = forward_kernel[(programs,)](
        *descriptors, lse, order, tile_span, q_doc, k_doc, slopes, sinks, *rest, **options
    )
    if compiled is not None:  # None: somebody only wanted to see what would be compiled
        if len(_launches) >= _LAUNCHES_LIMIT:
            _launches.clear()
        layouts = tuple((tuple(x.shape), strides_of(x)) for x in (q, k, v, out))
        _launches[key] = _Launch(compiled[(programs, 1, 1)], order, rest, layouts)
    return out, lse


def arguments(
    spec: AttentionSpec, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor
) -> tuple[int, Tensor, tuple[object, ...], dict[str, int]]:
    """(programs, who does what, what the kernel takes after its pointers, compiler options)."""
    (B, T, H, D), (S, G), E = q.shape, k.shape[1:3], v.shape[3]
    window = spec.window
    has_right = window.right is not None and not spec.causal
    n_tiles = -(-T // tiles.rows)
    programs = min(n_tiles * B * H, _processors(q.device))
    group = heads_at_a_time(B * H, H // G, S, D + E)
    order = _order(spec, T, S, B * H, group, programs, tiles.rows, tiles.columns, q.device)
    left, right = min(window.left or 0, FURTHEST), min(window.right or 0, FURTHEST)
    scalars = (T, S, H, H // G, spec.softmax_scale(D), spec.softcap or 1.0, left, right, n_tiles, order.shape[1])
    constants = (
        tiles.consumers, tiles.columns, padded(D), padded(E), tiles.stages, tiles.turns, tiles.registers,
        spec.causal, window.left is not None, has_right, spec.documents, spec.softcap is not None, spec.alibi,
        spec.learned_sink,
    )  # fmt: skip
    options = {"num_warps": 4, "maxnreg": tiles.compiled_registers}
    return programs, order, (*scalars, *constants), options


@lru_cache(maxsize=256)
def _order(
    spec: AttentionSpec, T: int, S: int, n_heads: int, group: int, programs: int, rows: int, columns: int,
    device: torch.device,
) -> Tensor:  # fmt: skip
    return torch.from_numpy(schedule(spec, T, S, n_heads, group, programs, rows, columns)).to(device)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def per_batch(x: Tensor | None, B: int) -> Tensor | None:
    return None if x is None else x.expand(B, *x.shape[1:]).contiguous()


# -- descriptors -------------------------------------------------------------------------------------------------------


def loadable(x: Tensor) -> Tensor:
    """x as TMA can read it: rows of adjacent elements that begin at multiples of 16 bytes. Copies what is otherwise."""
    aligned = all(stride > 0 and stride % 8 == 0 for size, stride in zip(x.shape[:3], x.stride()[:3]) if size > 1)
    if aligned and x.stride(3) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # `contiguous` would keep a tensor that is only misplaced


def strides_of(x: Tensor) -> list[int]:
    """Of an axis with one element any stride will do, but TMA looks at it: let it be a row."""
    width = x.shape[3]
    return [stride if size > 1 else width for size, stride in zip(x.shape[:3], x.stride()[:3])] + [1]


class Rows:
    """What a compiled kernel's launcher reads of a descriptor. Its own class checks and copies, at several times the
    cost."""

    __slots__ = ("base", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, x: Tensor, shape: Sequence[int], strides: Sequence[int]) -> None:
        self.base = x
        self.shape = shape
        self.strides = strides


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    block = [1, rows, 1, padded(x.shape[3])]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), strides_of(x), block, layout)
