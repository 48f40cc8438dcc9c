"""The launch: descriptors of what lies in memory, grid, tiles; `forward` over plain tensors.

Legend: B batch, T queries, S keys, H query heads, G key/value heads, D head dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from ..spec import AttentionSpec
from ..tiles import Pass
from ..triton.launch import dense_of, parse_spec
from .backend import NO_MASKS, tiles_of
from .forward import forward_kernel
from .gathered import NOTHING, gathered
from .order import schedule
from .plan import Launch, Plans, alike, first
from .tiles import ROWS, Tiles, heads_at_a_time, padded

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
FURTHEST = 2**30  # no sum of positions leaves 32 bits; a window as wide as that hides nothing


@dataclass(frozen=True, slots=True)
class _Plan:
    """launch  the kernel; order: who does what, which it reads from memory"""

    launch: Launch
    order: Tensor


_plans: Plans[_Plan] = Plans()
_recorded: dict[int, Tensor] = {}  # orders that a CUDA graph reads whenever it is replayed, by id


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    q_doc: Tensor | None,
    k_doc: Tensor | None,
    spans: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, E] in q's dtype, lse [B, H, T] fp32). Of the documents `spans` [B, tiles of queries, 4]
    (`spans_of_tiles`) are for this pass; `q_spans` and `k_spans` are for the backward pass. `plan.Plan` tells of the
    global tokens and sinks, from `always` on; `outside` is `outside_of_windows`, `always_doc` [B, S] the documents of
    the keys in the order of `always`."""
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
    if spans is not None:
        q_doc, k_doc, spans = (per_batch(x, B) for x in (q_doc, k_doc, spans))
    far = NOTHING
    if always is not None or rows is not None:
        q, k, v = loadable(q), loadable(k), loadable(v)
        keys = gathered(k, v, always, n_always, most_always, outside, always_doc)
        far = far if keys is None else keys.tensors

    key = spec, alike(q, k, v, spans, q_doc, k_doc, slopes, sinks, *far)
    plan = _plans.get(key)
    if plan is not None:
        stream = plan.launch(q, k, v, out, lse, plan.order, spans, q_doc, k_doc, slopes, sinks, *far)
        _keep(plan.order, stream)
    else:
        read = [loadable(x) for x in (q, k, v)]
        if any(x is not y for x, y in zip(read, (q, k, v))):
            documents = (q_doc, k_doc, spans, q_spans, k_spans)
            return forward(*read, slopes, sinks, *documents, *NO_MASKS[len(documents) :], spec)
        parsed = parse_spec(spec)
        tiles = tiles_of(parsed, max(q.shape[3], v.shape[3]))
        programs, order, rest, options = arguments(parsed, tiles, q, k, v, 0 if far[0] is None else far[0].shape[1])
        blocks = (ROWS, tiles.columns, tiles.columns, ROWS)
        descriptors = [descriptor(x, n) for x, n in zip((q, k, v, out), blocks)]
        far_descriptors = (None if x is None else descriptor(x, tiles.columns) for x in far[:2])
        given = (*descriptors, lse, order, spans, q_doc, k_doc, slopes, sinks, *far_descriptors, *far[2:], *rest)
        launch = first(forward_kernel, programs, given, options)
        if launch is not None:
            _plans.put(key, _Plan(launch, order))
        if q.is_cuda:
            _keep(order, driver.active.get_current_stream(q.device.index))
    if rows is not None and n_rows is not None:  # what the kernel wrote there is replaced
        dense, dense_tiles = dense_of(parse_spec(spec), Pass.FORWARD, q, k, v, slopes, q_doc, k_doc)
        rows, n_rows = rows.expand(B, -1).contiguous(), n_rows.expand(B).contiguous()
        dense.global_rows(out, lse, sinks, rows, n_rows, most_rows, dense_tiles)
    return out, lse


def _keep(order: Tensor, stream: int) -> None:
    """Plans are forgotten, and with them their orders, which lie in memory of the default stream (0): who else reads
    them has to be known before."""
    if stream and torch.cuda.is_current_stream_capturing():
        _recorded[id(order)] = order
    elif stream:
        order.record_stream(torch.cuda.current_stream(order.device))


def arguments(
    spec: AttentionSpec, tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, n_far: int = 0
) -> tuple[int, Tensor, tuple[object, ...], dict[str, int]]:
    """(programs, who does what, what the kernel takes after its pointers, compiler options). `n_far`: the most
    keys of a sequence that may be seen from everywhere."""
    (B, T, H, D), (S, G), E = q.shape, k.shape[1:3], v.shape[3]
    window = spec.window
    has_right = window.right is not None and not spec.causal
    n_tiles = -(-T // tiles.rows)
    programs = min(n_tiles * B * H, _processors(q.device))
    group = heads_at_a_time(B * H, H // G, S, D + E)
    far = -(-n_far // tiles.columns)
    order = _order(spec, T, S, B * H, group, programs, tiles.rows, tiles.columns, far, q.device)
    left, right = min(window.left or 0, FURTHEST), min(window.right or 0, FURTHEST)
    scalars = (T, S, H, H // G, spec.softmax_scale(D), spec.softcap or 1.0, left, right, n_tiles, order.shape[1])
    constants = (
        tiles.consumers, tiles.columns, padded(D), padded(E), tiles.slots, tiles.stages, tiles.registers,
        spec.causal, window.left is not None, has_right, spec.documents, spec.softcap is not None,
        spec.alibi, spec.learned_sink, tiles.halves,
    )  # fmt: skip
    options = {"num_warps": 4, "maxnreg": tiles.compiled_registers}
    return programs, order, (*scalars, *constants), options


@lru_cache(maxsize=256)
def _order(
    spec: AttentionSpec, T: int, S: int, n_heads: int, group: int, programs: int, rows: int, columns: int,
    far: int, device: torch.device,
) -> Tensor:  # fmt: skip
    order = torch.from_numpy(schedule(spec, T, S, n_heads, group, programs, rows, columns, far))
    with torch.cuda.stream(torch.cuda.default_stream(device) if device.type == "cuda" else None):
        return order.to(device)


@lru_cache(maxsize=64)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def per_batch(x: Tensor | None, B: int) -> Tensor | None:
    return None if x is None else x.expand(B, *x.shape[1:]).contiguous()


# -- descriptors -------------------------------------------------------------------------------------------------------


def loadable(x: Tensor) -> Tensor:
    """x as TMA can read it: rows of adjacent elements that begin at multiples of 16 bytes. Copies what is otherwise."""
    if x.is_contiguous() and x.shape[3] % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    aligned = all(stride > 0 and stride % 8 == 0 for size, stride in zip(x.shape[:3], x.stride()[:3]) if size > 1)
    if aligned and x.stride(3) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)  # `contiguous` would keep a tensor that is only misplaced


def strides_of(x: Tensor) -> list[int]:
    """Of an axis with one element any stride will do, but TMA looks at it: let it be a row."""
    width = x.shape[3]
    return [stride if size > 1 else width for size, stride in zip(x.shape[:3], x.stride()[:3])] + [1]


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    block = [1, rows, 1, padded(x.shape[3])]
    layout = gl.NVMMASharedLayout.get_default_for(block, _DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), strides_of(x), block, layout)
