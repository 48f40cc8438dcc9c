"""The tensors that a case stands for: q, k, v inside poisoned buffers, the context, the params, the gradients.

Legend: B batch, T queries, S keys, N either, H query heads, G key/value heads, D head dim of q and k, E of v.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention.backend import AttentionParams
from ..attention.context import AttentionContext
from ..attention.quantize import quantize
from .cases import OFFSET, Case, Memory, Positions

GUARD = 64  # elements of poison on either side of a tensor: 128 bytes of bf16, the alignment that kernels hope for


@dataclass(slots=True)
class Guarded:
    """A view into a larger buffer whose other elements are NaN, and what the buffer held at first."""

    view: Tensor
    buffer: Tensor
    before: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.buffer.clone()

    def touched(self) -> bool:
        return not torch.equal(self.buffer.view(torch.uint8), self.before.view(torch.uint8))


@dataclass(slots=True, kw_only=True)
class Inputs:
    """What a case means, on the device under test. q, k, v in the case's dtype (k, v as they are stored); the upstream
    gradients in fp64."""

    case: Case
    q: Guarded
    k: Guarded
    v: Guarded
    context: AttentionContext
    params: AttentionParams
    grad_out: Tensor  # [B, T, H, E]
    grad_lse: Tensor  # [B, H, T]

    @property
    def device(self) -> str:
        return self.q.view.device.type


def materialise(case: Case, device: str) -> Inputs:
    """The tensors of `case`, the same on every device and whatever was drawn before."""
    random = torch.Generator().manual_seed(case.seed)
    context = _context(case, random)
    q, k, v = _values(case, random)
    grad_out = torch.randn(case.batch, case.n_queries, case.heads, case.value_dim, generator=random).double()
    grad_lse = torch.randn(case.batch, case.heads, case.n_queries, generator=random).double()
    params = _params(case, random, device)
    memory_of_keys = case.memory
    if case.page is not None:
        k, v, context.page_table = _paged(case, context, k, v, random)
        memory_of_keys = "contiguous" if case.memory == "expanded" else case.memory
    else:
        poison_empty_slots(context, k, v)
    if case.stored is None:
        k, v = k.to(case.dtype), v.to(case.dtype)
    else:  # where k and v are poison, so are scales
        (k, k_scale), (v, v_scale) = (_stored(case, x, device) for x in (k, v))
        params = dataclasses.replace(params, k_scale_BSG=k_scale, v_scale_BSG=v_scale)
    return Inputs(
        case=case,
        q=guard(q.to(case.dtype), case.memory, device),
        k=guard(k, memory_of_keys, device),
        v=guard(v, memory_of_keys, device),
        context=_amid_other_rows(context, device),
        params=params,
        grad_out=grad_out.to(device),
        grad_lse=grad_lse.to(device),
    )


def poison_empty_slots(context: AttentionContext, *tensors_BSGD: Tensor) -> None:
    """NaN and infinity, in turns, where no key is: it must not reach any result."""
    exists_BS = context.existing_keys(tensors_BSGD[0].shape[1])
    if exists_BS is None:
        return
    for tensor in tensors_BSGD:
        tensor[~exists_BS.expand(tensor.shape[:2])] = torch.nan
        tensor[:, ::2][~exists_BS.expand(tensor.shape[:2])[:, ::2]] = torch.inf


# -- q, k, v -----------------------------------------------------------------------------------------------------------


def _values(case: Case, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    B, T, S, H, G = case.batch, case.n_queries, case.n_keys, case.heads, case.kv_heads
    tensors = [draw(B, T, H, case.head_dim), draw(B, S, G, case.head_dim), draw(B, S, G, case.value_dim)]
    if case.values == "outliers":
        tensors = [x + 10 * draw(*x.shape) * (torch.rand(x.shape, generator=random) < 0.01) for x in tensors]
    elif case.values == "huge scores":
        # Small integers beside one coordinate of ±100: scores of ±10,000 that every float format adds up exactly, so
        # that what is judged is the softmax and not the rounding of its input.
        for x in tensors[:2]:
            x.copy_(x.round().clamp(-1, 1))
            x[..., 0] = torch.where(draw(*x.shape[:-1]) < 0, -100.0, 100.0)
    if case.memory == "expanded":
        tensors = [x[:1].expand_as(x).clone() for x in tensors]
    q, k, v = tensors
    return q, k, v


def guard(values: Tensor, memory: Memory, device: str) -> Guarded:
    """`values` [B, N, heads, dim] laid out as `memory` says, NaN everywhere else in the buffer."""
    N, heads, dim = values.shape[1:]
    start = GUARD + (memory == "misaligned")
    if memory == "transposed":
        strides = (heads * N * dim, dim, N * dim, 1)
    elif memory == "gaps":
        strides = ((N + 1) * (heads + 1) * (dim + 8), (heads + 1) * (dim + 8), dim + 8, 1)
    elif memory == "inner stride":
        strides = (N * heads * dim * 2, heads * dim * 2, dim * 2, 2)
    elif memory == "expanded":
        strides = (0, heads * dim, dim, 1)
    else:
        strides = (N * heads * dim, heads * dim, dim, 1)
    reach = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides))
    poison = torch.nan if values.dtype.is_floating_point else 77
    buffer = torch.full((start + reach + GUARD,), poison, dtype=values.dtype)
    source = values[:1] if memory == "expanded" else values
    buffer.as_strided(source.shape, strides, start).copy_(source)
    buffer = buffer.to(device)
    return Guarded(buffer.as_strided(values.shape, strides, start), buffer)


def _paged(
    case: Case, context: AttentionContext, k: Tensor, v: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """k and v as pools of pages in random order, poison in pages and slots that nobody uses, and the page table."""
    page = case.page or 1
    pages = case.n_keys // page
    order = torch.randperm(case.batch * pages + 2, generator=random)
    table = order[: case.batch * pages].view(case.batch, pages)
    poison_empty_slots(context, k, v)
    pools = []
    for rows in (k, v):
        pool = torch.full((len(order), page, *rows.shape[2:]), torch.nan, dtype=rows.dtype)
        pool[table.flatten()] = rows.reshape(-1, page, *rows.shape[2:])
        pools.append(pool)
    if context.kv_lengths is not None:  # entries of pages that hold no key may be anything
        unused = torch.arange(pages)[None] * page >= context.kv_lengths[:, None]
        table = torch.where(unused, -9, table)
    return pools[0], pools[1], table


def _stored(case: Case, values: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """(`values` in eight bits, their scales amid poison on `device`)."""
    stored, scale = quantize(values, case.stored or torch.int8)
    scale = scale.half() if case.seed % 2 else scale
    amid = torch.full((*scale.shape[:2], scale.shape[2] + 2), torch.nan, dtype=scale.dtype)
    amid[:, :, 1:-1] = scale
    return stored, amid.to(device)[:, :, 1:-1]


# -- the context -------------------------------------------------------------------------------------------------------


def _context(case: Case, random: torch.Generator) -> AttentionContext:
    B, S = case.batch, case.n_keys
    rows = 1 if case.shared else B
    q_pos, kv_pos = positions(case.positions, rows, case.n_queries, S)
    context = AttentionContext()
    if case.positions != "none":
        context.q_positions = q_pos
    if case.positions not in ("none", "chunk"):
        context.kv_positions = kv_pos
    if case.spec.documents:
        low = int(torch.cat([q_pos.flatten(), kv_pos.flatten()]).min())
        span = reach(case.positions, case.n_queries, S) - low
        ids = torch.tensor([5, 2, 2 + 2**32, 9])
        if case.scattered:
            document_of = ids[torch.randint(len(ids), (rows, span), generator=random)]
        else:
            ends = torch.randint(1, span + 1, (rows, 3), generator=random).sort(dim=1).values
            document_of = ids[(torch.arange(span)[None, :, None] >= ends[:, None, :]).sum(dim=-1)]
        context.q_documents = document_of.gather(1, q_pos.expand(rows, -1) - low)
        if case.n_queries != S or case.positions == "chunk" or case.seed % 2:  # one set of ids may serve both
            context.kv_documents = document_of.gather(1, kv_pos.expand(rows, -1) - low)
    if case.spec.global_tokens:
        context.is_global = torch.rand(rows, S, generator=random) < 0.1
        context.is_global[:, S // 3] = True
    if case.kv_lengths != "none":
        context.kv_lengths = torch.tensor([S - (b + (B == 1)) * S // (2 * B) for b in range(B)])
        if case.kv_lengths == "a row without keys":
            context.kv_lengths[-1] = 0
    return context


def positions(kind: Positions, rows: int, n_queries: int, n_keys: int) -> tuple[Tensor, Tensor]:
    """[rows, T] and [rows, S] absolute positions of queries and keys; negative ones of keys are empty slots."""
    q_pos = torch.arange(n_keys - n_queries, n_keys).repeat(rows, 1)
    kv_pos = torch.arange(n_keys).repeat(rows, 1)
    if kind == "offset":
        q_pos, kv_pos = q_pos + OFFSET, kv_pos + OFFSET
    elif kind == "chunk":
        q_pos = q_pos - (n_keys - n_queries + 1) // 2
    elif kind == "left padding":
        padding = torch.arange(rows)[:, None] * (n_keys // 4) + min(1, n_keys - 1)
        q_pos, kv_pos = q_pos - padding, kv_pos - padding
    elif kind == "ring":
        kv_pos = kv_pos.roll(n_keys // 3, dims=1)
        kv_pos[:, n_keys // 2 :: 5] = -1
    return q_pos, kv_pos


def reach(kind: Positions, n_queries: int, n_keys: int) -> int:
    """One more than the largest position that any query or key has: what a block layout must cover."""
    q_pos, kv_pos = positions(kind, 1, n_queries, n_keys)
    return 1 + max(int(q_pos.max()), int(kv_pos.max()))


def _amid_other_rows(context: AttentionContext, device: str) -> AttentionContext:
    """The same tensors as slices of wider ones that hold plausible neighbours, as a batch that was cut would."""
    moved = {}
    for name, tensor in context.tensors().items():
        neighbour = torch.full((*tensor.shape[:-1], 1), 5).to(tensor.dtype)
        moved[name] = torch.cat([neighbour, tensor, neighbour], dim=-1).to(device)[..., 1:-1]
    return AttentionContext(**moved)


def _params(case: Case, random: torch.Generator, device: str) -> AttentionParams:
    slopes = torch.tensor([0.5 ** (1 + h % 5) for h in range(case.heads)])
    sinks = (2 * torch.randn(case.heads, generator=random)).round() / 2
    seed = torch.randint(2**62, (), generator=random)
    return AttentionParams(
        alibi_slopes=slopes.to(device) if case.spec.alibi else None,
        sink_logits=sinks.to(device) if case.spec.learned_sink else None,
        dropout_seed=seed.to(device) if case.spec.dropout else None,
    )


def visible(inputs: Inputs) -> Tensor:
    """[B, T, S] bool: the definition, as a dense mask."""
    case, device = inputs.case, torch.device(inputs.device)
    T, S = case.n_queries, case.n_keys
    allowed = inputs.context.allowed(case.spec, slice(0, T), slice(0, S), lengths=(T, S), device=device)
    return allowed.expand(case.batch, T, S)
